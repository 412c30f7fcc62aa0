"""The convolution after the gate of an Engram layer."""

from megamem_kernels.engram_conv.op import engram_conv

__all__ = ["engram_conv"]
