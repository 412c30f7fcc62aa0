"""The ``memory`` section: Engram tables, hierarchical banks, and the optimizer of their rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase as fnmatch
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

    name: Literal["sgd", "rowwise_adagrad", "lazy_adam", "partial_rowwise_adam", "sinkhorn_momentum"] = "lazy_adam"
    """``sgd``: no state. ``rowwise_adagrad``: one accumulator per row. ``lazy_adam``: two moments per element that catch up on
    missed steps. ``partial_rowwise_adam``: first moment per element, second per row. ``sinkhorn_momentum``: Nesterov momentum
    whose step is balanced over rows and columns (DeepSeek-V4.1)."""
    lr_multiplier: float = 5.0
    """Learning rate of rows as a multiple of the dense learning rate (Engram: 5)."""
    final_lr_multiplier: float = -1.0
    """Multiple at the end of the run, approached linearly from ``lr_multiplier``; -1 keeps it constant."""
    schedule: Literal["shared", "constant"] = "shared"
    """``shared``: the multiple is of the dense rate of the step. ``constant``: of the peak rate ``optimizer.lr``."""
    betas: tuple[float, ...] = (0.9, 0.99)
    """Used by the Adam forms."""
    momentum: float = 0.95
    """Used by ``sinkhorn_momentum``."""
    sinkhorn_iterations: int = 11
    """Alternations of row and column normalisation of ``sinkhorn_momentum``; odd, so that it ends with rows."""
    epsilon: float = 1e-8
    """Added to the root that a row's gradient is divided by."""
    weight_decay: float = 0.0
    """Decoupled, applied to touched rows only."""
    clip: Literal["shared", "own", "off"] = "shared"
    """``shared``: rows count in the global norm and are clipped with everything else by ``optimizer.clip_grad``. ``own``: they
    have a norm of their own, bounded by ``clip_norm``, and stay out of the global one. ``off``: out of it and not clipped."""
    clip_norm: float = 1.0
    """Bound of the norm over all table gradients for ``clip=own``."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas is {list(self.betas)}; set two values from 0 up to but not including 1")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}; set a value from 0 up to but not including 1")
        if self.sinkhorn_iterations < 1 or self.sinkhorn_iterations % 2 == 0:
            raise ConfigError(f"sinkhorn_iterations is {self.sinkhorn_iterations}; set an odd number")
        if self.final_lr_multiplier < 0 and self.final_lr_multiplier != -1:
            raise ConfigError(
                f"final_lr_multiplier is {self.final_lr_multiplier}; set 0 or more, or -1 for a constant one"
            )
        above_zero(self, "clip_norm")
        if self.epsilon < 1e-30:
            raise ConfigError(f"epsilon is {self.epsilon}; set 1e-30 or more, which is not lost in fp32")
        at_least(self, 0, "lr_multiplier", "weight_decay")


@dataclass(kw_only=True, slots=True)
class StorageConfig:
    """``memory.storage``: where and how rows and their optimizer state are kept."""

    tier: Literal["device", "host", "disk"] = "host"
    """Where owned rows live: the memory of the accelerator, of the host, or a file with a bounded cache in host memory."""
    state_tier: Literal["same", "device", "host", "disk"] = "same"
    """Where their optimizer state lives; ``same``: where the rows do."""
    format: Literal["fp32", "bf16", "fp8"] = "fp32"
    """How rows are stored and sent. ``bf16`` and ``fp8`` (E4M3 with one power-of-two scale per 32 values) are updated with
    stochastic rounding; optimizer state is fp32 always."""

    @property
    def tier_of_state(self) -> Literal["device", "host", "disk"]:
        """``state_tier`` resolved."""
        return self.tier if self.state_tier == "same" else self.state_tier


@dataclass(kw_only=True, slots=True)
class TableStorageConfig:
    """An entry of ``memory.tables``: what differs from ``memory.storage`` for some tables."""

    match: str
    """Name of a table, or a pattern of names: ``decoder.layers.1.engram.table``, ``*.bank.*``."""
    tier: Literal["inherit", "device", "host", "disk"] = "inherit"
    """As in ``memory.storage``."""
    state_tier: Literal["inherit", "same", "device", "host", "disk"] = "inherit"
    """As in ``memory.storage``."""
    format: Literal["inherit", "fp32", "bf16", "fp8"] = "inherit"
    """As in ``memory.storage``."""


@dataclass(kw_only=True, slots=True)
class DiskConfig:
    """``memory.disk``: files of the disk tier."""

    path: str = ""
    """Directory on a local disk of each node, without the run's name; empty puts the files under the directory of the run."""
    cache_gib: float = 1.0
    """Host memory of one rank for cached rows and state of all its disk tables together; an index of 5 bytes for each row, and as
    much for its state, comes on top."""
    queue_depth: int = 16
    """Reads and writes that are under way at a time."""

    def __post_init__(self) -> None:
        above_zero(self, "cache_gib")
        at_least(self, 1, "queue_depth")


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """``memory``: everything whose parameters are looked up by row."""

    engram: EngramConfig = field(default_factory=EngramConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    optimizer: RowOptimizerConfig = field(default_factory=RowOptimizerConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    tables: list[TableStorageConfig] = field(default_factory=list)
    """Storage of single tables where it differs from ``storage``; the first entry whose ``match`` fits counts."""
    disk: DiskConfig = field(default_factory=DiskConfig)
    placement: Literal["contiguous", "scrambled"] = "contiguous"
    """Which rows an owner stores: neighbouring ones, or ones scattered over the table so that no owner gets all the busy ones."""
    prefetch_depth: int = 1
    """Steps whose rows are fetched while earlier steps compute; 0 fetches when the step begins. Changes no result."""
    staleness: int = 0
    """0: exact, rows updated after they were prefetched are patched before use. k: rows may miss the last k updates."""
    verify: Literal["off", "ids", "full"] = "ids"
    """Checksums on what the ranks of a memory group exchange: none, on row ids, or on rows and gradients too. Ids and counts
    are validated in any case."""
    hierarchical: Literal["auto", "on", "off"] = "auto"
    """Exchange within a node first, then once per row between nodes; ``auto``: where the memory group spans nodes."""
    transport: Literal["auto", "gloo", "nccl"] = "auto"
    """What carries rows and gradients; ids and counts go by gloo. ``nccl`` needs ``prefetch_depth=0``: collectives of two threads
    have no common order on a device. ``auto``: nccl where it can be, else gloo."""
    host_memory: Literal["private", "shared"] = "private"
    """Host tables in anonymous memory or in ``/dev/shm``; both with transparent huge pages where the system grants them."""
    host_gather: Literal["auto", "cpu", "uva"] = "auto"
    """How rows get from a host table to a CUDA device: gathered by the CPU and copied, or read by a kernel through the bus.
    ``auto`` measures both at the start."""
    threads: int = 0
    """Threads of one CPU kernel; 0 for an equal share of the cores per rank of this node."""
    timeout_seconds: int = 600
    """How long an exchange waits for the other ranks before the run fails."""

    def __post_init__(self) -> None:
        at_least(self, 0, "prefetch_depth", "staleness", "threads")
        at_least(self, 1, "timeout_seconds")
        if self.staleness > self.prefetch_depth:
            raise ConfigError(
                f"staleness is {self.staleness}, but rows are never read more than prefetch_depth={self.prefetch_depth} "
                "steps ahead; set at most that"
            )

        if self.transport == "nccl" and self.prefetch_depth:
            raise ConfigError(
                f"transport is nccl, which cannot run beside the model's own collectives as prefetch_depth="
                f"{self.prefetch_depth} wants; set transport=gloo or prefetch_depth=0"
            )

    def storage_of(self, table: str) -> StorageConfig:
        """Storage of the table of this name."""
        entry = next((entry for entry in self.tables if fnmatch(table, entry.match)), None)
        if entry is None:
            return self.storage
        own = {name: getattr(entry, name) for name in ("tier", "state_tier", "format")}
        return replace(self.storage, **{name: value for name, value in own.items() if value != "inherit"})
