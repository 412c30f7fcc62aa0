"""Reports in a real browser: what is there, what it complains about, what it asks the network for, how it fits."""

from __future__ import annotations

import json
import math

import pytest

from megamem.observe.journal import Journal
from megamem.observe.report import build_comparison, build_report
from megamem.testing.browser import chromium, open_page

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium or Chrome is installed")

_COUNT = "document.querySelectorAll({}).length"


def _write_run(path, scale):
    journal = Journal(path / "journal.jsonl")
    first = journal.start(0, steps_done=0)
    for step in range(1, 201):
        phases = {"seconds/forward": 0.2, "seconds/backward": 0.4, "seconds/fetch_wait": 0.01 * (step % 7)}
        loss = scale * (4 + 4 * math.exp(-step / 40) + 0.1 * math.sin(step))
        journal.write(
            "step", step, loss=loss, lr=1e-3, grad_norm=1.0, grad_norm_tables=0.1, loss_tokens=2048, step_seconds=0.6,
            tokens_per_second=3000.0 + step, stall_seconds=0.01, memory_bytes=2**30, lookups=100, unique_rows=40,
            unique_ratio=0.4, skipped=int(step == 50), **phases,
        )  # fmt: skip
        if step % 50 == 0:
            journal.event("checkpoint", step, text=f"checkpoint of step {step}")
            journal.write("eval", step, loss=loss, blocked=False)
    journal.write("gates", 200, tokens=["\u2581a", "<b>"] * 40, layers=[1], gates=[[0.1, 0.9] * 40])
    journal.write("tables", 200, usage={f"decoder.layers.{i}.{'a_long_name' * 4}.table": 0.1 * i for i in range(9)})
    journal.event("stop", 200)
    journal.close()
    (path / "config.yaml").write_text(f"name: {path.name}\ntrain:\n  seed: {scale}\n")
    (path / "launch").mkdir()
    lost = {"time": first["time"], "event": "end", "outcome": "hang", "reason": "rank 3 is late", "step": 90}
    (path / "launch" / "incarnations.jsonl").write_text(json.dumps(lost) + "\n")
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [root / "base", root / ("a_name_without_a_place_to_break_" * 3)]
    for scale, run in enumerate(runs, start=1):
        run.mkdir()
        _write_run(run, scale)
    return build_report(runs[1]), build_comparison(runs, root / "comparison.html")


@pytest.fixture(scope="module")
def page():
    with open_page(chromium()) as tab:
        yield tab


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
@pytest.mark.parametrize("which", [0, 1], ids=["report", "comparison"])
def test_a_page_shows_everything_and_asks_for_nothing(page, pages, tmp_path, record_property, which, width, dark):
    page.look(width=width, dark=dark)
    page.open(pages[which])
    picture = page.screenshot(tmp_path / f"{pages[which].stem}-{width}{'-dark' if dark else ''}.png")
    record_property("screenshot", str(picture))
    print(f"screenshot: {picture}")
    assert picture.stat().st_size > 20_000
    assert page.complaints == []
    assert page.requests == [pages[which].resolve().as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    charts = page.evaluate("[...document.querySelectorAll('svg.chart')].map(e => e.getAttribute('aria-label'))")
    headings = page.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    if which == 0:
        assert {
            "Time line",
            "Loss",
            "Gradient norm",
            "Where the time of a step goes (seconds)",
            "Stalls (seconds)",
        } <= set(charts)
        assert {"Where the time went", "Gates over a text sample", "Use of the tables", "Events"} <= set(headings)
        assert page.evaluate(_COUNT.format("'.gates .text span'")) == 80
        assert page.evaluate(_COUNT.format("'.tick-mark.trouble'")) == 1
        assert "rank 3 is late" in page.evaluate("document.body.innerText")
    else:
        assert {"Training loss", "Validation loss", "Tokens per second"} <= set(charts)
        assert headings == ["Numbers", "Over the steps", "Settings that differ"]
        assert page.evaluate(_COUNT.format("'td.best'")) >= 1
    drawn = "[...document.querySelectorAll('svg.chart')].every(e => e.getBoundingClientRect().height > 40)"
    assert page.evaluate(drawn)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, paper[4:-1].split(","))) < 60) is dark


def test_the_browser_reports_what_goes_wrong(page, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<script>console.warn('seen'); setTimeout(() => { throw new Error('also seen') })</script><img src='http://127.0.0.1:9/x.png'>"
    )
    page.open(bad)
    assert "seen" in page.complaints and any("Uncaught" in one for one in page.complaints)
    assert page.requests[1:] == ["http://127.0.0.1:9/x.png"]
