"""Submission of batch scripts: asked first, then kept with the run, then handed to sbatch. What is refused leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamem.errors import LaunchError
from megamem.files import fsync, write_text
from megamem_launch.cluster import Cluster, save_cluster
from megamem_launch.config import RunConfig, save_config
from megamem_launch.rundir import append_json, jobs_file, launch_dir
from megamem_launch.slurm.client import run
from megamem_launch.slurm.refusal import explain, is_transient, lacks_nodes, waits_for_ever
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.slurm.scrub import scrubbed

Kind = Literal["run", "chain", "sweep", "data"]

_SECONDS = 60


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

    def describe(self, folder: Path) -> dict[str, Any]:
        """The content of ``submission.json``, which the supervisor reads."""
        return {
            "run_dir": str(self.run_dir),
            "config": str(folder / "config.yaml"),
            "overrides": list(self.overrides),
            "cluster": str(folder / "cluster.yaml"),
            "mode": self.cluster.slurm.mode,
            "world_size": self.world_size,
            "ranks_per_node": self.cluster.ranks_per_node,
            "nodes": self.cluster.nodes,
            "kind": self.kind,
            "chain_length": self.chain_length,
            "workdir": str(Path.cwd()),
            "created": time.time(),
        }


def next_folder(run_dir: Path) -> Path:
    """Directory of the next submission of a run; not made."""
    numbers = [int(p.name.removeprefix("submission-")) for p in launch_dir(run_dir).glob("submission-*[0-9]")]
    return launch_dir(run_dir) / f"submission-{max(numbers, default=0) + 1}"


SCRIPT = "script.sbatch"
"""Name of the script of a submission that has one."""


def log_folder(run_dir: Path) -> Path:
    """Directory of the jobs' own output, which SLURM does not make."""
    return launch_dir(run_dir) / "logs"


def write_submission(submission: Submission, folder: Path, files: Mapping[str, str]) -> None:
    """Keep a submission in ``folder``, which is made: settings, cluster, and ``files`` by name, such as scripts and records."""
    folder.mkdir(parents=True)
    log_folder(submission.run_dir).mkdir(exist_ok=True)
    save_config(submission.config, folder / "config.yaml")
    save_cluster(submission.cluster, folder / "cluster.yaml")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_text(folder / "submission.json", json.dumps(submission.describe(folder), indent=1) + "\n")


@contextmanager
def undone_on_failure(run_dir: Path, folder: Path) -> Iterator[None]:
    """If the body fails, ``folder`` goes, and those of its parents that were not there before, from the run's logs up."""
    above = [log_folder(run_dir), launch_dir(run_dir), run_dir, *run_dir.parents]
    made = [path for path in above if not path.exists()]
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    fsync(launch_dir(run_dir))


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


def submit(script: Path, cluster: Cluster, options: Sequence[str] = ()) -> str:
    """Hand a script to sbatch; the id of the job. LaunchError where it is refused, or accepted but would wait for ever."""
    result = _sbatch(["--parsable", *options, str(script)])
    if result.returncode:
        raise LaunchError(explain(result.stderr or result.stdout, cluster))
    job_id = result.stdout.strip().partition(";")[0]
    for job in Slurm().jobs([job_id]):
        if job.waiting and waits_for_ever(job.reason):
            Slurm().cancel([job_id])
            raise LaunchError(explain(job.reason, cluster))
    return job_id


def submit_in_order(scripts: Sequence[Path], cluster: Cluster, after: Sequence[str]) -> list[str]:
    """Submit scripts one after another; the ids. ``after`` holds for each of them the value of ``--dependency``, in which
    ``{}`` is the job before; empty for none. If one is refused, those before it are taken back."""
    ids: list[str] = []
    try:
        for script, dependency in zip(scripts, after, strict=True):
            options = [f"--dependency={dependency.format(ids[-1] if ids else '')}"] if dependency else []
            ids.append(submit(script, cluster, [*options, "--kill-on-invalid-dep=yes"]))
    except BaseException:
        Slurm().cancel(ids)
        raise
    return ids


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
