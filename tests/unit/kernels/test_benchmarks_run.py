"""The benchmark harness, and that every benchmark runs: at tiny sizes, whose times mean nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "kernels" / "benchmarks"
MODULES = ("harness", "run", "plot")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the folder, as `run.py` imports them; other tests may use the same names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name)
    return loaded


def _spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_contenders_take_turns_and_the_first_round_does_not_count(modules: dict[str, ModuleType]) -> None:
    harness, calls = modules["harness"], []
    contenders = [harness.Contender(name, lambda name=name: calls.append(name)) for name in "abc"]
    timings = harness.measure(harness.Case("turns", contenders), rounds=3)
    assert calls == list("abc") + list("aabbcc") * 3, (
        "one run of all, then each twice in a row, of which the second counts"
    )
    assert [len(timing.seconds) for timing in timings] == [3, 3, 3]
    assert all(0 < timing.least <= timing.median <= max(timing.seconds) for timing in timings)


def test_cpu_time_does_not_count_waiting(modules: dict[str, ModuleType]) -> None:
    harness = modules["harness"]
    case = harness.Case("idle", [harness.Contender("sleeps", lambda: time.sleep(0.05))], cpu_time=True)
    (timing,) = harness.measure(case, rounds=2)
    assert max(timing.seconds) < 0.04
    busy = harness.Case("busy", [harness.Contender("spins", lambda: _spin(0.02))], cpu_time=True)
    assert harness.measure(busy, rounds=1)[0].least >= 0.02


def test_ratios_and_bars_are_of_the_peer_over_ours(modules: dict[str, ModuleType]) -> None:
    harness, run = modules["harness"], modules["run"]
    names = ["ours", "slow", "limit", "absent"]
    case = harness.Case(
        "c",
        [harness.Contender(name, lambda: None) for name in names],
        unit_bytes=8 * 10**9,
        bars={"slow": 3.0, "limit": 0.6, "absent": 1.0},
    )
    seconds = [[2.0, 4.0, 8.0], [6.0, 16.0, 40.0], [1.0, 2.0, 2.0]]
    timings = [harness.Timing(c, s) for c, s in zip(case.contenders, seconds, strict=False)]
    timings.append(harness.Timing(case.contenders[3], [], missing="not installed"))
    ours, slow, limit, absent = run.report("m", case, timings)["contenders"]
    assert ours["min"] == 2 and ours["median"] == 4 and ours["gb_per_second"] == 4 and "ratio_min" not in ours
    assert (slow["ratio_min"], slow["ratio_median"], slow["met"]) == (3.0, 4.0, True)
    assert (limit["ratio_min"], limit["ratio_median"], limit["met"]) == (0.5, 0.5, False)
    assert absent == {"name": "absent", "note": "", "missing": "not installed"}
    assert "met" not in run.report("m", case, timings, judge=False)["contenders"][1]


@pytest.mark.parametrize("error", ["ImportError", "NotInstalled"])
def test_a_missing_peer_is_a_row_and_any_other_error_is_not(modules: dict[str, ModuleType], error: str) -> None:
    harness, run = modules["harness"], modules["run"]

    def peer() -> None:
        raise {"ImportError": ImportError, "NotInstalled": harness.NotInstalled}[error]("missing peer")

    case = harness.Case("c", [harness.Contender("ours", lambda: None), harness.Contender("peer", peer)])
    result = run.report("m", case, harness.measure(case, rounds=2))
    assert result["contenders"][1]["missing"] == "missing peer"
    assert run.table_of(result).row_count == 2

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        harness.measure(harness.Case("c", [harness.Contender("ours", broken)]), rounds=1)


def test_a_case_names_each_contender_once_and_bars_name_peers(modules: dict[str, ModuleType]) -> None:
    harness = modules["harness"]
    ours = harness.Contender("ours", lambda: None)
    for contenders, bars in (([], {}), ([ours, ours], {}), ([ours], {"ours": 1.0}), ([ours], {"peer": 1.0})):
        with pytest.raises(ValueError, match="case `c`"):
            harness.Case("c", contenders, bars=bars)


def test_every_benchmark_runs(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--rounds", "2", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    body = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {case["benchmark"] for case in body["cases"]} == set(modules["run"].benchmark_names())
    assert body["quick"] and body["machine"]["torch"] and body["machine"]["cores"] >= 1
    for case in body["cases"]:
        assert case["case"] in done.stdout
        for contender in case["contenders"]:
            assert contender.get("missing") or (len(contender["seconds"]) == 2 and contender["min"] > 0)
        assert "missing" not in case["contenders"][0]
    assert (tmp_path / "out" / "bench.svg").read_text().rstrip().endswith("</svg>")
    assert "MISSED" not in done.stdout

    done = subprocess.run([*command, "--only", "nothing"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and "no benchmark nothing; there are" in done.stderr
