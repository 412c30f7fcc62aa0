"""A training run as a job, or as a chain of jobs that follow each other."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megamem.config import to_dict
from megamem.errors import ConfigError, DataError, LaunchError
from megamem.files import write_text
from megamem_launch.cluster import Cluster, with_mounts
from megamem_launch.config import RunConfig
from megamem_launch.rundir import (
    STOP,
    cancelled_file,
    finished_file,
    jobs_file,
    launch_dir,
    next_submission_folder,
    read_json,
    read_lines,
    stopped_file,
)
from megamem_launch.slurm.capture import CODE, records
from megamem_launch.slurm.render import Script, interpreter, render
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.slurm.secrets import secret_settings
from megamem_launch.slurm.shared import local_notes
from megamem_launch.slurm.submit import (
    SCRIPT,
    Kind,
    Submission,
    ask,
    claimed,
    log_folder,
    record_job,
    submit,
    write_submission,
)
from megamem_launch.slurm.topology import check_topology
from megamem_launch.validate import validate

_EARLY = 60
"""Seconds that SLURM may send its signal earlier than it was asked to."""
_LEAST, _LITTLE = 120, 300
"""Seconds between the start and that signal below which a job is refused, and below which its owner is told."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """What a person is told."""

    job_ids: list[str]
    """Empty after a dry run."""
    run_dir: Path
    script: str
    answer: str
    """Of ``sbatch --test-only``."""
    notes: list[str]
    """How groups fall on nodes, where that costs, and what is likely to go wrong."""


def absolute(config: RunConfig) -> RunConfig:
    """The configuration as a job reads it, whose directory of runs does not depend on where it starts."""
    return dataclasses.replace(config, runs_dir=str(Path(config.runs_dir).expanduser().absolute()))


def check_run(config: RunConfig, cluster: Cluster) -> list[str]:
    """Everything that can be seen to be wrong before a job exists; returns how groups cross nodes.

    Raises:
        ConfigError: the sections, or layout and cluster, do not fit each other, or a setting holds a secret.
        DataError: the prepared data is not there.
    """
    check_no_secrets(config)
    try:
        layout = validate(config, cluster.world_size)
    except ConfigError as error:
        where = f"nodes={cluster.nodes} x ranks_per_node={cluster.ranks_per_node} of cluster {cluster.name}"
        raise ConfigError(f"{where}: {error}") from None
    if not config.data.path:
        raise ConfigError("data.path is empty; set the directory that `megamem data prepare` wrote")
    if not (Path(config.data.path) / "data.json").is_file():
        raise DataError(
            f"{config.data.path} holds no prepared data; run `megamem data prepare` or `megamem launch data` with this "
            "configuration first"
        )
    return check_topology(config, layout, cluster) + _check_job(cluster)


def _check_job(cluster: Cluster) -> list[str]:
    """ConfigError where a job would be told to save before it has trained; notes on what is likely to go wrong."""
    slurm, notes = cluster.slurm, []
    if slurm.signal_seconds and (limit := cluster.time_seconds) is not None:
        left = limit - slurm.signal_seconds - _EARLY
        told = (
            f"slurm.time={slurm.time} is {limit} s, of which slurm.signal_seconds={slurm.signal_seconds} and up to {_EARLY} s of "
            "SLURM's own are for saving"
        )
        if left < _LEAST:
            raise ConfigError(
                f"{told}: a job would only start and save; set slurm.time to at least "
                f"{-(-(slurm.signal_seconds + _EARLY + _LEAST) // 60)} minutes, or less signal_seconds"
            )
        if left < _LITTLE:
            notes.append(f"{told}, so {left} s are left to start and to train in")
    if slurm.python and shutil.which(slurm.python) is None:
        notes.append(f"slurm.python={slurm.python} is no program on this machine; nodes must have it")
    return notes


def check_no_secrets(config: RunConfig) -> None:
    """ConfigError where a setting holds what looks like a secret: the resolved configuration is kept."""
    for setting in secret_settings(to_dict(config)):
        raise ConfigError(
            f"{setting} holds what looks like a secret, which would be kept with the run; leave it out and export it in the shell "
            "that submits (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, HF_TOKEN), which the job inherits"
        )


def mounted(cluster: Cluster, configs: Sequence[RunConfig], runs_dir: Path) -> Cluster:
    """The cluster whose container sees what runs below ``runs_dir`` read and write."""
    data = [Path(config.data.path).absolute() for config in configs]
    disks = [Path(path).absolute() for config in configs if (path := config.memory.disk.path)]
    return with_mounts(cluster, Path.cwd(), data, [runs_dir, *disks])


def training_script(cluster: Cluster, run_dir: Path, folders: Sequence[Path], at_once: int = 0) -> Script:
    """The job that trains what is kept in ``folders``: one submission, or each task of an array its own."""
    command = (interpreter(cluster), "-m", "megamem_launch.supervise")
    many = len(folders) != 1 or at_once > 0
    return Script(
        name=job_name(run_dir),
        comment=(
            "Written by `megamem launch slurm` and kept with the run. The supervisor starts the ranks, saves and requeues the",
            "job before its time ends, and starts again on other nodes when one is lost.",
        ),
        workdir=Path.cwd(),
        logs=log_folder(run_dir),
        command=command if many else (*command, str(folders[0])),
        tasks=tuple(map(str, folders)) if many else (),
        at_once=at_once,
    )


def job_name(run_dir: Path) -> str:
    """Name of a run's jobs: that of its directory, and what tells it from others of that name."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:6]}"


