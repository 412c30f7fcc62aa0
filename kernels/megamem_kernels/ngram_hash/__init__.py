"""Row ids of hashed suffix n-grams: the addresses of an Engram table."""
