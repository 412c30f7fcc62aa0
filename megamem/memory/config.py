"""The ``memory`` section: Engram tables, hierarchical banks, and the optimizer of their rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megamem.config import above_zero, at_least
from megamem.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class EngramConfig:
    """``memory.engram``: hashed n-gram tables read before attention (arXiv 2601.07372). No layer listed means none."""

    layers: list[int] = field(default_factory=list)
    """Zero-based layers that own an Engram module and its table."""
    orders: list[int] = field(default_factory=lambda: [2, 3])
    """N-gram orders; consecutive, starting at 2."""
    heads: int = 8
    """Hash heads per order."""
    width: int = 32
    """Width of one row; the module reads ``len(orders) * heads`` rows per token."""
    rows_per_head: int = 65536
    """Lower bound of rows per head; each head gets its own prime above it."""
    seed: int = 0
    """Seed of the hash multipliers (numpy PCG64, ``seed + 10007 * layer``)."""
    fold_tokens: bool = False
    """Hash canonical ids (NFKC, accents stripped, lower-cased, white space folded) in place of raw token ids."""
    pad_id: int = -1
    """Token id that stands for missing left context; -1 takes the end-of-document token."""
    sqrt_gate: bool = True
    """Signed square root before the gate's sigmoid, as in the published code (the paper's equation 4 lacks it)."""
    conv_kernel_size: int = 4
    """Taps of the causal depth-wise convolution; 0 for none. Its dilation is the highest order."""
    init_std: float = 0.02
    """Standard deviation of initial rows."""

    def __post_init__(self) -> None:
        if self.orders != list(range(2, 2 + len(self.orders))) or not self.orders:
            raise ConfigError(f"orders is {self.orders}; set consecutive orders that start at 2, such as [2, 3]")
        at_least(self, 1, "heads", "width", "rows_per_head")
        at_least(self, 0, "seed", "init_std")
        at_least(self, -1, "pad_id")
        if self.conv_kernel_size < 0:
            raise ConfigError(f"conv_kernel_size is {self.conv_kernel_size}; set 0 for no convolution, or the taps")
        if len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"layers is {self.layers}; name each layer once")


@dataclass(kw_only=True, slots=True)
class BankConfig:
    """``memory.bank``: hierarchical feed-forward memories fetched by document (arXiv 2510.02375). No units means none."""

    layers: list[int] = field(default_factory=list)
    """Zero-based layers that the fetched blocks widen; empty means every layer."""
    units: list[int] = field(default_factory=list)
    """Hidden units of one block at each level, root first; the paper writes (r1, r2, ...). 0 skips a level."""
    branching: int = 16
    """Children per cluster: level ``l`` (counted from 1) has ``branching ** l`` blocks."""
    generic_probability: float = 1 / 17
    """Share of documents that read one shared generic block per level in place of their own."""
    init_std: float = 0.02
    """Standard deviation of the two input matrices of a block (truncated at two); the output matrix starts at zero."""

    def __post_init__(self) -> None:
        if any(u < 0 for u in self.units):
            raise ConfigError(f"units is {self.units}; set 0 or more hidden units for each level")
        at_least(self, 2, "branching")
        at_least(self, 0, "init_std")
        if not 0 <= self.generic_probability <= 1:
            raise ConfigError(f"generic_probability is {self.generic_probability}; set a value from 0 to 1")
        if len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"layers is {self.layers}; name each layer once")

    @property
    def enabled(self) -> bool:
        """Whether any level has a block."""
        return any(self.units)

    @property
    def levels(self) -> int:
        """Depth of the cluster tree."""
        return len(self.units)


@dataclass(kw_only=True, slots=True)
class RowOptimizerConfig:
    """``memory.optimizer``: how touched rows are updated. Untouched rows and their state never change."""

    name: Literal["rowwise_adagrad", "lazy_adam"] = "lazy_adam"
    """``rowwise_adagrad``: one accumulator per row. ``lazy_adam``: two moments per element that catch up on missed steps."""
    lr_multiplier: float = 5.0
    """Learning rate of rows as a multiple of the dense learning rate (Engram: 5)."""
    betas: tuple[float, ...] = (0.9, 0.99)
    """Used by ``lazy_adam``."""
    epsilon: float = 1e-8
    """Added to the root that a row's gradient is divided by."""
    weight_decay: float = 0.0
    """Decoupled, applied to touched rows only."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas is {list(self.betas)}; set two values from 0 up to but not including 1")
        above_zero(self, "epsilon")
        at_least(self, 0, "lr_multiplier", "weight_decay")


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """``memory``: everything whose parameters are looked up by row."""

    engram: EngramConfig = field(default_factory=EngramConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    optimizer: RowOptimizerConfig = field(default_factory=RowOptimizerConfig)
