"""ZeRO settings that cannot run are refused from the configuration alone."""

from __future__ import annotations

import pytest

from megamem.errors import ConfigError
from megamem.parallel.checks import check_zero
from megamem.parallel.layout import Layout
from megamem.train.config import OptimizerConfig


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage_fits_without_pipelining(stage: int) -> None:
    check_zero(OptimizerConfig(zero_stage=stage), Layout(8, tp=2, cp=2, ep=2))


def test_stage_2_and_pipelining_exclude_each_other() -> None:
    with pytest.raises(
        ConfigError, match=r"zero_stage=2 .* \(parallel.pipeline_model_parallel_size=2\) .* set optimizer"
    ):
        check_zero(OptimizerConfig(zero_stage=2), Layout(4, pp=2))
    check_zero(OptimizerConfig(zero_stage=1), Layout(4, pp=2))


@pytest.mark.parametrize(
    ("stage", "hint"), [(3, "set 2, with offload=host"), (4, "set 0, 1 or 2"), (-1, "set 0, 1 or 2")]
)
def test_other_stages_are_refused(stage: int, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"zero_stage is {stage}.*{hint}"):
        OptimizerConfig(zero_stage=stage)
