"""Submission of batch scripts: asked first, then kept with the run, then handed to sbatch. What is refused leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamem.errors import LaunchError
from megamem.files import fsync, write_text
from megamem_launch.cluster import Cluster, save_cluster
from megamem_launch.config import RunConfig, save_config
from megamem_launch.rundir import append_json, jobs_file, launch_dir, read_lines
from megamem_launch.slurm.client import run
from megamem_launch.slurm.refusal import explain, is_transient, lacks_nodes, waits_for_ever
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.slurm.scrub import scrubbed
from megamem_launch.slurm.secrets import redact_override

Kind = Literal["run", "chain", "sweep", "data", "local"]

_SECONDS = 60
_LOOK_SECONDS = 3.0
_NOT_LOOKED_AT = ("", "Dependency", "JobHeldUser")
"""Reasons of a job that was just released, before the scheduler has looked at it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What is kept of one submission besides its script."""

    run_dir: Path
    """Absolute directory of the run."""
    config: RunConfig
    cluster: Cluster
    kind: Kind
    world_size: int
    overrides: tuple[str, ...] = ()
    """Settings that the command line changed; ``config`` has them already."""
    chain_length: int = 1
    """Jobs that follow each other."""

    def describe(self) -> dict[str, Any]:
        """The content of ``submission.json``: the supervisor reads ``run_dir`` and ``kind``, the rest is for people."""
        return {
            "run_dir": str(self.run_dir),
            "kind": self.kind,
            "chain_length": self.chain_length,
            "world_size": self.world_size,
            "overrides": [redact_override(text) for text in self.overrides],
            "created": time.time(),
        }


SCRIPT = "script.sbatch"
"""Name of the script of a submission that has one."""


def log_folder(run_dir: Path) -> Path:
    """Directory of the jobs' own output, which SLURM does not make."""
    return launch_dir(run_dir) / "logs"


def write_submission(submission: Submission, folder: Path, files: Mapping[str, str]) -> None:
    """Keep a submission in ``folder``: settings, cluster, and ``files`` by name, such as scripts and records."""
    folder.mkdir(parents=True, exist_ok=True)
    log_folder(submission.run_dir).mkdir(exist_ok=True)
    save_config(submission.config, folder / "config.yaml")
    save_cluster(submission.cluster, folder / "cluster.yaml")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_text(folder / "submission.json", json.dumps(submission.describe(), indent=1) + "\n")


