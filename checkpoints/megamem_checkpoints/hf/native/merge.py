"""A bank read along one fixed path, as wider feed-forward layers (arXiv 2510.02375, appendix I: blocks widen a layer's SwiGLU)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megamem.errors import ExportError
from megamem.memory.config import BankConfig
from megamem.memory.names import bank_table_name
from megamem_checkpoints.hf.source import Source

_DENSE_FFN = re.compile(r"decoder\.layers\.(\d+)\.mlp\.linear_fc(1\.gate|1\.up|2)\.weight")
_MATRIX = {"1.gate": 0, "1.up": 1, "2": 2}  # of a block [3, units, hidden]: the output matrix is stored transposed


def block_rows(path: str, bank: BankConfig) -> dict[int, int]:
    """Row of each level's table along ``path``: ``generic``, or the cluster of every level such as ``3,17``.

    ExportError for anything that is no path of the bank's tree.
    """
    levels = range(1, bank.levels + 1)
    if path == "generic":
        return {level: bank.branching**level for level in levels}
    words = path.split(",")
    if len(words) != bank.levels or not all(word.strip().isdecimal() for word in words):
        raise ExportError(
            f"--merge-path is {path!r}; set generic, or one cluster for each of the bank's {bank.levels} levels, such as "
            f"{','.join(['0'] * bank.levels)}"
        )
    clusters = [int(word) for word in words]
    for level, cluster in zip(levels, clusters, strict=True):
        if cluster >= bank.branching**level:
            raise ExportError(
                f"--merge-path has cluster {cluster} at level {level}; set one from 0 to {bank.branching**level - 1}"
            )
        if level > 1 and cluster // bank.branching != (parent := clusters[level - 2]):
            first = parent * bank.branching
            raise ExportError(
                f"--merge-path has cluster {cluster} at level {level}, which is no child of cluster {parent}; set one from "
                f"{first} to {first + bank.branching - 1}"
            )
    return dict(zip(levels, clusters, strict=True))


@dataclass(frozen=True)
class MergedBank:
    """The blocks of one path, to be appended to the dense feed-forward layers."""

    source: Source
    rows: dict[int, int]
    """Row of each level's table, from :func:`block_rows`."""

    @property
    def units(self) -> int:
        """Hidden units that every feed-forward layer gains; zeros in layers without a bank."""
        return sum(self.source.memory.bank.units)

    def widens(self, source: str) -> bool:
        """Whether the canonical tensor ``source`` is a dense feed-forward matrix."""
        return _DENSE_FFN.fullmatch(source) is not None

    def widen(self, source: str, tensor: Tensor) -> Tensor:
        """A dense feed-forward matrix with the hidden units of the blocks after its own: ``[ffn + units, hidden]``, or
        ``[hidden, ffn + units]`` for the output matrix. Shapes alone on the meta device."""
        match = _DENSE_FFN.fullmatch(source)
        assert match is not None
        output = match[2] == "2"
        tables = self._tables(int(match[1]))
        if tensor.is_meta or not tables:
            return F.pad(tensor, (0, self.units) if output else (0, 0, 0, self.units))
        blocks = [self._block(table, row)[_MATRIX[match[2]]] for table, row in tables.items()]
        if output:
            return torch.cat([tensor, *(block.T for block in blocks)], dim=1)
        return torch.cat([tensor, *blocks], dim=0)

    def _tables(self, layer: int) -> dict[str, int]:
        """Row by table of one layer."""
        bank = self.source.memory.bank
        if bank.layers and layer not in bank.layers:
            return {}
        return {bank_table_name(layer, level): row for level, row in self.rows.items() if bank.units[level - 1]}

    def _block(self, table: str, row: int) -> Tensor:
        (block,) = self.source.table_pieces(table, torch.float32, row, row + 1)
        return block.view(3, -1, self.source.model.hidden_size)
