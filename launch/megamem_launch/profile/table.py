"""A profile as tables: the same rows for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megamem.observe.allocations import KINDS
from megamem.observe.phases import NAMES
from megamem.observe.progress import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Sheet:
    """Named columns and rows of text; the first column is left-aligned, the others right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def headlines(profile: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and note of the most important numbers."""
    flops, step = profile["flops"], profile["step_seconds"]
    ranks = f"{profile['world_size']} rank{'s' * (profile['world_size'] > 1)}"
    result = [
        ("throughput", f"{format_count(profile['tokens_per_second'])} tok/s", ranks),
        (
            "step",
            f"{step['mean'] * 1e3:.4g} ms",
            f"median {step['median'] * 1e3:.4g}, least {step['min'] * 1e3:.4g} ms",
        ),
        ("model FLOP/s", f"{format_count(flops['per_rank_per_second'])} per rank", "attention's causal half"),
    ]
    if "mfu" in flops:
        note = f"of {flops['peak_tflops']:g} TFLOP/s ({flops['peak_source']})"
        result.append(("MFU", f"{flops['mfu']:.1%}", note))
    held = max(profile["memory"]["held_bytes"])
    result.append(("peak memory", format_bytes(held), "most of any rank"))
    if profile["layout"]["pp"] > 1:
        worst = max(profile["bubble"], key=lambda rank: rank["share_of_step"])
        note = f"{worst['over_compute']:.2f} of compute; schedule alone {worst['formula']:.2f}"
        result.append(("pipeline wait", f"{worst['share_of_step']:.1%} of the step", note))
    return result


def sheets(profile: Mapping[str, Any]) -> list[Sheet]:
    """Everything else: time, wires, memory, FLOPs."""
    return [breakdown_sheet(profile), wire_sheet(profile), memory_sheet(profile), flops_sheet(profile)]


def breakdown_sheet(profile: Mapping[str, Any]) -> Sheet:
    """Milliseconds per step and share of it by phase: the mean of all ranks, the least and the most."""
    ranks = profile["breakdown"]["ranks"]
    step = sum(profile["breakdown"]["step_seconds"]) / len(ranks)
    rows = []
    for name in NAMES:
        seconds = [rank.get(name, 0.0) for rank in ranks]
        if any(seconds):
            mean = sum(seconds) / len(seconds)
            rows.append([name, *(f"{s * 1e3:.2f}" for s in (mean, min(seconds), max(seconds))), f"{mean / step:.1%}"])
    off = max(abs(ratio - 1) for ratio in profile["breakdown"]["sum_over_step"])
    note = f"The phases add up to {step * 1e3:.4g} ms per step within {off:.2%}."
    if checkpoint := profile["checkpoint"]:
        note += f" A checkpoint makes training wait {checkpoint['blocked_seconds'] * 1e3:.4g} ms and takes "
        note += f"{checkpoint['total_seconds'] * 1e3:.4g} ms."
    return Sheet("time", ["phase", "mean ms", "least", "most", "of the step"], rows, note)


def wire_sheet(profile: Mapping[str, Any]) -> Sheet:
    """Bytes that a rank sends per step by wire and operation."""
    rows = []
    for wire, traffic in profile["wires"].items():
        for i, (name, operation) in enumerate(traffic["operations"].items()):
            most = format_bytes(traffic["max_bytes"]) if i == 0 else ""
            rows.append(
                [wire if i == 0 else "", name, f"{operation['calls']:g}", format_bytes(operation["bytes"]), most]
            )
    note = "What one rank sends per step, as an algorithm that sends as little as possible would."
    if not rows:
        note = "One rank sends nothing."
    return Sheet("wires", ["wire", "operation", "calls", "mean of ranks", "most of any"], rows, note)


def memory_sheet(profile: Mapping[str, Any]) -> Sheet:
    """Peak memory by kind: rank 0 and the most of any rank."""
    memory = profile["memory"]
    own, most = memory["ranks"][0], memory["largest"]
    rows = [[kind, format_bytes(own.get(kind, 0)), format_bytes(most[kind])] for kind in KINDS if kind in most]
    rows.append(["total", format_bytes(memory["held_bytes"][0]), format_bytes(max(memory["held_bytes"]))])
    where = next((phase for phase in memory["reached_in"] if phase), "")
    note = (
        f"At the peak, which rank 0 reaches in {where}."
        if where
        else "Without a trace, what is allocated all the time."
    )
    return Sheet("memory", ["kind", "rank 0", "most of any"], rows, note)


def flops_sheet(profile: Mapping[str, Any]) -> Sheet:
    """FLOPs of a token by part."""
    flops = profile["flops"]
    parts = flops["forward_per_token"]
    forward = sum(parts.values())
    rows = [[part, format_count(count), f"{count / forward:.1%}"] for part, count in parts.items()]
    rows.append(["forward", format_count(forward), ""])
    rows.append(["training (3 x forward)", format_count(flops["training_per_token"]), ""])
    if flops["recompute_per_token"]:
        rows.append(["recompute, not counted in MFU", format_count(flops["recompute_per_token"]), ""])
    return Sheet("FLOPs per token", ["part", "FLOP", "of forward"], rows)


def render(sheet: Sheet) -> Table:
    """For the terminal."""
    from rich.table import Table

    table = Table(title=sheet.title, title_justify="left", caption=sheet.note or None, caption_justify="left", box=None)
    for i, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in sheet.rows:
        table.add_row(*row)
    return table
