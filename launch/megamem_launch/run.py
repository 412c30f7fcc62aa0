"""One rank of a training run, from its configuration to its report."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamem.errors import MegamemError, OutOfMemoryError
from megamem.observe.heartbeat import start_heartbeat
from megamem.observe.phases import phases
from megamem.parallel import groups as parallel_groups
from megamem.train.control import Request
from megamem.train.step import StepRunner
from megamem.train.trainer import Observer, Progress, Trainer
from megamem_checkpoints.files import writer_lock
from megamem_launch.accounting import report_memory
from megamem_launch.compose import (
    Parts,
    build_parts,
    check_ranks_agree,
    check_start,
    initial_checkpoint,
    open_data,
)
from megamem_launch.config import RunConfig, save_config
from megamem_launch.observer import RunObserver
from megamem_launch.requests import Requests
from megamem_launch.rundir import dump_dir, finished_file, incarnation, live_dir, outcome_file, write_json
from megamem_launch.saver import Saver
from megamem_launch.summary import gate_sample, table_usage, write_summary
from megamem_launch.validate import validate


def pretrain(config: RunConfig) -> Path:
    """Train, or go on where the run stopped, on this rank; returns the directory of the run.

    What a user can get wrong is checked before the process group exists, unless it takes the other ranks or the state of the
    machine to see it. Errors are MegamemError subclasses.
    """
    rank = int(os.environ.get("RANK", "0"))
    layout = validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    data = open_data(config)
    check_start(config, data)
    with contextlib.ExitStack() as stack:
        if (own := incarnation()) is not None:
            beats = start_heartbeat(live_dir(config.run_dir, own), dump_dir(config.run_dir, own), rank)
            stack.enter_context(contextlib.closing(beats))
        if rank == 0:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(writer_lock(config.run_dir, doing="training"))
        parallel_groups.init_distributed()
        try:
            groups = parallel_groups.initialize(layout, seed=config.train.seed)
            check_ranks_agree(config, data)
            with contextlib.closing(build_parts(config, data, groups)) as parts:
                _train(parts, rank)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"rank {rank} ran out of memory ({str(error).partition(chr(10))[0]}); lower train.micro_batch_size, "
                "data.seq_length or the sizes of model and memory, or raise the sizes of parallel"
            ) from error
        finally:
            parallel_groups.destroy()
            dist.destroy_process_group()
    return config.run_dir


def _out_of_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _train(parts: Parts, rank: int) -> None:
    config = parts.config
    progress, guard_state, new = _restore(parts)
    if progress.step >= config.train.steps and (config.run_dir / "summary.json").exists():
        if rank == 0:
            print(
                f"{config.run_dir} has already trained {progress.step} of train.steps={config.train.steps} steps; "
                "raise train.steps to go on"
            )
        return
    if rank == 0:
        save_config(config, config.run_dir / "config.yaml")
    accounting = report_memory(parts)
    observer = RunObserver(config, rank=rank, steps_done=progress.step)
    observer.record("accounting", progress.step, **accounting)
    if parts.zero.notice:
        observer.event("offload", progress.step, parts.zero.notice)
    if new:
        text = f"not in {config.checkpoint.load}, so left at their initial values: {', '.join(new)}"
        observer.event("new_memories", progress.step, text)
    requests = Requests(config.run_dir)

    def after_step() -> None:
        saver.report()
        if rank == 0 and not saver.busy:
            requests.saved()

    trainer = make_trainer(
        parts,
        observer,
        lambda step: saver.save(step),
        progress,
        after_step=after_step,
        ask=requests.poll if rank == 0 else lambda: Request.NONE,
    )
    saver = Saver(parts, observer, trainer)
    if guard_state is not None:
        trainer.guard.load_state_dict(guard_state)
    try:
        trainer.run()
        with phases("checkpoint"):
            saver.wait()
        if not trainer.stopped:
            _finish(parts, trainer, observer, rank)
    except BaseException:
        saver.close()
        observer.finish("FAILED", trainer.progress.step)
        raise
    if rank == 0:
        requests.heed()
    if trainer.stopped:
        text = f"stopped after step {trainer.progress.step} ({requests.why}); the same command goes on from there"
        observer.event("stop_requested", trainer.progress.step, text)
    observer.finish("KILLED" if trainer.stopped else "FINISHED", trainer.progress.step)
    if rank == 0:
        _report_end(config.run_dir, trainer, requests)


def _report_end(run_dir: Path, trainer: Trainer, requests: Requests) -> None:
    """Tell the supervisor, and the jobs that come after, how training ended."""
    step = trainer.progress.step
    if (own := incarnation()) is not None:
        ended = {"outcome": "stopped" if trainer.stopped else "finished", "step": step, "why": requests.why}
        if not trainer.stopped:
            write_json(finished_file(run_dir), {"step": step, "time": time.time()})
        write_json(outcome_file(run_dir, own), ended)
    requests.obeyed(finished=not trainer.stopped)


def make_trainer(
    parts: Parts,
    observer: Observer,
    save: Callable[[int], None],
    progress: Progress | None = None,
    *,
    after_step: Callable[[], None] = lambda: None,
    ask: Callable[[], Request] = lambda: Request.NONE,
) -> Trainer:
    """The training loop over ``parts``; ``save(step)`` writes a checkpoint, or begins to."""
    config = parts.config
    return Trainer(
        config=config.train,
        optimizer=config.optimizer,
        groups=parts.groups,
        model=parts.model,
        zero=parts.zero,
        memory=parts.memory,
        runner=StepRunner(
            parts.zero.module,
            parts.groups,
            seq_length=config.data.seq_length,
            micro_batch_size=config.train.micro_batch_size,
        ),
        loader=parts.loader,
        validation=parts.validation,
        observer=observer,
        save=save,
        after_step=after_step,
        ask=ask,
        checkpoint_interval=config.checkpoint.interval,
        memory_config=config.memory,
        progress=progress or Progress(),
    )


def _restore(parts: Parts) -> tuple[Progress, dict[str, Any] | None, list[str]]:
    """Load the checkpoint that the run starts from, if any: counters, state of the loss guard, and the memory tensors and
    tables that were not in it."""
    path, resume = initial_checkpoint(parts.config)
    parts.checkpointer.agree(path)
    if path is None:
        return Progress(), None, []
    with phases("checkpoint"):
        loaded = parts.checkpointer.load(
            path,
            entries=parts.entries,
            put_state=parts.zero.load_full_state,
            tables=parts.memory.tables,
            optimizer_state=resume,
        )
    if not resume:
        return Progress(), None, loaded["kept"]
    meta = loaded["meta"]
    parts.loader.load_state_dict(meta["data"])
    parts.zero.load_state_dict(meta["optimizer"])
    return Progress(**meta["progress"]), meta["guard"], []


def _finish(parts: Parts, trainer: Trainer, observer: RunObserver, rank: int) -> None:
    """Closing measurements: table usage, gates over a text sample, ``summary.json``, report."""
    step = trainer.progress.step
    observer.record("tables", step, usage=table_usage(parts))
    gates = gate_sample(parts, trainer.runner)
    if gates is not None:
        observer.record("gates", step, **gates)
    write_summary(parts, trainer)
    if rank == 0:
        _write_report(parts.config.run_dir, observer)


def _write_report(run_dir: Path, observer: RunObserver) -> None:
    """The report is made of what the journal has: a run whose weights are saved does not fail for want of it."""
    from megamem.observe.report import build_report

    for name in ("summary.json", "config.yaml"):
        observer.artifact(run_dir / name)
    try:
        report = build_report(run_dir)
    except MegamemError as error:
        print(f"no report was written: {error}", file=sys.stderr)
        return
    observer.artifact(report)
    print(f"report: {report}")
