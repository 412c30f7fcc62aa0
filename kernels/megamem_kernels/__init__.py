"""Kernels of megamem, one folder per operation; nothing is imported until it is asked for by name."""
