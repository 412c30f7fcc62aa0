"""Evaluation of an exported model: perplexity of texts, and tasks of the lm-evaluation-harness. Needs no network."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megamem.errors import ConfigError

Document = Sequence[int] | np.ndarray
"""Token ids ``[n]`` of a document."""

_PACKAGE = "lm_eval"


def routes(model: Any) -> bool:
    """Whether the model has a memory bank and can find the blocks of a text itself."""
    return bool(getattr(model.config, "router_dimensions", 0))


@torch.no_grad()
def perplexity(model: Any, documents: Iterable[Document], *, window: int, routed: bool) -> dict[str, float]:
    """Perplexity over documents, each by itself.

    Args:
        model: A causal language model of transformers.
        documents: Token ids of each, its end-of-document id included; those of one token say nothing and are passed over.
        window: Longest input. A longer document is cut into windows that share one token, so that every token but the first
            of a document is predicted once.
        routed: Give a model with a bank the blocks of each document, found from its whole text as in training; otherwise the
            generic block.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``tokens`` (predicted ones) and ``documents``.
    """
    total, tokens, count = 0.0, 0, 0
    for document in documents:
        ids = torch.as_tensor(document, dtype=torch.int64, device=model.device)[None]
        if ids.shape[1] < 2:
            continue
        memory = {"memory_paths": model.route(ids)} if routed else {}
        for start in range(0, ids.shape[1] - 1, window):
            piece = ids[:, start : start + window + 1]
            logits = model(piece[:, :-1], use_cache=False, **memory).logits
            total += float(F.cross_entropy(logits[0].float(), piece[0, 1:], reduction="sum"))
            tokens += piece.shape[1] - 1
        count += 1
    if not tokens:
        raise ConfigError("there is no text to evaluate: every document is empty; name files with text")
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": float(tokens),
        "documents": float(count),
    }


def require_harness() -> None:
    """ConfigError where the lm-evaluation-harness is not installed."""
    if importlib.util.find_spec(_PACKAGE) is None:
        raise ConfigError("--tasks needs the lm-evaluation-harness; install it with `pip install 'megamem[eval]'`")


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: Path | None,
    batch_size: int,
    window: int,
    few_shot: int | None,
    limit: int | None,
    routed: bool,
) -> dict[str, dict[str, float]]:
    """Metrics by task, as the lm-evaluation-harness computes them.

    Args:
        model: As :func:`~megamem_launch.exported.open_model` gives it.
        tokenizer: Likewise.
        tasks: Names of tasks, built-in or found below ``include``.
        include: Directory of task files (YAML); their data may be local too.
        batch_size: Sequences per forward pass.
        window: Longest input.
        few_shot: Examples before each question; None for the task's own number.
        limit: Questions per task; None for all.
        routed: As for :func:`perplexity`; a question reads the blocks of its context.

    Raises:
        ConfigError: a task does not exist or cannot be loaded.
    """
    from lm_eval import simple_evaluate

    from megamem_launch.harness_model import RoutedModel, Tasks

    folder = None if include is None else str(include)
    manager = Tasks(include_path=folder, include_defaults=False)
    if any(task not in manager.all_tasks for task in tasks):  # the thousands of built-in ones take seconds to list
        manager = Tasks(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = f" or in {include}" if include is not None else "; name the directory of its file with --include"
        raise ConfigError(f"there is no task {unknown[0]} in the lm-evaluation-harness{where}")
    language_model = RoutedModel(model, tokenizer, batch_size=batch_size, window=window, routed=routed)
    results = simple_evaluate(
        language_model,
        tasks=list(tasks),
        num_fewshot=few_shot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    assert results is not None  # other ranks of the harness get None; here there is one
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if _is_number(value) and name != "sample_len"
        }
        for task, metrics in results["results"].items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
