"""``python -m megamem_launch.supervise.rank RUN_DIR CONFIG [HOST:PORT RANKS_PER_NODE]``: one rank under a supervisor.

Started by an agent (:mod:`megamem_launch.supervise.agent`), or, with the two last arguments, by srun itself, whose variables are
then translated. Output goes to the rank's own file below ``RUN_DIR/launch/logs``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from megamem.errors import (
    CheckpointError,
    ExchangeError,
    LaunchError,
    MegamemError,
    OutOfMemoryError,
    TierError,
    machine_sentence,
)
from megamem.observe.heartbeat import node_name, register_dump
from megamem.observe.noise import silence_libraries
from megamem_launch import rundir
from megamem_launch.config import load_config
from megamem_launch.supervise.ties import die_with_parent

TERMINATE = "terminate-"
"""Prefix of files that say that SLURM sent SIGTERM to the ranks of a node."""
FAILED = "failed-"
"""Prefix of files that say why a rank failed."""
_CURABLE = (CheckpointError, ExchangeError, LaunchError, OutOfMemoryError, TierError)


def main(argv: list[str]) -> int:
    """Train as the rank that the environment names: 0 at a clean end, 2 for what a person must mend, else 1."""
    run_dir, config = Path(argv[0]), argv[1]
    incarnation = os.environ[rundir.INCARNATION]
    if started_by_srun := len(argv) > 2:
        take_slurm_variables(argv[2], int(argv[3]))
    else:
        die_with_parent()  # an agent that is killed cannot stop its ranks
    rank = int(os.environ["RANK"])
    live = rundir.live_dir(run_dir, incarnation)
    outlive_termination(live / f"{TERMINATE}{rank:05d}", rundir.cancelled_file(run_dir), by_parent=started_by_srun)
    _redirect(rundir.log_dir(run_dir, incarnation) / f"{node_name()}-{rank}.log")
    dump = register_dump(rundir.dump_dir(run_dir, incarnation) / f"rank-{rank:05d}.txt")  # until the heartbeat does
    silence_libraries()
    try:
        from megamem_launch.run import pretrain

        pretrain(load_config(config))
    except BaseException as error:
        sentence, fatal = describe(error)
        if isinstance(error, MegamemError) or fatal:
            print(f"megamem train: {sentence}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 2 if fatal else 1
        with contextlib.suppress(OSError):
            record_failure(live, rank, sentence, code)
        return code
    finally:
        dump.close()
    return 0


def take_slurm_variables(endpoint: str, ranks_per_node: int) -> None:
    """Set the variables of a rank that torchrun would set, from those of srun."""
    host, _, port = endpoint.rpartition(":")
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_WORLD_SIZE=str(ranks_per_node),
        MASTER_ADDR=host,
        MASTER_PORT=port,
    )
    limit_threads(1)


def limit_threads(ranks: int) -> None:
    """Give each of the ``ranks`` that this task of SLURM, or this machine, computes with its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))


def outlive_termination(marker: Path, cancelled: Path, *, by_parent: bool) -> None:
    """Note SIGTERM in the file ``marker`` in place of ending, since SLURM sends it to all processes of a job that it is about to
    preempt: the supervisor sees the file, and has the ranks save. One from the parent ends this process, unless ``by_parent``:
    so an agent stops the ranks of a group of which one failed. So does every one once the file ``cancelled`` is there.

    The signal is blocked and waited for in a thread: a handler would not run while the main thread waits for other ranks.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while True:
            sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
            if (sender == parent and not by_parent) or os.path.exists(cancelled):
                os._exit(128 + signal.SIGTERM)
            with contextlib.suppress(OSError):
                marker.touch()

    threading.Thread(target=watch, name="termination", daemon=True).start()


def record_failure(live: Path, rank: int, sentence: str, exit_code: int) -> None:
    """Say why ``rank`` failed, unless it said so itself already. An exit code of 2 means that no restart cures it."""
    path = live / f"{FAILED}{rank:05d}.json"
    if not path.exists():
        record = {"rank": rank, "node": node_name(), "time": time.time(), "error": sentence, "exit_code": exit_code}
        rundir.write_json(path, record)


def describe(error: BaseException) -> tuple[str, bool]:
    """The error in one line, and whether only a person can mend it: a new start may well find a file handle valid again, memory
    free, a device well, or a lock given back that outlived its process for a moment."""
    if isinstance(error, MegamemError):
        return str(error), not isinstance(error, _CURABLE) or _refused_for_good(error.__cause__)
    sentence = machine_sentence(error) if isinstance(error, OSError) else None
    if sentence is not None:
        return sentence, _refused_for_good(error)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": "), False


def _refused_for_good(error: BaseException | None) -> bool:
    """Whether a file system said no, here or in what this error comes from, and will say so again."""
    while error is not None:
        if isinstance(error, OSError):
            return machine_sentence(error) is not None and error.errno not in (errno.EIO, errno.EROFS)
        error = error.__cause__
    return False


def _redirect(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
