"""``megamem data prepare`` by an array of jobs: the tokenizer, a share for each task, and the merge, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamem.errors import ConfigError, LaunchError
from megamem_launch.cluster import Cluster
from megamem_launch.config import RunConfig
from megamem_launch.slurm.capture import CODE, records
from megamem_launch.slurm.render import Script, interpreter, render
from megamem_launch.slurm.submit import (
    Submission,
    ask,
    log_folder,
    next_folder,
    record_job,
    submit_in_order,
    undone_on_failure,
    write_submission,
)
from megamem_launch.slurm.training import Submitted, check_no_jobs, job_name


def data_scripts(config: RunConfig, cluster: Cluster, root: Path, folder: Path, shards: int) -> dict[str, Script]:
    """The jobs that prepare ``config.data``, by the name of their script in ``folder``, in the order in which they run."""
    data = (interpreter(cluster), "-m", "megamem.cli", "data")
    settings = str(folder / "config.yaml")

    def script(comment: str, *command: str, tasks: Sequence[str] = ()) -> Script:
        return Script(
            name=job_name(root),
            comment=("Written by `megamem launch data`.", comment),
            workdir=Path.cwd(),
            logs=log_folder(root),
            command=(*data, *command),
            tasks=tuple(tasks),
            nodes=1,
            supervised=False,
        )

    scripts = {}
    if not config.data.tokenizer.model:
        scripts["tokenizer"] = script("First of three: trains the tokenizer.", "tokenizer", settings)
    shares = [f"{number}/{shards}" for number in range(1, shards + 1)]
    scripts["shards"] = script(
        "Each task encodes its share of the sources.", "prepare", settings, "--shard", tasks=shares
    )
    scripts["merge"] = script("Last: merges the shares and clusters the documents.", "merge", settings)
    return scripts


def launch_data(
    config: RunConfig, overrides: Sequence[str], cluster: Cluster, *, shards: int, dry_run: bool = False
) -> Submitted:
    """Check and submit the preparation of ``config.data`` in ``shards`` shares; scripts and logs are kept in ``PATH.parts``.

    Raises:
        MegamemError: no sources or no path, data that is there already, jobs that prepare it already, or SLURM refuses.
            Nothing is then submitted.
    """
    if shards < 1:
        raise ConfigError(f"--shards is {shards}; set the number of shares, 1 or more")
    if not config.data.path or not config.data.sources:
        raise ConfigError("data.path and data.sources must both be set; name the sources and where the result goes")
    path = Path(config.data.path).absolute()
    if path.exists():
        raise LaunchError(f"{path} exists already; train with it, delete it, or set another data.path")
    root = path.with_name(path.name + ".parts")
    check_no_jobs(root)
    folder = next_folder(root)
    scripts = data_scripts(config, cluster, root, folder, shards)
    texts = {f"{name}.sbatch": render(cluster, script) for name, script in scripts.items()}
    answer = ask(texts["shards.sbatch"], cluster)
    if dry_run:
        return Submitted(job_ids=[], run_dir=root, script="\n".join(texts.values()), answer=answer, notes=[])
    submission = Submission(
        run_dir=root, config=config, cluster=cluster, kind="data", world_size=1, overrides=tuple(overrides)
    )
    after = [""] + ["afterok:{}"] * (len(texts) - 1)
    with undone_on_failure(root, folder):
        write_submission(submission, folder, {**texts, **records(CODE)})
        ids = submit_in_order([folder / name for name in texts], cluster, after)
    for job_id, former in zip(ids, ["", *ids], strict=False):
        record_job(root, job_id, folder, "data", job_name(root), former)
    return Submitted(job_ids=ids, run_dir=root, script="", answer=answer, notes=[])
