"""`megamem`: help, unknown verbs, and errors that end with one sentence and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megamem.cli import main, usage, verbs

ROOT = Path(__file__).parents[3]
VERBS = {
    "data",
    "train",
    "export",
    "import",
    "generate",
    "eval",
    "inspect",
    "checkpoint",
    "report",
    "profile",
    "plan",
    "launch",
}


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert set(verbs()) >= VERBS
    for name in verbs():
        assert f"  {name}" in out
    assert out.strip() == usage()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"megamem {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown verb `trian`: did you mean `megamem train`?"),
        (
            ["train", str(ROOT / "configs/quickstart.yaml"), "memory.engram.widht=3"],
            "unknown setting `memory.engram.widht`: did you mean `width`?",
        ),
        (
            ["train", str(ROOT / "configs/quickstart.yaml"), "memory.optimizer.name=adagard"],
            "memory.optimizer.name is 'adagard'; set one of: sgd, rowwise_adagrad, lazy_adam",
        ),
        (
            ["train", str(ROOT / "configs/tiny.yaml"), "memory.tables=[{match: '*.engramm.*', tier: disk}]"],
            "memory.tables has match=*.engramm.*, which fits none of the tables decoder.layers.",
        ),
        (["train", str(ROOT / "configs/tiny.yaml"), "memory.tables=[{tier: disk}]"], "match is missing; set it"),
        (
            ["train", str(ROOT / "configs/tiny.yaml"), "memory.staleness=3"],
            "staleness is 3, but rows are never read more than prefetch_depth=1 steps ahead; set at most that",
        ),
        (
            ["train", str(ROOT / "configs/tiny.yaml"), "memory.transport=nccl"],
            "set transport=gloo or prefetch_depth=0",
        ),
        (["train", "nowhere.yaml"], "no configuration at nowhere.yaml"),
        (
            ["train", str(ROOT / "configs/tiny.yaml"), "parallel.nproc=3", "parallel.tensor_model_parallel_size=2"],
            "a world of 3 ranks does not fit parallel.tensor_model_parallel_size=2",
        ),
        (["train", str(ROOT / "configs/tiny.yaml"), "data.path=nowhere"], "nowhere"),
        (["inspect", "runs/nowhere"], "runs/nowhere"),
        (["export", "runs/nowhere", "out"], "runs/nowhere"),
        (["generate", "nowhere", "a prompt"], "nowhere"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_stop_from_before_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "STOP").touch()
    for verb in (["train"], ["launch", "local"]):
        assert main([*verb, str(ROOT / "configs/tiny.yaml"), f"runs_dir={tmp_path}", "name=x"]) == 2
        assert f"remove {tmp_path / 'x' / 'STOP'} to train" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["STOP"]


def test_settings_of_a_cluster_file_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--settings"]) == 0
    told = capsys.readouterr().out
    assert "slurm.signal_seconds=120\n    Seconds before" in told and "\nranks_per_node=0\n" in told


def test_export_names_every_target() -> None:
    from megamem_checkpoints.hf.targets import TARGETS
    from megamem_launch.verbs.export import Arguments

    assert set(get_args(get_type_hints(Arguments)["to"])) == set(TARGETS)
