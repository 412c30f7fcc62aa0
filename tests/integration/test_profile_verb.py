"""``megamem profile`` as a user runs it: numbers that add up, a page, traces with the phases in them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamem.observe.phases import NAMES
from megamem.testing.browser import chromium, open_page
from megamem_launch.config import load_config
from megamem_launch.profile.publish import publish

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def megamem_profile(data: Path, runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megamem.cli", "profile", str(TINY), f"data.path={data}", f"runs_dir={runs}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "profile.json").read_text()))


def check_sums(profile: dict[str, Any], ranks: int) -> None:
    breakdown = profile["breakdown"]
    assert len(breakdown["ranks"]) == ranks
    for phases, step, ratio in zip(
        breakdown["ranks"], breakdown["step_seconds"], breakdown["sum_over_step"], strict=True
    ):
        assert sum(phases.values()) == pytest.approx(step, rel=0.02)
        assert ratio == pytest.approx(1, abs=0.02)
        assert set(phases) <= set(NAMES)
        # Whatever a busy machine does to stages that wait for each other; and nearly all of a step is in a named phase.
        assert phases["forward"] + phases["backward"] + phases.get("pipeline_wait", 0.0) > 0.2 * step
        assert phases.get("other", 0.0) < 0.15 * step
    # Two clocks: the window as a whole, and the steps one by one.
    assert profile["step_seconds"]["mean"] == pytest.approx(breakdown["step_seconds"][0], rel=0.02)
    for kinds, held in zip(profile["memory"]["ranks"], profile["memory"]["held_bytes"], strict=True):
        assert sum(kinds.values()) == held
        assert kinds["gradients"] == pytest.approx(kinds["parameters"], rel=0.05)  # which are padded, and have buffers
        assert kinds["optimizer"] == pytest.approx(3 * kinds["parameters"], rel=0.01)
        assert kinds["activations"] > 2**16 and kinds["tables"] > 2**16


def look_at(page: Path, picture: Path) -> None:
    """Show a page in a browser, where one is installed: bars and tables are there, it asks for nothing, and it fits."""
    if (program := chromium()) is None:
        return
    with open_page(program) as tab:
        for width in (1200, 390):
            tab.look(width=width)
            tab.open(page)
            assert tab.complaints == [] and tab.requests == [page.resolve().as_uri()]
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(
            "[...document.querySelectorAll('.share i')].every(e => e.getBoundingClientRect().height > 10)"
        )
        colors = (
            "new Set([...document.querySelectorAll('.share i')].map(e => getComputedStyle(e).backgroundColor)).size"
        )
        assert tab.evaluate(colors) > 4
        assert tab.evaluate("document.querySelectorAll('table').length") == 3  # one rank has no wires
        assert tab.screenshot(picture).stat().st_size > 20_000


def ranges_of(trace: Path) -> set[str]:
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}


def test_one_rank(prepared_tiny: Path, tmp_path: Path) -> None:
    ended = megamem_profile(
        prepared_tiny, tmp_path, "name=p", "memory.prefetch_depth=0", "--peak-tflops", "0.1", "--checkpoint"
    )
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "p" / "profile"
    profile = read(out)
    check_sums(profile, 1)
    assert profile["flops"]["mfu"] == pytest.approx(
        profile["flops"]["training_per_token"] * profile["tokens_per_second"] / 1e11
    )
    assert profile["checkpoint"]["total_seconds"] >= profile["checkpoint"]["blocked_seconds"] > 0
    assert profile["wires"] == {}
    phases = profile["breakdown"]["ranks"][0]
    assert phases["plan"] > phases["fetch_wait"]  # without prefetching rows are fetched where they are asked for
    named = ranges_of(out / "trace-rank0.json.gz")
    assert {"data", "plan", "forward", "backward", "exchange", "dense_reduce", "dense_step", "row_update"} <= named

    page = (out / "profile.html").read_text()
    for text in ("Step time by phase", "Peak memory by kind", "FLOPs per token", "trace-rank0.json.gz", "MFU"):
        assert text in page, text
    assert "http://" not in page and "https://" not in page  # nothing is fetched
    look_at(out / "profile.html", tmp_path / "profile.png")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["profile"]  # the run of that name was not begun
    assert not (out / "scratch").exists()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run((out / "mlflow_run_id").read_text().strip())
    assert run.data.metrics["profile/tokens_per_second"] == pytest.approx(profile["tokens_per_second"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "20" and run.data.params["profile.measured"] == "10"
    assert run.data.tags["mlflow.source.name"] == "megamem profile"

    # Another profile in the same directory is another run, with settings of its own.
    again = load_config(out, ["train.global_batch_size=8", f"runs_dir={tmp_path}"])
    publish(profile, again, out)
    second = client.get_run((out / "mlflow_run_id").read_text().strip())
    assert second.info.run_id != run.info.run_id and second.info.status == "FINISHED"
    assert second.data.params["train.global_batch_size"] == "8" and run.data.params["train.global_batch_size"] == "4"


def test_two_stages(prepared_tiny: Path, tmp_path: Path) -> None:
    settings = ["name=p", "tracking.mlflow=false", "parallel.pipeline_model_parallel_size=2"]
    ended = megamem_profile(prepared_tiny, tmp_path, *settings, "--nproc", "2", "--steps", "15", "--traced", "1")
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "p" / "profile"
    profile = read(out)
    check_sums(profile, 2)
    assert profile["layout"]["pp"] == 2
    for rank in (0, 1):
        assert profile["bubble"][rank]["formula"] == 1 / 4
        assert profile["bubble"][rank]["share_of_step"] > 0
        assert "pipeline_wait" in ranges_of(out / f"trace-rank{rank}.json.gz")
    assert profile["wires"]["pp"]["mean_bytes"] == 4 * 64 * 64 * 4
    assert "pipeline wait" in ended.stdout and "dense_reduce" in ended.stdout
    assert "pipeline wait" in (out / "profile.html").read_text()


@pytest.mark.slow
def test_a_sweep_says_why_a_layout_is_refused(prepared_tiny: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"points": [{"train.micro_batch_size": 2}, {"train.micro_batch_size": 3}]}))
    ended = megamem_profile(
        prepared_tiny,
        tmp_path,
        "name=p",
        "tracking.mlflow=false",
        *("--sweep", str(sweep), "--steps", "2", "--warmup", "1", "--traced", "0"),
    )
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "p" / "profile"
    done, refused = json.loads((out / "sweep.json").read_text())["points"]
    assert done["settings"] == {"train.micro_batch_size": 2} and done["tokens_per_second"] > 0
    assert (
        "train.global_batch_size=4 is not a multiple" in refused["refused"]
        or "micro_batch_size=3" in refused["refused"]
    )
    page = (out / "sweep.html").read_text()
    assert "<svg" in page and "micro_batch_size=3" in page and "sweep/micro_batch_size=2/profile.html" in page
    assert "micro_batch_size=3: " in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "set 1 or more"),
        (["--sweep", "nothing.yaml"], "no sweep at nothing.yaml"),
        (["--sweep", "train.micro_batch_size="], "write SETTING=VALUE"),
        (["--nsys"], "no `nsys` is on PATH"),
        (["--nsys", "--sweep", "train.micro_batch_size=1,2"], "--nsys looks at one configuration"),
        (["--overhead", "--sweep", "train.micro_batch_size=1,2"], "--overhead looks at one configuration"),
        (["--cluster", str(TINY.parent / "clusters" / "cpu.yaml")], "has no hardware.peak_tflops_fp32"),
    ],
)
def test_what_a_user_gets_wrong(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    from megamem import cli

    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["profile", str(TINY), f"runs_dir={tmp_path}", *arguments]) == 2
    assert sentence in capsys.readouterr().err
