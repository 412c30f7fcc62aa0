"""The programs in docs/checkpoints.md, run as they stand there, give what a run holds; its words are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megamem_checkpoints import manifest as manifests
from megamem_checkpoints.reader import CheckpointReader

DOCS = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
PROGRAMS = {name: text for name, text in re.findall(r"```python\n# (\w+)\.py.*?\n(.*?)```", DOCS, re.DOTALL)}


@pytest.fixture
def checkpoint(mini_run: Callable[..., Any]) -> Path:
    """A checkpoint whose tables are in files and increments."""
    run = mini_run(keep=9)
    run.checkpointer.config.incremental = "on"
    run.save(1)
    for table in run.tables.values():
        rows = table.read(1, 3)
        rows["rows"] += 1
        table.write(1, rows)
    path = run.save(2)
    assert all(table.increments for table in manifests.read_manifest(path).tables.values())
    return path


def output_of(name: str, checkpoint: Path) -> dict[str, torch.Tensor]:
    program, out = checkpoint.parent / f"{name}.py", checkpoint.parent / "out.safetensors"
    program.write_text(PROGRAMS[name], encoding="utf-8")
    command = [sys.executable, "-I", str(program), str(checkpoint), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "megamem" not in PROGRAMS[name]
    return load_file(out)


@pytest.mark.parametrize("name", ["dense", "dcp"])
def test_dense_weights(checkpoint: Path, name: str) -> None:
    found, reader = output_of(name, checkpoint), CheckpointReader(checkpoint)
    assert sorted(found) == reader.names()
    assert all(torch.equal(value, reader.tensor(key)) for key, value in found.items())


def test_tables(checkpoint: Path) -> None:
    found, reader = output_of("table", checkpoint), CheckpointReader(checkpoint)
    assert set(found) == set(reader.tables())
    for name, value in found.items():
        assert torch.equal(value, reader.rows(name, 0, len(value))), name
        assert np.isfinite(value.numpy()).all()


def test_names_of_the_manifest_are_all_explained() -> None:
    section = DOCS[DOCS.index("## The manifest") :]
    for record in (manifests.Manifest, manifests.DenseRecord, manifests.TableRecord, manifests.IncrementRecord):
        for name in record.__dataclass_fields__:
            assert re.search(rf"\b{name}\b", section), name
    assert f"`format_version` | {manifests.FORMAT_VERSION};" in DOCS
