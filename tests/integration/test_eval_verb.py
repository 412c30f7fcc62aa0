"""``megamem eval``: numbers that can be computed by hand, from a run and from its export, without a network."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megamem.cli import main
from megamem_data.prepared import PreparedData
from megamem_launch.config import load_config
from megamem_launch.exported import open_model
from megamem_launch.harness_model import RoutedModel

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
    model, tokenizer = open_model(export, device="cpu", dtype="auto", tables="cpu")
    routed = memory == "routed"
    right = written = 0
    words, total = 0, 0.0
    for item in QUESTIONS:
        ids = tokenizer(item["question"], return_tensors="pt")
        paths = {"memory_paths": model.route(ids.input_ids)} if routed else {}
        text = tokenizer.decode(
            model.generate(**ids, max_new_tokens=3, do_sample=False, **paths)[0, ids.input_ids.shape[1] :]
        )
        written += text.partition("\n")[0] == item["choices"][item["answer"]].partition("\n")[0]
        scores = [
            likelihood(model, tokenizer, item["question"], choice, routed=routed)[0] for choice in item["choices"]
        ]
        right += scores.index(max(scores)) == item["answer"]
        total += likelihood(model, tokenizer, "", item["question"], routed=routed)[0]
        words += len(item["question"].split())
    assert found["choice"]["acc"] == pytest.approx(right / len(QUESTIONS))
    assert found["spelled"]["exact_match"] == pytest.approx(written / len(QUESTIONS))
    assert found["rolling"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-3)


def test_a_run_is_measured_on_its_validation_documents(run: Path, export: Path, prepared_tiny: Path) -> None:
    assert main(("eval", str(run), "--documents", "3")) == 0
    result = json.loads((run / "eval" / "step_00000004.json").read_text())
    measured = result["perplexity"]["validation"]
    data = PreparedData.open(prepared_tiny)
    model, _ = open_model(export, device="cpu", dtype="auto", tables="cpu")
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


def test_generation_reads_the_blocks_of_its_context(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = open_model(export, device="cpu", dtype="auto", tables="cpu")
    language_model = RoutedModel(model, tokenizer, batch_size=4, window=64, routed=True)
    seen: list[tuple[list[int], list[int]]] = []
    generate = model.generate

    def spy(*args, memory_paths, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.extend(zip(ids.tolist(), memory_paths.tolist(), strict=True))
        return generate(*args, memory_paths=memory_paths, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    texts = [item["question"] for item in QUESTIONS]
    requests = [Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 2}), 0) for text in texts]
    assert len(language_model.generate_until(requests)) == len(texts)
    routes = {tuple(ids): model.route(torch.tensor([ids]))[0].tolist() for ids in map(language_model.tok_encode, texts)}
    assert len(seen) == len(texts)
    for ids, path in seen:
        assert path == next(route for text, route in routes.items() if tuple(ids[-len(text) :]) == text)


def test_windows_of_a_rolling_text_read_the_blocks_of_the_whole_text(export: Path) -> None:
    model, tokenizer = open_model(export, device="cpu", dtype="auto", tables="cpu")
    language_model = RoutedModel(
        model, tokenizer, batch_size=2, window=model.config.max_position_embeddings, routed=True
    )
    text = "\n".join(item["question"] for item in QUESTIONS) * 8
    ids = language_model.tok_encode(text)
    window = model.config.max_position_embeddings
    assert len(ids) > 2 * window
    path = model.route(torch.tensor([ids]))
    measured = language_model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])[0]
    total = 0.0
    for context, target in map(make_disjoint_window, get_rolling_token_windows(ids, tokenizer.eos_token_id, window, 1)):
        piece = torch.tensor([[*context, *target]])
        with torch.no_grad():
            scores = model(piece[:, :-1], use_cache=False, memory_paths=path).logits[0].log_softmax(-1)
        total += float(scores[-len(target) :].gather(1, torch.tensor(target)[:, None]).sum())
    assert measured == pytest.approx(total, rel=1e-4)


def test_damaged_weights_are_not_measured(
    run: Path, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = {"export": export, "checkpoint": run / "checkpoints" / "step_00000004"}
    for name, source in copies.items():
        copy = shutil.copytree(source, tmp_path / name)
        weights = max(copy.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        content = bytearray(weights.read_bytes())
        content[-100] ^= 64
        weights.write_bytes(content)
        assert main(("eval", str(copy), "--documents", "1", "--text", __file__)) == 2
        assert weights.name in capsys.readouterr().err


def test_results_reach_the_tracked_run(run: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    text = tmp_path / "some text.txt"
    text.write_text("import os\n" * 20)
    assert (
        main(("eval", str(run), "--documents", "1", "--text", str(text), "--data", str(load_config(run).data.path)))
        == 0
    )
    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent.resolve() / 'mlflow.db'}")
    tracked = client.get_run((run / "mlflow_run_id").read_text().strip())
    result = json.loads((run / "eval" / "step_00000004.json").read_text())
    assert tracked.data.metrics["eval_tasks/validation/loss"] == result["perplexity"]["validation"]["loss"]
    assert tracked.data.metrics[f"eval_tasks{text}/loss"] == result["perplexity"][str(text)]["loss"]
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
