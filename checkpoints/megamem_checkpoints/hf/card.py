"""The model card of an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megamem_checkpoints.hf.plan import ExportPlan

_PACKED = (
    ", or packed ones with `position_ids` that start again, which transformers keeps apart without a cache "
    "(`use_cache=False`) and without an attention mask"
)


def model_card(meta: Mapping[str, Any], report: Mapping[str, Any], plan: ExportPlan, *, license: str) -> str:
    """``README.md`` of an export: how to load it, its shape, what it was trained on and how far.

    Args:
        meta: Of the checkpoint: ``config``, ``tokens_seen``, ``final_losses``.
        report: Of the export: ``step``, ``dtype``, ``parameters``, ``memory_parameters``, ``dropped``.
        plan: What was written.
        license: Identifier, or empty.
    """
    config = meta["config"]
    name = str(config.get("name") or "megamem model")
    front = [
        "---",
        *([f"license: {license}"] if license else ["license: other", "license_name: unspecified"]),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [megamem{', custom_code' if plan.code else ''}]",
        "---",
    ]
    sections = [
        "\n".join(front),
        f"# {name}",
        "A decoder language model pretrained with megamem." + _memories(config),
        _loading(plan, trained=report["step"] > 0),
        "\n".join(f"- {note}" for note in plan.notes),
        "## Model\n\n" + _table(_shape(config, report)),
        "## Training\n\n" + _table(_training(meta, report)),
        _sources(config),
        _dropped(report["dropped"]),
        "## Limits\n\nA pretrained model without instruction or safety training: it continues text. It was trained on documents "
        f"that do not see each other: give it one per sequence{_PACKED if plan.packs else ''}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _memories(config: Mapping[str, Any]) -> str:
    engram, bank = config["memory"]["engram"], config["memory"]["bank"]
    parts = []
    if engram["layers"]:
        parts.append("tables of hashed n-grams (Engram, arXiv 2601.07372)")
    if any(bank["units"]):
        parts.append("feed-forward blocks fetched by document (hierarchical memories, arXiv 2510.02375)")
    return f" Part of its capacity is parametric memory: {' and '.join(parts)}." if parts else ""


def _loading(plan: ExportPlan, *, trained: bool) -> str:
    remote = ", trust_remote_code=True" if plan.code else ""
    bank = plan.code and any(plan.config.bank_units)
    front = ", add_special_tokens=False" if trained else ""  # documents of training have no token in front
    route = 'inputs["memory_paths"] = model.route(inputs.input_ids)  # without it: the generic memory\n' if bank else ""
    sentence = (
        f"The modelling code is in this directory, hence `trust_remote_code=True`.{_placement(plan)}"
        if plan.code
        else f"A `{plan.model_type}` model of transformers: it needs no code of its own."
    )
    return (
        f"## Use\n\n{sentence}\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'path = "."  # this directory\n'
        f"tokenizer = AutoTokenizer.from_pretrained(path{remote})\n"
        f"model = AutoModelForCausalLM.from_pretrained(path{remote})\n"
        f'inputs = tokenizer("Once upon a time"{front}, return_tensors="pt")\n'
        f"{route}"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))\n"
        "```"
    )


def _placement(plan: ExportPlan) -> str:
    if not (plan.config.engram_layers or any(plan.config.bank_units)):
        return ""
    return (
        ' With `table_placement="cpu"` or `"disk"` as an argument of `from_pretrained`, the memory tables stay in host '
        "memory or in the weight files, whatever device the rest is on, and the rows that a prompt needs are read from there."
    )


def _dropped(dropped: Mapping[str, str]) -> str:
    if not dropped:
        return ""
    lines = [f"- `{name}`: {reason}" for name, reason in sorted(dropped.items())]
    return "## Left out\n\nTensors of the trained model that this form of it has no place for:\n\n" + "\n".join(lines)


def _shape(config: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, engram, bank = config["model"], config["memory"]["engram"], config["memory"]["bank"]
    moe = model["moe"]
    rows = [
        ("parameters", f"{report['parameters']:,}, of which in memory tables {report['memory_parameters']:,}"),
        ("weights", str(report["dtype"])),
        ("layers, hidden size", f"{model['num_layers']}, {model['hidden_size']}"),
        ("attention", f"{model['num_attention_heads']} heads, {model['num_query_groups']} key/value heads, RoPE"),
        ("vocabulary, context", f"{model['vocab_size']:,}, {config['data']['seq_length']:,} tokens"),
    ]
    if moe["layers"]:
        rows.append(
            (
                "experts",
                f"{moe['num_experts']} in layers {moe['layers']}, {moe['router_topk']} per token ({moe['router']})",
            )
        )
    if engram["layers"]:
        rows.append(
            (
                "Engram",
                f"layers {engram['layers']}, orders {engram['orders']}, {engram['heads']} heads of at least "
                f"{engram['rows_per_head']:,} rows of width {engram['width']}",
            )
        )
    if any(bank["units"]):
        rows.append(("bank", f"{bank['units']} hidden units per level, branching {bank['branching']}"))
    return rows


def _training(meta: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, optimizer = meta["config"]["train"], meta["config"]["optimizer"]
    rows = [
        ("optimizer steps", f"{report['step']:,} of {train['steps']:,}"),
        ("tokens seen", f"{meta['tokens_seen']:,}"),
        ("batch", f"{train['global_batch_size']} sequences of {meta['config']['data']['seq_length']} tokens"),
        ("peak learning rate", f"{optimizer['lr']:g}, schedule {optimizer['schedule']}"),
    ]
    return rows + [(f"validation loss ({name})", f"{loss:.4f}") for name, loss in meta["final_losses"].items()]


def _sources(config: Mapping[str, Any]) -> str:
    sources = config["data"].get("sources") or []
    if not sources:
        return ""
    lines = [
        f"- `{source['kind']}`{' ' + json.dumps(source['path']) if source.get('path') else ''}" for source in sources
    ]
    return "## Data\n\n" + "\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