def launch_training(
    config: RunConfig, overrides: Sequence[str], cluster: Cluster, *, chain: int = 1, dry_run: bool = False
) -> Submitted:
    """Check, render, keep and submit a run; with ``chain`` above 1 as so many jobs that go on from each other.

    Raises:
        MegamemError: as :func:`check_run`; LaunchError where SLURM refuses, or the run is finished or has jobs already. Nothing
            is then submitted, and nothing left behind.
    """
    if chain < 1:
        raise ConfigError(f"--chain is {chain}; set the number of jobs that follow each other, 1 or more")
    config = absolute(config)
    run_dir = config.run_dir
    notes = check_run(config, cluster) + local_notes("runs_dir", Path(config.runs_dir))
    _check_free(config)
    cluster = mounted(cluster, [config], Path(config.runs_dir))
    folder = next_submission_folder(run_dir)
    script = render(cluster, training_script(cluster, run_dir, [folder]))
    answer = ask(script, cluster)
    if dry_run:
        return Submitted(job_ids=[], run_dir=run_dir, script=script, answer=answer, notes=notes)
    kind: Kind = "chain" if chain > 1 else "run"
    submission = Submission(
        run_dir=run_dir,
        config=config,
        cluster=cluster,
        kind=kind,
        world_size=cluster.world_size,
        overrides=tuple(overrides),
        chain_length=chain,
    )
    # Each waits for the one before however it ends, and for whatever else of this name this user has.
    after = ["singleton" if chain > 1 else ""] + ["afterany:{},singleton"] * (chain - 1)

    def record(job_id: str, former: str) -> None:
        record_job(run_dir, job_id, folder, kind, job_name(run_dir), former)

    with claimed(run_dir, folder), opened(run_dir):
        write_submission(submission, folder, {SCRIPT: script, **records(CODE)})
        ids = submit([folder / SCRIPT] * chain, cluster, record, after=after)
    return Submitted(job_ids=ids, run_dir=run_dir, script=script, answer=answer, notes=notes)


def _check_free(config: RunConfig) -> None:
    run_dir = config.run_dir
    if (launch_dir(run_dir) / "sweep.json").exists():
        raise LaunchError(f"{run_dir} is the directory of a sweep; set another name")
    done = read_json(finished_file(run_dir))
    if done is not None and int(done.get("step", 0)) >= config.train.steps:
        raise LaunchError(
            f"{run_dir} has trained {done.get('step')} of train.steps={config.train.steps} steps; raise train.steps to go on, or "
            "set another name"
        )
    check_no_jobs(run_dir)


def check_no_jobs(run_dir: Path) -> None:
    """LaunchError where jobs of a run wait or run, or SLURM cannot tell."""
    known = Slurm().jobs([str(entry["job_id"]) for entry in read_lines(jobs_file(run_dir))])
    alive = ", ".join(f"{job.id} ({job.state.lower()})" for job in known if not job.over)
    if alive:
        raise LaunchError(
            f"{run_dir} already has jobs: {alive}; end them with `megamem launch cancel {run_dir}`, or set another name"
        )


@contextmanager
def opened(run_dir: Path) -> Iterator[None]:
    """Without the marks that say that a run has ended, which are put back if the body fails: who submits wants it to go on."""
    marks = {
        path: path.read_text(encoding="utf-8")
        for path in (finished_file(run_dir), cancelled_file(run_dir), stopped_file(run_dir), run_dir / STOP)
        if path.is_file()
    }
    for path in marks:
        path.unlink()
    try:
        yield
    except BaseException:
        for path, text in marks.items():
            write_text(path, text)
        raise
