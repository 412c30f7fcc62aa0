"""From text to packed token sequences: tokenizer, shards, document clusters, loader."""
