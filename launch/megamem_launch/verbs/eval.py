"""``megamem eval``: perplexity and tasks, of a run or of an export."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megamem.errors import CheckpointError, ConfigError, MegamemError
from megamem_launch.verbs.parse import parse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from megamem_launch.evaluate import Document


@dataclass
class Arguments:
    """Evaluate a run or an export: perplexity of held-out documents or of your files, and lm-evaluation-harness tasks.

    A run is first exported to a temporary directory, so that what is measured is the model that others load. Without
    --text and --tasks, the perplexity of the validation documents of the run's prepared data is measured. Results are
    printed, written as JSON, and for a run sent to its MLflow run.

    Examples:
      megamem eval runs/quickstart
      megamem eval runs/quickstart/huggingface --text book.txt notes.md
      megamem eval runs/quickstart --tasks my_task --include tasks/
      megamem eval exports/big --tasks arc_easy hellaswag --limit 100 --batch-size 8
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|OUT")]
    """Directory of a run, a checkpoint, or a directory that `megamem export` wrote."""
    text: list[Path] | None = None
    """Text files, each one document, whose perplexity is measured."""
    data: Path | None = None
    """Prepared data whose validation documents are measured; a run's own by default."""
    documents: int = 64
    """Validation documents at most; 0 for all."""
    tasks: list[str] | None = None
    """Tasks of the lm-evaluation-harness (`pip install 'megamem[eval]'`)."""
    include: Path | None = None
    """Directory of task files (YAML) beside the harness's own; their data may be local, so that no network is needed."""
    few_shot: int | None = None
    """Examples before each question; the task's own number by default."""
    limit: int | None = None
    """Questions per task; all by default."""
    batch_size: int = 8
    """Sequences per forward pass of tasks."""
    memory: Literal["routed", "generic"] = "routed"
    """Which blocks of a memory bank are read: those of each text, where the export can tell, or the generic one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights; auto is what the export has."""
    tables: Literal["device", "cpu", "disk"] = "disk"
    """Where memory tables are kept: with the model, in host memory, or in their files, of which the rows that a text needs are
    read."""
    output: Path | None = None
    """JSON file of the results; by default RUN/eval/<step>.json, or OUT/eval.json."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, argv, "eval")
    _check(arguments)
    os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
    import torch

    from megamem_launch import evaluate
    from megamem_launch.exported import open_model

    if arguments.tasks:
        evaluate.require_harness()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _export(arguments) as (folder, run, step, data):
        model, tokenizer = open_model(folder, device=device, dtype=arguments.dtype, tables=arguments.tables)
        routed = arguments.memory == "routed" and evaluate.routes(model)
        results: dict[str, Any] = {
            "model": str(arguments.model),
            "step": step,
            "time": time.time(),
            "memory": "routed" if routed else "generic",
        }
        metrics: dict[str, float] = {}
        texts: dict[str, Iterable[Document]] = {str(path): [_encode(tokenizer, path)] for path in arguments.text or ()}
        if arguments.data or not (texts or arguments.tasks):
            texts["validation"] = _validation(arguments.data or data, arguments.documents)
        window = _window(folder, model)
        results["perplexity"] = {
            name: evaluate.perplexity(model, documents, window=window, routed=routed)
            for name, documents in texts.items()
        }
        for name, measured in results["perplexity"].items():
            metrics |= {f"{name}/{key}": measured[key] for key in ("loss", "perplexity")}
        if arguments.tasks:
            results["tasks"] = evaluate.harness(
                model,
                tokenizer,
                arguments.tasks,
                include=arguments.include,
                batch_size=arguments.batch_size,
                window=window,
                few_shot=arguments.few_shot,
                limit=arguments.limit,
                routed=routed,
            )
            metrics |= {
                f"{task}/{key}": value for task, found in results["tasks"].items() for key, value in found.items()
            }
    _show(results)
    print(f"results: {_write(arguments, run, step, results)}")
    if run is not None and metrics:
        _track(run, step, metrics)
    return 0


def _check(arguments: Arguments) -> None:
    """ConfigError for what can be seen without opening the model."""
    if not arguments.model.is_dir():
        raise ConfigError(f"{arguments.model} is no directory; name a run, a checkpoint or an export")
    for path in arguments.text or ():
        if not path.is_file():
            raise ConfigError(f"--text names {path}, which is no file")
    if arguments.include is not None and not arguments.include.is_dir():
        raise ConfigError(f"--include names {arguments.include}, which is no directory")
    if arguments.include is not None and not arguments.tasks:
        raise ConfigError("--include is given without --tasks; name the tasks to run")
    for name in ("batch_size", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; set at least 1")
    if arguments.documents < 0 or (arguments.few_shot or 0) < 0:
        raise ConfigError("--documents and --few-shot take 0 or more")


@contextlib.contextmanager
def _export(arguments: Arguments) -> Iterator[tuple[Path, Path | None, int | None, Path | None]]:
    """An export to open; of a run also its directory, the step of its checkpoint and its prepared data."""
    if (arguments.model / "config.json").is_file():
        from megamem_checkpoints.hf.verify import REPORT, check_files

        report = arguments.model / REPORT
        if report.is_file():  # any other directory that transformers opens has nothing to be compared with
            check_files(arguments.model)
        step = json.loads(report.read_text(encoding="utf-8"))["step"] if report.is_file() else None
        yield arguments.model, None, step, None
        return
    from megamem_checkpoints.directory import find_checkpoint
    from megamem_checkpoints.hf.export import export_checkpoint
    from megamem_checkpoints.hf.tokenizer import find_tokenizer
    from megamem_checkpoints.reader import CheckpointReader

    checkpoint = find_checkpoint(arguments.model)
    reader = CheckpointReader(checkpoint)
    reader.verify()
    path = reader.meta["config"]["data"]["path"]
    data = arguments.data or (Path(path) if path else None)
    with tempfile.TemporaryDirectory(prefix=".eval-", dir=checkpoint.parent.parent) as scratch:
        folder = Path(scratch) / "export"
        export_checkpoint(
            reader,
            folder,
            origin=str(checkpoint),
            tokenizer_model=find_tokenizer(reader.meta["config"], arguments.data),
            clusters=None if data is None else data / "clusters.safetensors",
            verify=False,
        )
        yield folder, checkpoint.parent.parent, reader.step, data


def _window(folder: Path, model: Any) -> int:
    """The length of the training sequences, where the export says so: an imported model may be made for far longer ones."""
    from megamem_checkpoints.hf.verify import REPORT

    report = json.loads((folder / REPORT).read_text(encoding="utf-8")) if (folder / REPORT).is_file() else {}
    return report.get("seq_length", model.config.max_position_embeddings)


def _encode(tokenizer: Any, path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text names {path}, which cannot be read as UTF-8 text ({error})") from None
    return [*tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids, tokenizer.eos_token_id]


def _validation(data: Path | None, limit: int) -> Iterator[Document]:
    """Token ids of validation documents."""
    from megamem_data.prepared import PreparedData

    if data is None:
        raise ConfigError(
            "the model brings no documents of its own; name texts with --text, or prepared data with --data"
        )
    prepared = PreparedData.open(data)
    wanted = prepared.documents("validation")
    wanted = wanted[:limit] if limit else wanted
    if not len(wanted):
        raise ConfigError(f"{data} holds no validation documents; name texts with --text")
    chosen, number = set(wanted.tolist()), 0
    for shard in prepared.shards:
        start = 0
        for length in shard.lengths.tolist():
            if number in chosen:
                yield shard.tokens[start : start + length].astype("int64")
            start, number = start + length, number + 1


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in ("", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, found in {**results["perplexity"], **results.get("tasks", {})}.items():
        for key, value in found.items():
            shown = f"{value:,.0f}" if key in ("tokens", "documents") else f"{value:.4f}"
            table.add_row(name, key, shown)
            name = ""
    Console().print(table)


def _write(arguments: Arguments, run: Path | None, step: int | None, results: dict[str, Any]) -> Path:
    from megamem.files import write_text

    default = arguments.model / "eval.json" if run is None else run / "eval" / f"step_{step:08d}.json"
    path = arguments.output or default
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")
    return path


def _track(run: Path, step: int | None, metrics: dict[str, float]) -> None:
    """Add the numbers to the run's MLflow run, unless training still writes there."""
    from megamem.observe.tracking import add_metrics
    from megamem_checkpoints.files import writer_lock
    from megamem_launch.config import load_config

    if not (run / "journal.jsonl").is_file() or not load_config(run).tracking.mlflow:  # an imported run has no journal
        return
    try:
        with writer_lock(run, doing="training"):
            add_metrics(run, step or 0, {f"eval_tasks/{name}": value for name, value in metrics.items()})
    except CheckpointError:
        print("MLflow gets nothing: the run is still training; evaluate it again when it has ended", file=sys.stderr)
    except MegamemError as error:  # the numbers are printed and on disk
        print(f"MLflow gets nothing: {error}", file=sys.stderr)
