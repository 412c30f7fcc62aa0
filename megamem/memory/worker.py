"""The thread that does everything the memory engine does, one job after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Worker:
    """Runs jobs in the order of their submission, in a thread of its own or, without one, at once in the caller's.

    Jobs are collective operations and changes of tables, so their order must be the same on every rank: one queue, filled by
    the training loop, guarantees it. A table's lock is there for those who read a snapshot of it. After a job has failed every
    later one is refused with the same error: what it would have worked on is not what the other ranks believe.
    """

    def __init__(self, *, threaded: bool) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamem-memory") if threaded else None
        self._error: BaseException | None = None
        self._last: Future[object] | None = None

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue ``job``; its result, or the first error of any job, is in the future."""
        if self._pool is None or self._error is not None:
            future: Future[T] = Future()
            try:
                future.set_result(self._run(job))
            except BaseException as error:
                future.set_exception(error)
        else:
            future = self._pool.submit(self._run, job)
        self._last = future  # type: ignore[assignment]
        return future

    def wait(self) -> None:
        """Return when every submitted job has ended; raises the first error of any."""
        if self._last is not None and not self._last.cancelled():
            self._last.exception()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let the job that runs end, and drop the others; later ones are refused. Idempotent."""
        self._error = self._error or ValueError("the memory engine is closed")
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Callable[[], T]) -> T:
        if self._error is not None:
            raise self._error
        try:
            with torch.no_grad():
                return job()
        except BaseException as error:
            self._error = error
            raise