@contextmanager
def claimed(run_dir: Path, folder: Path) -> Iterator[None]:
    """``folder``, made for the body alone. If that fails the folder goes, with the jobs recorded for it, and those of its parents
    that were not there before, from the run's logs up.

    Raises:
        LaunchError: another launch has made it since it was chosen; that one's is left alone.
    """
    above = [log_folder(run_dir), launch_dir(run_dir), run_dir, *run_dir.parents]
    made = [path for path in above if path != folder and not path.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise LaunchError(
            f"{folder} appeared just now: {run_dir} is being launched from elsewhere; see `megamem launch status {run_dir}`"
        ) from None
    try:
        yield
    except BaseException:
        _forget_jobs(run_dir, folder)
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # one that is not empty stays
                path.rmdir()
        raise
    fsync(launch_dir(run_dir))


def _forget_jobs(run_dir: Path, folder: Path) -> None:
    """Take the jobs of a submission out of ``jobs.jsonl``."""
    lines = read_lines(jobs_file(run_dir))
    kept = [line for line in lines if line.get("submission") != folder.name]
    if lines and not kept:
        jobs_file(run_dir).unlink()
    elif kept != lines:
        write_text(jobs_file(run_dir), "".join(json.dumps(line) + "\n" for line in kept))


def ask(script: str, cluster: Cluster) -> str:
    """What SLURM expects of a script, by ``sbatch --test-only``: when and where it would start.

    Raises:
        LaunchError: SLURM would refuse it, or there is no SLURM on this machine.
    """
    result = _sbatch(["--test-only"], script)
    said = result.stderr.strip() or result.stdout.strip()
    if result.returncode and not is_transient(said) and not (lacks_nodes(said) and _nodes_missing(cluster)):
        raise LaunchError(explain(said, cluster))
    return said.removeprefix("sbatch: ")


def _nodes_missing(cluster: Cluster) -> bool:
    partition = cluster.slurm.partition
    which = [f"--partition={partition}"] if partition else []
    everything = set(run("sinfo", "--noheader", "--Node", "--format=%N", *which).split())
    return len(Slurm().available_nodes(partition)) < len(everything)


def submit(
    scripts: Sequence[Path],
    cluster: Cluster,
    record: Callable[[str, str], None],
    *,
    after: Sequence[str] = ("",),
    options: Sequence[str] = (),
) -> list[str]:
    """Hand scripts to sbatch, one after another; the ids of the jobs.

    Several are held until all of them are accepted and recorded, so that none starts of a chain that is then refused.

    Args:
        record: Called with the id of each job and that of the one before, or nothing.
        after: For each script the value of ``--dependency``, in which ``{}`` is the job before; empty for none.
        options: Further options of sbatch.

    Raises:
        LaunchError: one is refused, or accepted but would wait for ever. Those before it are then taken back.
    """
    ids: list[str] = []
    held = len(scripts) > 1
    try:
        for script, dependency in zip(scripts, after, strict=True):
            former = ids[-1] if ids else ""
            depends = [f"--dependency={dependency.format(former)}"] if dependency else []
            hold = ["--hold"] if held else []
            ids.append(_submit_one(script, cluster, [*options, *depends, *hold, "--kill-on-invalid-dep=yes"]))
            record(ids[-1], former)
        for job_id in ids if held else ():
            Slurm().release(job_id)
        _check_may_start(ids[0], cluster, _LOOK_SECONDS if held else 0.0)
    except BaseException as error:
        try:
            Slurm().cancel(ids)
        except LaunchError:
            if isinstance(error, LaunchError):
                raise LaunchError(
                    f"{error}; what was submitted could not be taken back: `scancel {' '.join(ids)}` does"
                ) from None
        raise
    return ids


def _submit_one(script: Path, cluster: Cluster, options: Sequence[str]) -> str:
    result = _sbatch(["--parsable", *options, str(script)])
    if result.returncode:
        raise LaunchError(explain(result.stderr or result.stdout, cluster))
    return result.stdout.strip().partition(";")[0]


def _check_may_start(job_id: str, cluster: Cluster, patience: float) -> None:
    """LaunchError where SLURM says, within ``patience`` seconds, that a job will never start. No answer is no objection."""
    deadline = time.monotonic() + patience
    while True:
        try:
            waiting = [job for job in Slurm().jobs([job_id]) if job.waiting]
        except LaunchError:
            return
        for job in waiting:
            if waits_for_ever(job.reason):
                raise LaunchError(explain(job.reason, cluster))
        if time.monotonic() >= deadline or not any(job.reason in _NOT_LOOKED_AT for job in waiting):
            return
        time.sleep(0.2)


def record_job(run_dir: Path, job_id: str, folder: Path, kind: Kind, name: str, after: str = "") -> None:
    """One line of ``jobs.jsonl``."""
    entry = {
        "time": time.time(),
        "job_id": job_id,
        "submission": folder.name,
        "kind": kind,
        "name": name,
        "after": after,
    }
    append_json(jobs_file(run_dir), entry)


def _sbatch(options: Sequence[str], script: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["sbatch", *options],
            input=script,
            env=scrubbed(os.environ),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError(
            "there is no sbatch here; run this on a login node of the cluster, or use `megamem launch local`"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"sbatch gave no answer in {_SECONDS} s; SLURM's controller may be down, try again later"
        ) from None
