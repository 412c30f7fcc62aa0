"""Bytes that each rank sends in one step over every wire, by formula.

Wires and what counts are those of :mod:`megamem.observe.wire`, which measures the same. With ``x = tokens * hidden_size * w`` the
residual stream of a micro-batch in a context-parallel part, ``w`` bytes per element, and ``u = (tp - 1) / tp * x``::

    tp            4u per attention and feed-forward part without sequence parallelism (an all-reduce each way), 5u with it
                  (gather and reduce-scatter each way, and a second gather for the gradients of weights); 2u per memory of a
                  layer without it (its slices are gathered, and so are their gradients); gradients of replicated parameters
                  that are partial over the group
    pp            x (/ tp under sequence parallelism) forward and backward at every boundary of stages or chunks
    ep            4 (ep - 1) / ep top_k x / tp per layer of experts: there and back, forward and backward (alltoall), and the
                  routing itself
    cp            2 (cp - 1) of a part's keys and values per layer: a gather, and its reduce-scatter in backward
    cp, else tp   what an Engram's convolution sees of the slices before its own, and the loads that balance experts
    dense_reduce  2 (g - 1) / g of all gradients in fp32 over the g replicas, every micro-batch under stage 2
    dense_gather  (g - 1) / g of all parameters, from stage 1 on
    row_exchange  (o - 1) / o of ids, rows, fp32 gradients and patches of the unique rows, o owners

Recompute repeats the forward part. Row numbers are upper bounds, as if no n-gram came twice within a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megamem.memory.spec import TableSpec
from megamem.memory.tiers.base import record_bytes
from megamem.observe.accounting import Work, reads_of
from megamem.observe.wire import sent_bytes
from megamem.parallel.layout import Layout
from megamem_kernels.formats import row_fields
from megamem_launch.config import RunConfig
from megamem_launch.plan.parameters import Parameter

_FP32 = 4
_ID = 4
_COUNT = 8


def plan_traffic(
    config: RunConfig,
    layout: Layout,
    work: Work,
    stage: int,
    specs: Sequence[TableSpec],
    parameters: Sequence[Parameter],
) -> dict[str, float]:
    """Bytes sent per step by a rank of ``stage``, which has these tables and parameters, by wire; wires that carry nothing are
    left out."""
    sent: Counter[str] = Counter()
    for part in (
        _tensor_parallel(config, layout, work, stage, parameters),
        _pipeline(config, layout, work, stage),
        _experts(config, layout, work, stage),
        _context(config, layout, work, stage),
        _slices(config, layout, work, stage),
        _dense(config, layout, work, parameters),
        _rows(config, layout, work, specs),
    ):
        sent.update(part)
    return {wire: nbytes for wire, nbytes in sent.items() if nbytes}


def _stream(config: RunConfig, layout: Layout, work: Work) -> float:
    """Bytes of the residual stream of a micro-batch in one context-parallel part."""
    return work.micro_batch_size * work.seq_length / layout.cp * config.model.hidden_size * work.element_bytes


def _tensor_parallel(
    config: RunConfig, layout: Layout, work: Work, stage: int, parameters: Sequence[Parameter]
) -> dict[str, float]:
    tp = layout.tp
    if tp == 1:
        return {}
    model = config.model
    u = (tp - 1) / tp * _stream(config, layout, work)
    layers = layout.stage_layers(model.num_layers, stage)
    routed = len(set(layers) & set(model.moe.layers))
    parts = 2 * len(layers) - routed + (routed if model.moe.shared_expert_hidden_size else 0)
    forward, both = (2, 5) if work.sequence_parallel else (2, 4)
    passes = both + (forward if work.recompute == "full" else 0)
    total = parts * passes * u
    if not work.sequence_parallel:
        engrams, banks = _memories(config, layers)
        total += (engrams + banks) * (2 if work.recompute == "none" else 3) * u
    small = work.micro_batch_size * work.seq_length / layout.cp * _FP32
    if stage == 0:
        total += 2 * u
    if stage == layout.pp - 1:
        # Input of the logits and its gradient; maximum, target and sum of the softmax.
        total += (3 if work.sequence_parallel else 2) * u + 3 * sent_bytes("all_reduce", small, tp)
    partial = sum(p.elements for p in parameters if not p.split and (work.sequence_parallel or _is_partial(p)))
    shards = layout.dp * layout.cp if config.optimizer.zero_stage else 1
    return {"tp": total * work.micro_batches + sent_bytes("all_reduce", _FP32 * partial / shards, tp)}


def _is_partial(parameter: Parameter) -> bool:
    """Whether its gradient is partial over tensor parallelism even without sequence parallelism."""
    return ".engram." in parameter.name or "q_layernorm" in parameter.name or "k_layernorm" in parameter.name


def _pipeline(config: RunConfig, layout: Layout, work: Work, stage: int) -> dict[str, float]:
    if layout.pp == 1:
        return {}
    x = _stream(config, layout, work) / (layout.tp if work.sequence_parallel else 1)
    chunks = layout.vpp
    forward = chunks - (1 if stage == layout.pp - 1 else 0)
    backward = chunks - (1 if stage == 0 else 0)
    return {"pp": (forward + backward) * x * work.micro_batches}


def _experts(config: RunConfig, layout: Layout, work: Work, stage: int) -> dict[str, float]:
    model, group = config.model, layout.ep * layout.etp
    layers = len(set(layout.stage_layers(model.num_layers, stage)) & set(model.moe.layers))
    if not layers or group == 1:
        return {}
    own = _stream(config, layout, work) / layout.tp  # sequence parallelism is required with tp
    tokens = work.micro_batch_size * work.seq_length / layout.slices
    forward = 2 if work.recompute == "full" else 1
    passes = 2 + 2 * forward
    if model.moe.token_dispatcher == "allgather":
        # Which experts a token goes to, a byte for each expert, and with what weight; that weight's gradient.
        routing = tokens * model.moe.num_experts * (forward * (1 + _FP32) + _FP32)
        each = sent_bytes("all_gather", passes * own + routing, group)
        return {"ep": each * layers * work.micro_batches}
    weights = tokens * _FP32 * (forward + 1)
    routed = (passes * own + weights) * model.moe.router_topk
    counts = forward * sent_bytes("all_gather", _COUNT * model.moe.num_experts, group)
    each = sent_bytes("all_to_all", routed, layout.ep) + sent_bytes("all_gather", routed, layout.etp) + counts
    return {"ep": each * layers * work.micro_batches}


def _context(config: RunConfig, layout: Layout, work: Work, stage: int) -> dict[str, float]:
    if layout.cp == 1:
        return {}
    model = config.model
    tokens = work.micro_batch_size * work.seq_length / layout.cp
    part = tokens * 2 * model.num_query_groups * model.head_dim / layout.tp * work.element_bytes
    layers = len(layout.stage_layers(model.num_layers, stage))
    passes = 2 if work.recompute == "none" else 3
    return {"cp": passes * sent_bytes("all_gather", part, layout.cp) * layers * work.micro_batches}


def _slices(config: RunConfig, layout: Layout, work: Work, stage: int) -> dict[str, float]:
    """Over the ranks that share a sequence, by tensor and context parallelism alike."""
    if layout.slices == 1:
        return {}
    model, engram = config.model, config.memory.engram
    layers = layout.stage_layers(model.num_layers, stage)
    tail = min((engram.conv_kernel_size - 1) * max(engram.orders, default=0), work.seq_length // layout.slices)
    nbytes = work.micro_batch_size * max(0, tail) * model.hidden_size * work.element_bytes
    tails = (2 if work.recompute == "none" else 3) * sent_bytes("all_gather", nbytes, layout.slices)
    loads = 0.0
    if model.moe.router == "softmax_aux_loss":
        loads = sent_bytes("all_reduce", _COUNT * model.moe.num_experts, layout.slices)
    engrams, _ = _memories(config, layers)
    each = engrams * tails + len(set(layers) & set(model.moe.layers)) * loads
    return {"cp" if layout.cp > 1 else "tp": each * work.micro_batches}


def _memories(config: RunConfig, layers: Sequence[int]) -> tuple[int, int]:
    """How many of ``layers`` have an Engram, and how many a bank."""
    engrams = len(set(layers) & set(config.memory.engram.layers))
    bank = config.memory.bank
    return engrams, len(set(layers) & set(bank.layers or layers)) if bank.enabled else 0


def _dense(config: RunConfig, layout: Layout, work: Work, parameters: Sequence[Parameter]) -> dict[str, float]:
    stage = config.optimizer.zero_stage
    dense = sum(p.elements for p in parameters if not p.spread)
    spread = sum(p.elements for p in parameters if p.spread)
    replicas = layout.dp * layout.cp
    expert_replicas = layout.stage_size // (layout.ep * layout.etp)
    times = work.micro_batches if stage == 2 else 1
    width = work.element_bytes if stage == 2 else _FP32
    reduced = sum(
        sent_bytes("all_reduce", width * elements, g) for elements, g in ((dense, replicas), (spread, expert_replicas))
    )
    if layout.pp > 1:
        tied = sum(p.elements for p in parameters if p.copy or _is_tied(p, config))
        reduced += sent_bytes("all_reduce", _FP32 * tied, 2)
    gathered = 0.0
    if stage:
        for elements, g in ((dense, replicas), (spread, expert_replicas)):
            gathered += sent_bytes("all_gather", work.element_bytes * elements / g, g)
    return {"dense_reduce": times * reduced, "dense_gather": gathered}


def _is_tied(parameter: Parameter, config: RunConfig) -> bool:
    return parameter.name.startswith("embedding.") and not config.model.untie_embeddings_and_output_weights


def _rows(config: RunConfig, layout: Layout, work: Work, specs: Sequence[TableSpec]) -> dict[str, float]:
    owners, memory = layout.stage_size, config.memory
    total = 0.0
    for spec in specs:
        rows = min(reads_of(spec.name, work, memory, layout), spec.rows)
        record = record_bytes(row_fields(memory.storage_of(spec.name).format, spec.width))
        total += rows * (_ID + record + _FP32 * spec.width)
    return {"row_exchange": sent_bytes("all_to_all", total, owners)}
