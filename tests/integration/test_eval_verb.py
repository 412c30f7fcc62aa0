"""``megamem eval``: numbers that can be computed by hand, from a run and from its export, without a network."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamem.cli import main
from megamem_data.prepared import PreparedData
from megamem_launch.evaluate import open_model

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
QUESTIONS = [
    {"question": "import os\nimport", "choices": [" sys\n", " )))("], "answer": 0},
    {"question": "def read(self):\n    return self", "choices": ["\n\n\n", ".read()"], "answer": 1},
    {"question": "for i in range(", "choices": ["10):", "class"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
target_delimiter: ""
output_type: {kind}
doc_to_text: "{text}"
{rest}
"""


@pytest.fixture(scope="module")
def run(prepared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    settings = [f"runs_dir={folder}", f"data.path={prepared_tiny}", "name=r", "train.steps=4", "train.eval_batches=0"]
    command = [sys.executable, "-m", "megamem.cli", "train", str(TINY), *settings, "train.precision=fp32"]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return folder / "r"


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    assert main(("export", str(run), str(run / "export"))) == 0
    return run / "export"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    choice = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]'
    spelled = 'doc_to_target: "{{choices[answer]}}"\nmetric_list: [{metric: exact_match}]\n'
    spelled += 'generation_kwargs: {until: ["\\n"], max_gen_toks: 3}'
    rolling = 'doc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}]'
    for name, kind, text, rest in (
        ("choice", "multiple_choice", "{{question}}", choice),
        ("spelled", "generate_until", "{{question}}", spelled),
        ("rolling", "loglikelihood_rolling", "", rolling),
    ):
        path = tmp_path / "tasks" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(TASK.format(name=name, questions=questions, kind=kind, text=text, rest=rest))
    return tmp_path / "tasks"


def likelihood(model, tokenizer, context: str, answer: str, *, routed: bool) -> tuple[float, int]:
    """Log-probability and tokens of an answer by one plain forward pass."""
    ids = tokenizer(context + answer, add_special_tokens=False).input_ids
    known = len(tokenizer(context, add_special_tokens=False).input_ids) if context else 0
    ids, known = ([tokenizer.eos_token_id, *ids], 1) if not known else (ids, known)
    told = ids[:known] if known > 1 else ids
    memory = {"memory_paths": model.route(torch.tensor([told]))} if routed else {}
    with torch.no_grad():
        scores = model(torch.tensor([ids]), use_cache=False, **memory).logits[0].log_softmax(-1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(known, len(ids))), len(ids) - known


@pytest.mark.parametrize("memory", ["routed", "generic"])
def test_tasks_are_scored_as_by_hand(export: Path, tasks: Path, tmp_path: Path, memory: str) -> None:
    output = tmp_path / "result.json"
    names = ["choice", "spelled", "rolling"]
    command = ["eval", str(export), "--tasks", *names, "--include", str(tasks), "--memory", memory]
    assert main((*command, "--output", str(output))) == 0
    found = json.loads(output.read_text())["tasks"]
    model, tokenizer = open_model(export, device="cpu", dtype="auto")
    routed = memory == "routed"
    right = 0
    words, total = 0, 0.0
    for item in QUESTIONS:
        scores = [
            likelihood(model, tokenizer, item["question"], choice, routed=routed)[0] for choice in item["choices"]
        ]
        right += scores.index(max(scores)) == item["answer"]
        total += likelihood(model, tokenizer, "", item["question"], routed=routed)[0]
        words += len(item["question"].split())
    assert found["choice"]["acc"] == pytest.approx(right / len(QUESTIONS))
    assert 0 <= found["spelled"]["exact_match"] <= 1
    assert found["rolling"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-3)


def test_a_run_is_measured_on_its_validation_documents(run: Path, export: Path, prepared_tiny: Path) -> None:
    assert main(("eval", str(run), "--documents", "3")) == 0
    result = json.loads((run / "eval" / "step_00000004.json").read_text())
    measured = result["perplexity"]["validation"]
    data = PreparedData.open(prepared_tiny)
    model, _ = open_model(export, device="cpu", dtype="auto")
    stops = data.lengths.cumsum()
    total, tokens = 0.0, 0
    for number in data.documents("validation")[:3]:
        ids = torch.from_numpy(
            data.shards[0].tokens[stops[number] - data.lengths[number] : stops[number]].astype("int64")
        )
        path = torch.from_numpy(data.document_paths[number].copy())[None]  # where the clustering put it
        window = model.config.max_position_embeddings
        for start in range(0, len(ids) - 1, window):
            piece = ids[start : start + window + 1]
            with torch.no_grad():
                logits = model(piece[None, :-1], use_cache=False, memory_paths=path).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
        tokens += len(ids) - 1
    assert measured["tokens"] == tokens
    assert measured["documents"] == min(3, len(data.documents("validation")))
    assert measured["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert not list(run.glob(".eval-*"))  # the temporary export is gone


def test_results_reach_the_tracked_run(run: Path) -> None:
    from mlflow.tracking import MlflowClient

    assert main(("eval", str(run), "--documents", "1")) == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent.resolve() / 'mlflow.db'}")
    tracked = client.get_run((run / "mlflow_run_id").read_text().strip())
    result = json.loads((run / "eval" / "step_00000004.json").read_text())
    assert tracked.data.metrics["eval_tasks/validation/loss"] == result["perplexity"]["validation"]["loss"]
    assert tracked.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--text", "missing.txt"], "missing.txt, which is no file"),
        (["--tasks", "no_such_task"], "no task no_such_task"),
        (["--include", "."], "without --tasks"),
        (["--include", "nowhere", "--tasks", "x"], "nowhere, which is no directory"),
        (["--tasks", "x", "--limit", "0"], "--limit is 0"),
        ([], "name texts with --text"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    export: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main(("eval", str(export), *arguments)) == 2
    assert named in capsys.readouterr().err
