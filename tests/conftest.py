"""Shared fixtures: no network, one thread, and data prepared once from the interpreter's own sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure() -> None:
    """Without a CUDA device Triton kernels are interpreted, which Triton decides when megatron-core imports it."""
    import torch  # only now: it reads the number of threads when it loads

    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(scope="session")
def prepared_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of ``configs/tiny.yaml``: real text, a two-level cluster tree, a 1024-entry tokenizer."""
    from megamem_data.prepare import prepare
    from megamem_launch.config import load_config

    path = tmp_path_factory.mktemp("data") / "tiny"
    config = load_config(Path(__file__).parents[1] / "configs" / "tiny.yaml", [f"data.path={path}", "data.workers=1"])
    bank = config.memory.bank
    prepare(config.data, branching=bank.branching, levels=bank.levels, seed=config.train.seed, progress=False)
    return path
