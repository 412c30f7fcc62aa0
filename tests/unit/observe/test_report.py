from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from megamem.errors import DataError, MegamemError
from megamem.memory.access import AccessTrace
from megamem.memory.stats import StepStats
from megamem.observe.charts import Series, area_chart, line_chart, smooth, thin
from megamem.observe.journal import Journal, read_journal
from megamem.observe.report import build_comparison, build_report
from megamem.observe.report_events import events_of, marks_of, spans
from megamem.observe.report_figures import phase_series
from megamem.observe.report_numbers import headlines, read_summary, summarize
from megamem_launch.verbs.inspect import find_run
from megamem_launch.verbs.inspect import main as inspect
from megamem_launch.verbs.report import main as report

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Page(HTMLParser):
    """Checks that tags nest, and keeps the text below every class."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.titles = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        values = dict(attrs)
        assert "src" not in values and "href" not in values
        if "title" in values:
            self.titles.append(values["title"])
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.text.append(data)

    def section(self, heading):
        joined = "\n".join(self.text)
        return joined[joined.index(heading) :]


def _write_run(path, steps=40):
    journal = Journal(path / "journal.jsonl")
    journal.start(0, steps_done=0)
    journal.write("eval", 0, loss=8.0, blocked=False)
    for step in range(1, steps + 11):
        journal.write("step", step, loss=777.0 if step > steps - 10 else 5.0, lookups=100, unique_rows=25)
    journal.start(steps - 9, steps_done=steps - 10)
    for step in range(steps - 9, steps + 1):
        bad = step == steps
        journal.write(
            "step",
            step,
            loss=math.nan if bad else 4.0,
            lr=1e-3,
            grad_norm=math.inf if bad else 1.0,
            tokens_per_second=1000.0 * step,
            step_seconds=0.5,
            stall_seconds=0.05,
            loss_tokens=64,
            lookups=100,
            unique_rows=25,
            unique_ratio=0.25,
            skipped=int(bad),
        )
    journal.event("skip", steps, text="step <skipped> on all ranks")
    journal.write("eval", steps, loss=4.25, blocked=False)
    journal.write("eval", steps, loss=4.75, blocked=True)
    journal.write(
        "gates", steps, tokens=["\u2581a", "<b>", "<0x0A>"], layers=[1, 3], gates=[[0.1, 0.5, 0.9], [0.5] * 3]
    )
    journal.write("tables", steps, usage={"decoder.layers.1.engram.table": 0.125})
    journal.close()
    (path / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    return path


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "runs" / "a <i> run"
    path.mkdir(parents=True)
    return _write_run(path)


def test_the_report_is_one_well_formed_file_without_network(run_dir):
    path = build_report(run_dir)
    html = path.read_text()
    page = _Page(html)
    assert path == run_dir / "report.html" and "://" not in html and "@import" not in html and "url(" not in html
    assert "<script>" not in html and "<i> run" not in html
    assert "name: <script>alert(1)</script>" in page.section("Resolved configuration")
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= set(re.findall(r"(--[\w-]+):", html))
    assert not list(run_dir.glob("*.tmp"))


def test_headlines_come_from_the_journal_and_the_summary_overrides_them(run_dir):
    entries = read_journal(run_dir / "journal.jsonl")
    summary = summarize(entries)
    assert summary["validation_loss"] == {"first": 8.0, "last": 4.25, "last_blocked": 4.75}
    assert summary["steps"] == 40 and summary["skipped_steps"] == 1 and summary["tokens_seen"] == 640
    assert summary["unique_row_ratio"] == 0.25 and summary["stall_share"] == pytest.approx(0.1)
    assert summary["tokens_per_second"] == 35500.0 and summary["seconds"] == 5.0
    texts = {h.label: (h.value, h.note) for h in headlines(summary)}
    assert texts["Validation loss"] == ("4.2500", "from 8.0000")
    assert texts["Memory blocked"] == ("4.7500", "+0.5000 when no memory is read")
    assert texts["Steps"] == ("40", "640 tokens, 0:05, 1 skipped")

    extra = {"parameters": {"dense": 3_000_000, "tables": 9_000_000, "total": 12_000_000}, "world_size": 4}
    (run_dir / "summary.json").write_text(json.dumps(extra | {"tokens_per_second": 7.0, "versions": {"torch": "2.13"}}))
    merged = read_summary(run_dir, entries)
    texts = {h.label: (h.value, h.note) for h in headlines(merged)}
    assert texts["Parameters"] == ("12M", "3M dense, 9M tables") and texts["Tokens per second"][0] == "7"
    page = _Page(build_report(run_dir).read_text())
    assert "world size" in page.section("More numbers") and "versions.torch" in page.section("More numbers")
    assert {"dense: 3M", "tables: 9M"} <= set(page.titles)

    (run_dir / "summary.json").write_text('{"steps": ')
    with pytest.raises(DataError, match=r"summary\.json is not a JSON object"):
        build_report(run_dir)


def test_gates_usage_and_events_are_told(run_dir):
    page = _Page(build_report(run_dir).read_text())
    gates = page.section("Gates over a text sample")
    assert "Layer 1" in gates and "Layer 3" in gates and "<b>" in gates and "↵\n" in gates and " a" in gates
    assert [t for t in page.titles if t.startswith("0.")] == [
        "0.1000",
        "0.5000",
        "0.9000",
        "0.5000",
        "0.5000",
        "0.5000",
    ]
    assert "12.50 %" in page.section("Use of the tables")
    events = page.section("Events")
    for word in ("start", "killed", "resume", "skip", "step <skipped> on all ranks"):
        assert word in events
    assert events.index("killed") < events.index("resume") < events.index("skip")
    assert events.count("skip\n") == 1  # told by the event, not again by the skipped step
    assert "\n50\n" in events[events.index("start") : events.index("resume")]  # the overtaken step before the kill


def test_overtaken_steps_are_in_no_chart(run_dir):
    html = build_report(run_dir).read_text()
    assert "777" not in re.sub(r'(x[12]?|y[12]?|width)="[^"]*"', "", html)
    loss = re.search(r'<svg[^>]*aria-label="Loss".*?</svg>', html, re.S).group()
    assert (
        loss.count("<circle") == 3 and loss.count('class="mark resume"') == 1 and loss.count('class="mark skip"') == 1
    )
    assert 'aria-label="Auxiliary loss"' not in html and 'aria-label="Learning rate"' in html


def _memory_run(path):
    """Steps with every number of the memory, and the access statistics of two streams, one of them unread."""
    trace, generator = AccessTrace(2000, sampled_rows=128), np.random.default_rng(0)
    journal = Journal(path / "journal.jsonl")
    journal.start(0, steps_done=0)
    for step in range(1, 31):
        ids, counts = np.unique(generator.zipf(1.3, 400) % 2000, return_counts=True)
        trace.record(ids, counts)
        stats = StepStats(lookups=400, unique_rows=len(ids), rows_received=100, patched_rows=5, stall_seconds=0.004)
        stats.count_io("host", "read", rows=len(ids), nbytes=64 * len(ids))
        stats.count_io("disk", "written", rows=len(ids), nbytes=128 * len(ids))
        stats.resident_bytes = {"host": 2**30, "disk": 2**32}
        journal.write("step", step, loss=4.0, step_seconds=0.1, **stats.as_dict())
        if step == 10:
            journal.write("access", step, rank=0, streams={"early": trace.summary()})
    journal.write("access", 30, rank=0, streams={"layer <1>": trace.summary(), "unread": AccessTrace(5).summary()})
    journal.close()
    return trace.summary()


def test_memory_traffic_is_charted_by_tier(tmp_path):
    _memory_run(tmp_path)
    html = build_report(tmp_path).read_text()
    text = "\n".join(_Page(html).text)
    svgs = dict(re.findall(r'<svg[^>]*aria-label="([^"]*)"(.*?)</svg>', html, re.S))
    assert svgs["Waiting for tables (% of the step)"].count("<path") == 1
    assert svgs["Unique and patched rows (%)"].count("<path") == 2
    for title in ("Rows read and written per step, by tier", "MiB read and written per step, by tier"):
        assert svgs[title].count("<path") == 2
    assert svgs["Tables and their state (GiB), by tier"].count("<path") == 2
    assert "Bytes received by the exchange" not in svgs
    for name in ("host, read", "disk, written", "unique, of the rows looked up", "patched, of the rows fetched"):
        assert name in text
    summary = summarize(read_journal(tmp_path / "journal.jsonl"))
    assert summary["patch_ratio"] == 0.05 and summary["stall_share"] == pytest.approx(0.04)
    assert {h.label: h.note for h in headlines(summary)}["Unique rows"].endswith("5.0% patched before use")


def test_access_statistics_are_shown_per_stream(tmp_path):
    summary = _memory_run(tmp_path)
    html = build_report(tmp_path).read_text()
    section = _Page(html).section("Access to the tables")
    assert "layer <1>" in section and "unread" not in section and "early" not in section
    assert "30 steps made 12k lookups" in section and "Estimated from one row in" in section
    curve = summary["hit_rate"]
    at_one_percent = 100 * np.interp(20, curve["rows"], curve["steps"])
    assert f"1 % of the table is 20 rows and holds {at_one_percent:.1f} %" in section
    charts = dict(re.findall(r'<svg[^>]*aria-label="([^"]*)"(.*?)</svg>', html, re.S))
    hit_rate = charts["Hit rate (%) against the size of a cache (rows)"]
    assert hit_rate.count("<path") == 2 and "nan" not in hit_rate
    hottest = charts["Lookups (%) that go to the hottest rows"]
    assert hottest.count("<circle") == len(summary["hot_rows"]["rows"])
    heat = charts["Rows by number of lookups"]
    assert heat.count("<circle") == np.count_nonzero(summary["heat"]["rows"]) and "nan" not in heat


def test_different_rows_read_are_charted_over_the_steps(tmp_path):
    _memory_run(tmp_path)
    html = build_report(tmp_path).read_text()
    assert "Different rows read" in html
    svg = re.search(r'<svg[^>]*aria-label="Different rows.*?</svg>', html, re.S).group()
    assert svg.count("<circle") == 1  # the stream that is read, where it was measured under this name


def test_phases_of_steps_are_stacked_and_add_up(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    names = ["forward", "backward", "exchange", *(f"phase{i}" for i in range(9))]
    for step in range(1, 601):
        journal.write("step", step, **{f"seconds/{name}": 0.5 / (i + 1) for i, name in enumerate(names)})
    journal.close()
    series = phase_series(read_journal(tmp_path / "journal.jsonl"))
    assert [s.name for s in series[:3]] == ["forward", "backward", "exchange"] and series[-1].name == "other"
    assert len({s.color for s in series}) == len(series) == 10
    assert sum(s.y[0] for s in series) == pytest.approx(sum(0.5 / (i + 1) for i in range(12)))
    html = build_report(tmp_path).read_text()
    svg = re.search(r'<svg[^>]*aria-label="Where the time of a step goes.*?</svg>', html, re.S).group()
    assert svg.count('class="area') == 10
    text = "\n".join(_Page(html).text)
    assert "Where the time went" in text and "5:00" in text  # 600 steps of half a second in forward


def test_areas_lie_on_each_other():
    x = np.array([0.0, 10.0])
    parts = [Series("low", x, np.array([1.0, 1.0]), 0, "area"), Series("high", x, np.array([1.0, 3.0]), 1, "area")]
    low, high = re.findall(r'<path class="area c\d" d="([^"]*)"', str(area_chart("t", parts, size=(262, 136))))
    # 200 x 100 inside the margins; the axis ends 5 % above 4
    assert low == "M52.0 86.2L252.0 86.2L252.0 110.0L52.0 110.0Z"
    assert high == "M52.0 62.4L252.0 14.8L252.0 86.2L52.0 86.2Z"
    assert area_chart("t", []) == ""


def test_strips_tell_the_values_of_all_lines(run_dir):
    svg = str(
        line_chart("t", [Series("a", np.arange(5.0), np.arange(5.0)), Series("b", np.arange(5.0), np.ones(5), 1)])
    )
    assert re.findall(r"<title>([^<]*)</title>", svg) == [f"step {i}\na: {i}\nb: 1" for i in range(5)]


def test_what_the_supervisor_tells_is_on_the_time_line_and_in_the_events(run_dir):
    journal = run_dir / "journal.jsonl"
    lines = [json.loads(line) | {"time": 1000.0 + i} for i, line in enumerate(journal.read_text().splitlines())]
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))  # written within a millisecond, else
    at = next(e["time"] for e in lines if e["kind"] == "step")
    (run_dir / "launch").mkdir()
    end = {"time": at, "event": "end", "incarnation": "7.0.0", "step": 20}
    lost = end | {"outcome": "node_failure", "reason": "node2 <gone>", "bad_nodes": ["node2"]}
    limit = end | {"outcome": "time_limit", "reason": "", "bad_nodes": []}
    lines = [{"event": "start"}, lost, limit, end | {"outcome": "finished"}]
    (run_dir / "launch" / "incarnations.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"torn')
    events = events_of(run_dir, read_journal(run_dir / "journal.jsonl", overtaken=True))
    names = [event.name for event in events]
    assert names.count("node_failure") == names.count("time_limit") == 1 and "finished" not in names
    marks = {(mark.kind, mark.step) for mark in marks_of(events)}
    assert marks == {("resume", 31), ("skip", 40), ("trouble", 20)}
    html = build_report(run_dir).read_text()
    assert "node2 <gone>; without node2 from here on" in _Page(html).section("Events")
    strip = re.search(r'<svg class="chart timeline.*?</svg>', html, re.S).group()
    assert strip.count('class="span"') == 2 and strip.count('class="tick-mark trouble"') == 2  # and the kill


def test_a_hang_is_one_event_though_journal_and_supervisor_tell_of_it(tmp_path):
    entries = [
        {"time": 1.0, "kind": "event", "step": 0, "event": "start"},
        {"time": 5.0, "kind": "step", "step": 4},
        {"time": 40.0, "kind": "event", "step": 3, "event": "start"},
        {"time": 44.0, "kind": "event", "step": 6, "event": "fail"},
        {"time": 50.0, "kind": "event", "step": 6, "event": "start"},
        {"time": 51.0, "kind": "step", "step": 7},
        {"time": 60.0, "kind": "event", "step": 6, "event": "start"},
    ]
    (tmp_path / "launch").mkdir()
    ends = [(30.0, 4, "hang"), (45.0, 6, "crash"), (90.0, 7, "cancelled")]
    lines = [{"time": time, "event": "end", "outcome": outcome, "step": step} for time, step, outcome in ends]
    (tmp_path / "launch" / "incarnations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    events = events_of(tmp_path, entries)
    assert [event.name for event in events if event.kind == "trouble"] == ["hang", "crash", "killed"]
    found = [(start, stop, event.name) for start, stop, event in spans(events, 61.0)]
    assert found == [(1.0, 30.0, "hang"), (40.0, 45.0, "crash"), (50.0, 51.0, "killed"), (60.0, 90.0, "cancelled")]


def test_how_the_ranks_of_a_cancelled_run_end_is_no_trouble(tmp_path):
    entries = [
        {"time": 1.0, "kind": "event", "step": 0, "event": "start"},
        {"time": 5.0, "kind": "step", "step": 4},
        {"time": 9.0, "kind": "event", "step": 5, "event": "fail"},
    ]
    (tmp_path / "launch").mkdir()
    end = {"time": 6.0, "event": "end", "outcome": "cancelled", "step": 4}
    (tmp_path / "launch" / "incarnations.jsonl").write_text(json.dumps(end))
    assert [event.name for event in events_of(tmp_path, entries)] == ["start", "cancelled"]


def test_several_runs_are_compared(run_dir, tmp_path):
    other = tmp_path / "elsewhere" / run_dir.name  # two runs of one name
    other.mkdir(parents=True)
    journal = Journal(other / "journal.jsonl")
    journal.start(0, steps_done=0)
    for step in range(1, 31):
        journal.write("step", step, loss=3.0, step_seconds=0.1, loss_tokens=64, tokens_per_second=5.0)
    journal.write("eval", 30, loss=3.5, blocked=False)
    journal.close()
    (run_dir / "config.yaml").write_text("name: one\nruns_dir: a\ntrain: {seed: 1, steps: 9}\n")
    (other / "config.yaml").write_text("name: two\nruns_dir: b\ntrain: {seed: 2, steps: 9}\nextra: true\n")
    html = build_comparison([run_dir, other], tmp_path / "both.html").read_text()
    page = _Page(html)
    assert "elsewhere/a <i> run" in page.section("Numbers") and "://" not in html
    differ = page.section("Settings that differ")
    assert "train.seed" in differ and "extra" in differ and "train.steps" not in differ and "runs_dir" not in differ
    best = re.findall(r'<td>([^<]*)</td>(?:<td[^>]*>[^<]*</td>)*?<td class="best"[^>]*>([^<]*)</td>', html)
    assert ("Validation loss", "3.5000") in best and ("Tokens per second", "35.5k") in best
    loss = re.search(r'<svg[^>]*aria-label="Training loss over tokens".*?</svg>', html, re.S).group()
    assert loss.count("<path") == 2
    same = build_comparison([run_dir, run_dir], tmp_path / "same.html").read_text()
    assert "None but names and places" in same
    with pytest.raises(DataError, match="cannot be read"):
        build_comparison([run_dir, tmp_path], tmp_path / "none.html")


def test_the_report_verb_writes_where_it_is_told(run_dir, tmp_path, capsys):
    runs, out = str(run_dir.parent), tmp_path / "pages" / "one.html"
    assert report([run_dir.name, "--runs-dir", runs, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out and "Time line" in out.read_text()
    assert not (run_dir / "report.html").exists()
    assert report([run_dir.name, run_dir.name, "--runs-dir", runs]) == 0
    assert (run_dir.parent / "comparison.html").exists()
    with pytest.raises(MegamemError, match="no run was named"):
        report([])


def test_logarithmic_axes_place_values_by_their_logarithm():
    x, y = np.array([1.0, 10.0, 100.0, 10_000.0]), np.array([0.0, 1.0, 2.0, 4.0])
    svg = str(line_chart("t", [Series("a", x, y, style="points")], size=(262, 136), from_zero=True, log_x=True))
    points = [float(value) for value in re.findall(r'cx="([\d.]+)"', svg)]
    assert points == pytest.approx([52, 102, 152, 252])
    assert re.findall(r"tick middle[^>]*>([^<]+)<", svg) == ["1", "10", "100", "1k", "10k"]
    small = str(line_chart("t", [Series("a", x, y / 4000)], from_zero=True))
    assert re.findall(r"tick end[^>]*>([^<]+)<", small)[1] == "2.5e-4"  # a longer one would leave the picture


def test_empty_sections_are_left_out(tmp_path):
    Journal(tmp_path / "journal.jsonl").close()
    text = "\n".join(_Page(build_report(tmp_path).read_text()).text)
    assert "Nothing has been measured yet" in text
    for heading in ("Over the steps", "Gates", "Use of the tables", "Events", "Settings", "Parameters"):
        assert heading not in text
    with pytest.raises(DataError, match="cannot be read"):
        build_report(tmp_path / "nowhere")


def test_a_report_that_cannot_be_written_is_one_sentence(run_dir):
    (run_dir / "report.html.tmp").mkdir()
    with pytest.raises(DataError, match=r"report\.html cannot be written \(Is a directory\)"):
        build_report(run_dir)


def test_gates_must_match_their_tokens(tmp_path):
    Journal(tmp_path / "journal.jsonl").write("gates", 1, tokens=["a", "b"], layers=[0], gates=[[0.5]])
    with pytest.raises(DataError, match="2 tokens but 1 gates of layer 0"):
        build_report(tmp_path)


def test_chart_coordinates_and_gaps():
    x, y = np.array([0.0, 5.0, 10.0, 15.0, 20.0]), np.array([0.0, 1.0, np.nan, 3.0, 4.0])
    svg = str(line_chart("t", [Series("a", x, y)], size=(262, 136), from_zero=True))
    # 200 x 100 inside the margins; the axis ends 5 % above the largest value
    assert re.search(r' d="([^"]*)"', svg).group(1) == "M52.0 110.0L102.0 86.2M202.0 38.6L252.0 14.8"
    assert line_chart("t", [Series("a", x, np.full(5, np.nan))]) == ""
    single = str(line_chart("t", [Series("a", x[:1], y[1:2], style="points")]))
    assert "nan" not in single and single.count("<circle") == 1
    wide = str(line_chart("t", [Series("a", x, np.array([1e-3, 1.0, np.nan, 10.0, 1e3]))]))
    assert re.findall(r"tick end[^>]*>([^<]+)<", wide) == ["0.001", "0.1", "10", "1k"]
    assert "&lt;b&gt;" in str(line_chart("<b>", [Series("<b>", x, y, style="points")]))


def test_thinning_keeps_spikes_ends_and_order():
    y = np.sin(np.arange(50_000) / 5000)
    y[12_345], y[777] = 50.0, np.nan
    x, thinned = thin(np.arange(50_000.0), y, limit=400)
    assert len(x) <= 400 and (np.diff(x) > 0).all() and np.isfinite(thinned).all()
    assert thinned.max() == 50.0 and thinned.min() == np.nanmin(y)
    short = thin(np.arange(3.0), y[776:779])
    assert len(short[0]) == 3


def test_smoothing_neither_lags_nor_leans():
    line = np.linspace(3, 1, 401)
    assert smooth(line, 4)[100:300] == pytest.approx(line[100:300], abs=1e-7)
    y = np.array([1.0, np.nan, 3.0])
    assert smooth(y, 1.0) == pytest.approx([(1 + 3 / 4) / (1 + 1 / 4), 2.0, (3 + 1 / 4) / (1 + 1 / 4)])
    assert np.isnan(smooth(np.full(2, np.nan), 1.0)).all()


def test_inspect_finds_runs_by_name_and_by_path(run_dir, capsys, monkeypatch):
    runs = run_dir.parent
    assert inspect([run_dir.name, "--runs-dir", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert "Validation loss" in printed and "4.2500" in printed and str(run_dir / "report.html") in printed
    assert (run_dir / "report.html").exists()
    assert find_run(str(run_dir), runs) == run_dir
    monkeypatch.chdir(runs)
    assert find_run(run_dir.name, runs / "none").resolve() == run_dir
    with pytest.raises(MegamemError, match=r"no run `a run`.* nearest: a <i> run"):
        find_run("a run", runs)
    with pytest.raises(MegamemError, match="runs there: none"):
        find_run("a run", runs / "none")
