"""Imported once by the server process that test ranks are forked from."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import megatron.core  # noqa: F401
