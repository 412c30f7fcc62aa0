"""The gate through which an Engram layer reads its rows."""

from megamem_kernels.engram_gate.op import engram_gate

__all__ = ["engram_gate"]
