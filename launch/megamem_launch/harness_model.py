"""Exported models in the lm-evaluation-harness: its own Hugging Face adapter, which hands a bank's blocks on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.progress import track

from megamem.errors import ConfigError

T = TypeVar("T")


class Tasks(TaskManager):
    """The harness's tasks; one that cannot be loaded is a ConfigError."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except Exception as error:  # whatever a task's file, its data or the hub come up with
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ConfigError(
                f"a task cannot be loaded ({reason}); without a network, tasks need data of their own: see --include"
            ) from error


class RoutedModel(HFLM):
    """The harness's adapter, with the memory blocks of every request.

    A question reads the blocks of its context, whatever the answer that is scored; a text of the rolling likelihood those of
    the whole text, whatever the window. Requests are evaluated in groups that read the same blocks.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, window: int, routed: bool) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=window,
        )
        self._routed = routed
        self._path: torch.Tensor | None = None

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
        evaluate = super()._loglikelihood_tokens
        if self._path is not None:  # windows of a text that was routed as a whole
            return evaluate(requests, *args, **kwargs | {"disable_tqdm": True})
        return self._in_groups(
            requests,
            lambda request: request[1],
            lambda group: evaluate(group, *args, **kwargs | {"disable_tqdm": self._routed}),
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        evaluate = super().loglikelihood_rolling
        return self._in_groups(requests, self._text, lambda group: evaluate(group, disable_tqdm or self._routed))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        evaluate = super().generate_until
        return self._in_groups(requests, self._text, lambda group: evaluate(group, disable_tqdm or self._routed))

    def _text(self, request: Any) -> list[int]:
        """Token ids of a request's text."""
        return self.tok_encode(request.args[0])

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._path is None:
            return super()._model_call(inps, *args, **kwargs)
        with torch.no_grad():
            return self.model(inps, memory_paths=self._path.expand(len(inps), -1)).logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._path is not None:
            kwargs["memory_paths"] = self._path.expand(len(context), -1)
        return super()._model_generate(context, *args, **kwargs)

    def _in_groups(
        self, requests: Sequence[Any], text: Callable[[Any], list[int]], evaluate: Callable[[list[Any]], list[T]]
    ) -> list[T]:
        """Results of ``evaluate`` in the order of ``requests``, group by group of equal paths."""
        if not self._routed:
            return evaluate(list(requests))
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            ids = torch.tensor([text(request)], device=self.device)
            groups.setdefault(tuple(self.model.route(ids)[0].tolist()), []).append(number)
        results: dict[int, T] = {}
        try:
            for path, numbers in track(groups.items(), "evaluating", console=Console(stderr=True), transient=True):
                self._path = torch.tensor([path], device=self.device)
                results |= zip(numbers, evaluate([requests[number] for number in numbers]), strict=True)
        finally:
            self._path = None
        return [results[number] for number in range(len(requests))]
