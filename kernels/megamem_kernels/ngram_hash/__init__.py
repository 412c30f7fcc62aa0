"""Row ids of hashed suffix n-grams: the addresses of an Engram table."""

from megamem_kernels.ngram_hash.op import ngram_hash

__all__ = ["ngram_hash"]
