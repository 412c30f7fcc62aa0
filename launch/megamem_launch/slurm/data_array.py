"""``megamem data prepare`` by an array of jobs: the tokenizer, a share for each task, and the merge, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamem.errors import ConfigError, LaunchError
from megamem_data.sources import list_files
from megamem_launch.cluster import Cluster
from megamem_launch.config import RunConfig
from megamem_launch.rundir import next_submission_folder
from megamem_launch.slurm.capture import CODE, records
from megamem_launch.slurm.render import Script, interpreter, render
from megamem_launch.slurm.shared import local_notes
from megamem_launch.slurm.submit import (
    Submission,
    ask,
    claimed,
    log_folder,
    record_job,
    submit,
    write_submission,
)
from megamem_launch.slurm.training import Submitted, check_no_jobs, check_no_secrets, job_name, opened


def data_scripts(
    config: RunConfig, cluster: Cluster, root: Path, folder: Path, shards: int, *, strict: bool = False
) -> dict[str, Script]:
    """The jobs that prepare ``config.data``, by the name of their script in ``folder``, in the order in which they run."""
    data = (interpreter(cluster), "-m", "megamem.cli", "data")
    settings = str(folder / "config.yaml")

    def script(comment: str, *command: str, tasks: Sequence[str] = ()) -> Script:
        return Script(
            name=job_name(root),
            comment=("Written by `megamem launch data`.", comment),
            workdir=Path.cwd(),
            logs=log_folder(root),
            command=(*data, *command[:2], *(["--strict"] if strict else []), *command[2:]),
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
    config: RunConfig,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    shards: int,
    strict: bool = False,
    dry_run: bool = False,
) -> Submitted:
    """Check and submit the preparation of ``config.data`` in ``shards`` shares; scripts and logs are kept in ``PATH.parts``.

    Raises:
        MegamemError: no sources or no path, sources without files or with fewer than shares, data that is there already, jobs that
            prepare it already, or SLURM refuses. Nothing is then submitted.
    """
    if shards < 1:
        raise ConfigError(f"--shards is {shards}; set the number of shares, 1 or more")
    if not config.data.path or not config.data.sources:
        raise ConfigError("data.path and data.sources must both be set; name the sources and where the result goes")
    check_no_secrets(config)
    _check_sources(config, shards)
    path = Path(config.data.path).absolute()
    if path.exists():
        raise LaunchError(f"{path} exists already; train with it, delete it, or set another data.path")
    root = path.with_name(path.name + ".parts")
    check_no_jobs(root)
    folder = next_submission_folder(root)
    scripts = data_scripts(config, cluster, root, folder, shards, strict=strict)
    texts = {f"{name}.sbatch": render(cluster, script) for name, script in scripts.items()}
    answer = ask(texts["shards.sbatch"], cluster)
    notes = local_notes("data.path", root)
    if dry_run:
        return Submitted(job_ids=[], run_dir=root, script="\n".join(texts.values()), answer=answer, notes=notes)
    submission = Submission(
        run_dir=root, config=config, cluster=cluster, kind="data", world_size=1, overrides=tuple(overrides)
    )
    after = [""] + ["afterok:{}"] * (len(texts) - 1)

    def record(job_id: str, former: str) -> None:
        record_job(root, job_id, folder, "data", job_name(root), former)

    with claimed(root, folder), opened(root):
        write_submission(submission, folder, {**texts, **records(CODE)})
        ids = submit([folder / name for name in texts], cluster, record, after=after)
    return Submitted(job_ids=ids, run_dir=root, script="", answer=answer, notes=notes)


def _check_sources(config: RunConfig, shards: int) -> None:
    """What the jobs would find out only when they run: sources that are not there, and more shares than there are files."""
    model = config.data.tokenizer.model
    if model and not Path(model).expanduser().exists():
        raise ConfigError(f"data.tokenizer.model={model} is not there; set the path of an existing tokenizer")
    pieces = 0
    for number, source in enumerate(config.data.sources):
        files = [] if source.kind == "datasets" else list_files(source, f"data.sources[{number}]")
        pieces += 1 if source.kind == "datasets" or source.max_documents else len(files)
    if shards > pieces:
        raise ConfigError(
            f"--shards is {shards}, but shares are cut between files, and data.sources have {pieces} that can be told apart (a "
            f"dataset, or a source with max_documents, counts as one); set at most {pieces}"
        )
