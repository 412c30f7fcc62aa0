"""The ``train`` and ``optimizer`` sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamem.config import above_zero, at_least
from megamem.errors import ConfigError

Recompute = Literal["none", "selective", "full"]


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """``train``: length, batch and guards of a run."""

    steps: int = 100
    """Optimizer steps of the whole run."""
    global_batch_size: int = 8
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Sequences per forward pass on one data-parallel rank."""
    seed: int = 1234
    """Root of every random draw of the run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 with fp32 master weights on a CUDA device, fp32 elsewhere."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it: nothing; the core attention and the memory modules (``selective``);
    every layer from its input (``full``). Saves memory, costs time, changes no result."""
    eval_interval: int = 0
    """Steps between evaluations on the validation split; 0 evaluates at the end only."""
    eval_batches: int = 4
    """Global batches per evaluation; 0 for no evaluation at all."""
    log_interval: int = 1
    """Steps between log lines."""
    skip_loss_above: float = 0.0
    """Skip a step whose loss exceeds its running mean by this factor; 0 turns it off. Non-finite steps are always skipped."""
    max_skipped_steps: int = 10
    """Consecutive skipped steps after which the run stops with an error."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "global_batch_size", "micro_batch_size", "log_interval", "max_skipped_steps")
        at_least(self, 0, "seed", "eval_interval", "eval_batches")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}"
            )
        if self.skip_loss_above and self.skip_loss_above <= 1:
            raise ConfigError(f"skip_loss_above is {self.skip_loss_above}; set a factor above 1, or 0 to turn it off")


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """``optimizer``: AdamW of the dense parameters under DeepSpeed ZeRO, and the schedule that rows share."""

    zero_stage: int = 1
    """What is split over the replicas of a dense parameter. 0: nothing. 1: fp32 master weights and moments. 2: gradients too,
    which are then reduced in every micro-batch; not with pipeline stages. Changes no result but for rounding."""
    offload: Literal["none", "host"] = "none"
    """``host``: master weights and moments in host memory, stepped there by DeepSpeed's CPU Adam. That is compiled at the first
    use on a machine; torch's fused AdamW takes its place where it cannot be."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; ``wsd`` stays at the peak and decays linearly at the end."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """``cosine``: steps until the final rate, warm-up included, 0 for the whole run. ``wsd``: length of the final decay, 0 for a
    tenth of the run."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    epsilon: float = 1e-8
    """AdamW's addition to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled; not applied to norms and other vectors."""
    clip_grad: float = 1.0
    """Global norm over dense and table gradients, each counted once; 0 for no clipping."""

    def __post_init__(self) -> None:
        if self.zero_stage == 3:
            raise ConfigError(
                "zero_stage is 3, which leaves no parameter whole on any rank between two layers, where checkpoints and exports "
                "read them; set 2, with offload=host or a larger tensor_model_parallel_size where memory is short"
            )
        if self.zero_stage not in (0, 1, 2):
            raise ConfigError(f"zero_stage is {self.zero_stage}; set 0, 1 or 2")
        above_zero(self, "lr", "epsilon")
        at_least(self, 0, "warmup_steps", "decay_steps", "weight_decay", "clip_grad")
        if self.schedule == "cosine" and 0 < self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"decay_steps is {self.decay_steps}, which counts from the first step and ends within warmup_steps="
                f"{self.warmup_steps}; set more, or 0 for the whole run"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"min_lr_ratio is {self.min_lr_ratio}; set a value from 0 to 1")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas is {list(self.betas)}; set two values from 0 up to but not including 1")
