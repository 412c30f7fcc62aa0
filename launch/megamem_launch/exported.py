"""Exports of any kind, opened as whoever uses them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamem.errors import ExportError


def open_model(folder: Path, *, device: str, dtype: str, tables: str) -> tuple[Any, Any]:
    """Model and tokenizer of an export of any kind, ready for inference.

    Args:
        folder: Directory of the export.
        device: Where the model computes.
        dtype: ``auto``, ``fp32`` or ``bf16``.
        tables: Where memory tables are kept, of exports with megamem's own code: ``device``, ``cpu`` or ``disk``.

    Raises:
        ExportError: transformers cannot open the directory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    types = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        placed = {"table_placement": tables} if config.model_type == "megamem" else {}
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=types[dtype], **placed)
    except (OSError, ValueError, SyntaxError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ExportError(f"{folder} cannot be opened ({reason}); export the run again") from error
    return model.to(device).eval(), tokenizer
