"""Learning-rate schedules and the guard that skips steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megamem.errors import ConfigError, MegamemError
from megamem.train.config import OptimizerConfig, TrainConfig
from megamem.train.guard import LossGuard
from megamem.train.schedule import learning_rate


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(config, s, 10) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_starts_at_the_peak_and_ends_at_the_floor() -> None:
    config = OptimizerConfig(lr=2.0, min_lr_ratio=0.1, warmup_steps=2, schedule="cosine")
    rates = [learning_rate(config, s, 102) for s in range(103)]
    assert rates[2] == 2.0
    assert rates[52] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[102] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[2:]))
    short = OptimizerConfig(lr=2.0, min_lr_ratio=0.1, warmup_steps=2, schedule="cosine", decay_steps=50)
    assert learning_rate(short, 50, 102) == learning_rate(short, 101, 102) == pytest.approx(0.2)


def test_wsd_is_flat_and_then_decays_linearly_to_the_floor() -> None:
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.0, warmup_steps=2, schedule="wsd", decay_steps=4)
    rates = [learning_rate(config, s, 12) for s in range(12)]
    assert rates[2:8] == [1.0] * 6
    assert rates[8:] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="wsd", warmup_steps=0), 89, 100) == 1.0


def test_wsd_without_a_stable_part_still_starts_at_the_peak() -> None:
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.0, warmup_steps=96, schedule="wsd")
    assert [learning_rate(config, s, 100) for s in range(95, 100)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_that_ends_within_the_warm_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"decay_steps is 10, .* within warmup_steps=10"):
        OptimizerConfig(schedule="cosine", warmup_steps=10, decay_steps=10)
    OptimizerConfig(schedule="wsd", warmup_steps=10, decay_steps=10)


def test_guard_refuses_what_is_not_finite() -> None:
    guard = LossGuard(TrainConfig())
    assert guard.refuses(2.0, 1.0) is None
    assert "loss is nan" in str(guard.refuses(math.nan, 1.0))
    assert "gradient norm is inf" in str(guard.refuses(2.0, math.inf))
    assert guard.mean == 2.0


def test_guard_refuses_spikes_after_it_has_seen_enough() -> None:
    guard = LossGuard(TrainConfig(skip_loss_above=1.5))
    assert guard.refuses(9.0, 1.0) is None
    for _ in range(60):
        assert guard.refuses(2.0, 1.0) is None
    assert "more than 1.5 times its running mean" in str(guard.refuses(4.0, 1.0))
    assert guard.refuses(2.5, 1.0) is None


def test_guard_gives_up_after_too_many_skips_in_a_row_and_resumes_its_count() -> None:
    guard = LossGuard(TrainConfig(max_skipped_steps=2))
    assert guard.refuses(math.nan, 1.0)
    other = LossGuard(TrainConfig(max_skipped_steps=2))
    other.load_state_dict(guard.state_dict())
    assert other.refuses(math.nan, 1.0)
    with pytest.raises(MegamemError, match="3 steps in a row"):
        other.refuses(math.nan, 1.0)
