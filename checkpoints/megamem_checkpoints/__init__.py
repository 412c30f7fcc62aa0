"""Checkpoints of a run, and their conversion to the Hugging Face format."""
