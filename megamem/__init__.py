"""megamem: pretraining of memory-augmented language models on megatron-core and DeepSpeed."""

__version__ = "0.1.0"
