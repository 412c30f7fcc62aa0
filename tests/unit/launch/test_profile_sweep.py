"""Points of a sweep, and how they are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamem.errors import ConfigError
from megamem_launch.config import load_config
from megamem_launch.profile.options import SCRATCH, Options, scratch_config
from megamem_launch.profile.page import write_sweep_page
from megamem_launch.profile.sweep import plot, read_points, sweep_sheet

RESULTS: list[dict[str, Any]] = [
    {
        "name": "nproc=2",
        "settings": {"parallel.nproc": 2},
        "tokens_per_second": 1234.0,
        "step_seconds": 0.5,
        "flops_per_second": 2e9,
        "mfu": 0.25,
        "peak_memory_bytes": 3 << 30,
        "pipeline_wait": 0.125,
    },
    {"name": "nproc=3", "settings": {"parallel.nproc": 3}, "refused": "3 ranks <do> not fit"},
]


def test_points_of_a_line_and_of_a_file(tmp_path: Path) -> None:
    expected = [{"a.b": 1, "c": "x"}, {"a.b": 1, "c": "y"}, {"a.b": 2.5, "c": "x"}, {"a.b": 2.5, "c": "y"}]
    assert read_points("a.b=1,2.5; c=x,y;") == expected
    file = tmp_path / "sweep.yaml"
    file.write_text("grid: {a.b: [1, 2.5], c: [x, y]}\npoints: [{d: [1, 2]}]\n")
    assert read_points(str(file)) == [*expected, {"d": [1, 2]}]


@pytest.mark.parametrize("text", ["a=", "=1", "a=1;b=", "a=[1,2]", "nowhere.yaml"])
def test_points_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        read_points(text)


def test_a_refused_point_is_a_row_with_its_reason(tmp_path: Path) -> None:
    sheet = sweep_sheet(RESULTS)
    assert sheet.rows[0] == ["nproc=2", "1.23k", "500", "2G 25.0%", "3 GiB", "12.5%", ""]
    assert sheet.rows[1][0] == "nproc=3" and sheet.rows[1][-1] == "3 ranks <do> not fit"
    svg = plot(RESULTS)
    assert svg.startswith("<svg") and "nproc=2" in svg and "nproc=3" not in svg
    assert plot(RESULTS[1:]) == ""
    page = write_sweep_page("name <b>", sheet, svg, ["sweep/nproc=2/profile.html"], tmp_path).read_text()
    assert (
        "3 ranks &lt;do&gt; not fit" in page
        and "name &lt;b&gt;" in page
        and 'href="sweep/nproc=2/profile.html"' in page
    )


def test_a_scratch_run_keeps_shapes_and_leaves_the_run_alone() -> None:
    config = load_config(None, ["base=tiny", "name=mine", "optimizer.warmup_steps=15", "train.eval_batches=2"])
    scratch = scratch_config(config, Path("out"), 7)
    assert (scratch.runs_dir, scratch.name, scratch.train.steps) == ("out", SCRATCH, 7)
    assert scratch.model == config.model and scratch.parallel == config.parallel and scratch.memory == config.memory
    assert (config.name, config.train.eval_batches) == ("mine", 2)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"warmup": 0}, {"traced": -1}, {"peak_tflops": -1.0}])
def test_options_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Options(out=Path("out"), **settings)
