"""A checkpoint written under one layout loads under another: dense shards, experts, stages and row owners."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamem.errors import CheckpointError
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem.parallel.layout import Layout, owner_range
from megamem.testing.distributed import run_distributed
from megamem_checkpoints.checkpointer import Checkpointer
from megamem_checkpoints.config import CheckpointConfig
from megamem_checkpoints.reader import CheckpointReader
from megamem_kernels.formats import Field

LAYERS, EXPERTS, ROWS = 2, 4, 37
MOMENTS = ("exp_avg", "exp_avg_sq")
FULL = Layout(world_size=4, tp=2, ep=2)
DENSE = {
    "embedding.word_embeddings.weight": ((16, 6), 0),
    "decoder.final_layernorm.weight": ((6,), None),
    **{
        f"decoder.layers.{i}.mlp.linear_fc1.{half}.weight": ((8, 6), 0)
        for i in range(LAYERS)
        for half in ("gate", "up")
    },
    **{f"decoder.layers.{i}.self_attention.linear_proj.weight": ((6, 4), 1) for i in range(LAYERS)},
    **{
        f"decoder.layers.{i}.mlp.experts.{e}.linear_fc2.weight": ((6, 8), 1)
        for i in range(LAYERS)
        for e in range(EXPERTS)
    },
}


@dataclass(frozen=True, eq=False)
class Entry:
    """The shape of ``megamem.models.canonical.CanonicalEntry``."""

    name: str
    tensor: Tensor
    rows: slice
    tp_dim: int | None
    is_copy: bool = False

    @property
    def is_expert(self) -> bool:
        return ".mlp.experts." in self.name


def full_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The one value that ``name`` has under every layout."""
    generator = torch.Generator().manual_seed(sum((i + 1) * byte for i, byte in enumerate(name.encode())))
    return torch.randn(shape, generator=generator)


class ShardedRun:
    """This rank's part of a model of known values, with the checkpointer of ``directory``."""

    def __init__(self, layout: Layout, directory: Path, *, filled: bool) -> None:
        from megamem.parallel import groups

        self.groups = groups.initialize(layout, seed=1)
        self.checkpointer = Checkpointer(directory, CheckpointConfig(), groups=self.groups)
        self.filled = filled
        self.entries: list[Entry] = []
        self.states: dict[int, dict[str, Tensor]] = {}
        where = self.groups.coordinates
        layers = layout.stage_layers(LAYERS, where.pp)
        for name in DENSE:
            if name.startswith("embedding"):
                here = where.pp == 0
            elif name.startswith("decoder.final"):
                here = where.pp == layout.pp - 1
            else:
                here = int(name.split(".")[2]) in layers
            if here and (".experts." not in name or int(name.split(".")[5]) * layout.ep // EXPERTS == where.ep):
                self._add(name)
        self.tables = {
            # Both in the second layer: with two stages the first one has no table.
            name: self._table(name)
            for name in ("decoder.layers.1.engram.table", "decoder.layers.1.bank.level1.table")
            if 1 in layers
        }

    def _add(self, name: str) -> None:
        if name.endswith("linear_fc1.up.weight"):
            return
        halves = [name, name.replace(".gate.", ".up.")] if ".gate." in name else [name]
        tp_dim = DENSE[name][1]
        keys = ("master", *MOMENTS)
        values = {key: torch.cat([self.local(half, key) for half in halves]) for key in keys}
        if not self.filled:
            values = {key: torch.zeros_like(value) for key, value in values.items()}
        parameter = nn.Parameter(values["master"])
        values["master"] = parameter.detach()
        self.states[id(parameter)] = values
        length = len(parameter) // len(halves)
        for i, half in enumerate(halves):
            self.entries.append(Entry(half, parameter, slice(i * length, (i + 1) * length), tp_dim))

    def local(self, name: str, key: str) -> Tensor:
        """What this rank must hold of a state tensor."""
        shape, tp_dim = DENSE[name]
        full = full_tensor(f"{key}.{name}", shape)
        if tp_dim is None:
            return full
        return full.chunk(self.groups.layout.tp, dim=tp_dim)[self.groups.coordinates.tp].contiguous()

    def _table(self, name: str) -> OwnedTable:
        table = OwnedTable.create(
            TableSpec(name, ROWS, 3, (InitSegment(3, 0.0),)),
            owners=self.groups.layout.stage_size,
            owner=self.groups.layout.memory_group(self.groups.coordinates.pp).index(self.groups.coordinates.rank),
            seed=0,
            state_fields=(Field("sum", torch.float32, ()),),
        )
        if self.filled:
            table.write(table.start, self._expected(table))
        return table

    def _expected(self, table: OwnedTable) -> dict[str, Tensor]:
        cut = slice(table.start, table.stop)
        return {
            "rows": full_tensor(table.spec.name, (ROWS, 3))[cut],
            "state.sum": full_tensor(f"state {table.spec.name}", (ROWS,))[cut],
            "state.touched": torch.ones(cut.stop - cut.start, dtype=torch.uint8),
        }

    def save(self, step: int) -> Path:
        return self.checkpointer.save(
            step,
            entries=self.entries,
            state_of=lambda tensor: self.states[id(tensor)],
            tables=self.tables,
            meta={"world": self.groups.layout.world_size},
            rng={"rank": torch.tensor([self.groups.coordinates.rank], dtype=torch.uint8)},
        )

    def load(self, path: Path) -> dict[str, Tensor]:
        def put(tensor: Tensor, state: dict[str, Tensor]) -> None:
            for key, value in state.items():
                self.states[id(tensor)][key].copy_(value)

        return self.checkpointer.load(path, entries=self.entries, put_state=put, tables=self.tables)["rng"]

    def wrong(self) -> list[str]:
        """Names of tensors and tables that are not what they must be."""
        wrong = [
            f"{key}.{entry.name}"
            for entry in self.entries
            for key, value in self.states[id(entry.tensor)].items()
            if not torch.equal(value[entry.rows], self.local(entry.name, key))
        ]
        for name, table in self.tables.items():
            found = table.read(table.start, table.stop)
            wrong += [
                f"{name}.{key}" for key, value in self._expected(table).items() if not torch.equal(found[key], value)
            ]
        return wrong

    def close(self) -> None:
        from megamem.parallel import groups

        groups.destroy()


def save_under(layout: Layout, directory: Path) -> list[str]:
    """Save and read back under the same layout; returns what is wrong."""
    run = ShardedRun(layout, directory, filled=True)
    path = run.save(5)
    run.close()
    return load_under([layout], path)


def load_under(layouts: list[Layout], path: Path) -> list[str]:
    """Load ``path`` under each layout in turn; returns what is wrong in any."""
    wrong = []
    for layout in layouts:
        run = ShardedRun(layout, path.parent, filled=False)
        rng = run.load(path)
        wrong += run.wrong()
        saved_under = CheckpointReader(path).meta["world"]
        if saved_under != layout.world_size and rng:
            wrong.append("random states of another world")
        if saved_under == layout.world_size and int(rng["rank"]) != dist.get_rank():
            wrong.append("random states of another rank")
        run.close()
    return wrong


def save_with_failure(layout: Layout, directory: Path, failing: int, phase: str) -> str:
    """Save step 5, then fail on one rank in step 6; returns what every rank reports."""
    from megamem_checkpoints import dense, rng

    run = ShardedRun(layout, directory, filled=True)
    run.save(5)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if dist.get_rank() == failing:
        if phase == "dense":
            dense._Writer.write_data = full  # type: ignore[assignment, method-assign]
        else:
            rng.write = full
    try:
        run.save(6)
    except CheckpointError as error:
        return str(error)
    return ""


def save_in_background(layout: Layout, directory: Path) -> list[str]:
    """Save in the background while ranks go on differently: full, then as increments on the ranks that changed few rows; then
    fail on one rank. Returns what is wrong."""
    from megamem_checkpoints import rng

    run = ShardedRun(layout, directory, filled=True)
    rank, wrong = dist.get_rank(), []

    def start(step: int) -> None:
        run.checkpointer.start(
            step,
            entries=run.entries,
            state_of=lambda tensor: run.states[id(tensor)],
            tables=run.tables,
            meta={"world": layout.world_size},
        )

    def train(value: float, rows: dict[int, int]) -> None:
        """Change dense state, and the first rows of each table: so many by rank."""
        for states in run.states.values():
            for tensor in states.values():
                tensor.fill_(value)
        for table in run.tables.values():
            chosen = np.arange(min(rows.get(rank, 0), table.stop - table.start))
            table.update(chosen, torch.full((len(chosen), 3), value), set_rows)

    def set_rows(rows: Any, state: Any, gradient: Tensor) -> None:
        rows.fields["rows"][rows.slots] = gradient

    start(1)
    train(2.0, {0: 1, 1: 99})
    for _ in range(20):
        dist.barrier()  # the loop's own collectives go on meanwhile
    start(2)
    train(3.0, {1: 1, 2: 2})
    start(3)
    train(4.0, {0: 5})
    run.checkpointer.wait()
    wrong += [str(outcome) for outcome in run.checkpointer.ended() if outcome.error is not None]

    write = rng.write

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rng.write = full if rank == 1 else write
    start(4)
    rng_error = ""
    try:
        start(5)
    except CheckpointError as error:
        rng_error = str(error)
    if "step 5 was not written" not in rng_error or "No space left on device (rank 1)" not in rng_error:
        wrong.append(f"a second error arrived as {rng_error!r}")
    if run.checkpointer.latest() != directory / "step_00000003":
        wrong.append("the failed save left something behind")
    start(6)
    assert run.checkpointer._running is not None
    if run.checkpointer._running[1].exception() is None:
        wrong.append("the save of step 6 did not fail")
    rng.write = write
    run.checkpointer.config.keep = 3
    start(7)  # goes on, though the one before failed
    outcomes = {outcome.step: outcome.error for outcome in run.checkpointer.ended()}
    if outcomes.pop(7, wrong) is not None or set(outcomes) != {4, 5, 6} or None in outcomes.values():
        wrong.append(f"saves ended as {outcomes}")
    run.checkpointer.close()
    dist.barrier()
    return wrong


def test_background_saves_of_several_ranks(tmp_path: Path) -> None:
    assert run_distributed(save_in_background, 4, FULL, tmp_path) == [[]] * 4
    expected = full_tensor(table := "decoder.layers.1.engram.table", (ROWS, 3))
    cuts = [owner_range(ROWS, 4, owner) for owner in range(4)]
    increments = {2: [0], 3: [0, 1, 2]}
    for step, value, changed in ((2, 2.0, {0: 1, 1: 99}), (3, 3.0, {1: 1, 2: 2})):
        for rank, count in changed.items():
            expected[cuts[rank].start : min(cuts[rank].start + count, cuts[rank].stop)] = value
        reader = CheckpointReader(tmp_path / f"step_{step:08d}")
        reader.verify(threads=2)
        assert torch.equal(reader.rows(table, 0, ROWS), expected)
        record = reader.manifest.tables[table]
        owners = [rank for rank, cut in enumerate(cuts) if any(item.start in cut for item in record.increments)]
        assert owners == increments[step] and len(record.files) == 4
        name = "decoder.final_layernorm.weight"
        assert torch.equal(reader.tensor(name), torch.full((6,), value))


def agree_on(layout: Layout, directory: Path, different: bool) -> str:
    """What every rank reports where rank 1 found another checkpoint, or the same."""
    run = ShardedRun(layout, directory, filled=False)
    try:
        run.checkpointer.agree(directory / "step_00000005" if dist.get_rank() == 0 or not different else None)
    except CheckpointError as error:
        return str(error)
    return ""


def test_ranks_that_see_different_checkpoints_all_say_so(tmp_path: Path) -> None:
    layout = Layout(world_size=2)
    assert run_distributed(agree_on, 2, layout, tmp_path, False) == ["", ""]
    first, second = run_distributed(agree_on, 2, layout, tmp_path, True)
    assert first == second and "ranks see different checkpoints" in first and "none" in first


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four ranks: tensor, data and expert parallel."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    assert run_distributed(save_under, 4, FULL, directory) == [[], [], [], []]
    return directory / "step_00000005"


def test_shards_are_written_once_and_spread_over_all_ranks(saved: Path) -> None:
    reader = CheckpointReader(saved)
    reader.verify()
    assert reader.names() == sorted(DENSE)
    sizes = [reader.manifest.files[name].bytes for name in reader.manifest.files if name.startswith("dense/")]
    payload = 4 * 3 * sum(torch.Size(shape).numel() for shape, _ in DENSE.values())
    assert len(sizes) == 4 and sum(sizes) < payload + 4 * 6000
    for name, (shape, _) in DENSE.items():
        assert torch.equal(reader.tensor(name), full_tensor(f"master.{name}", shape))
        assert {key: value.tolist() for key, value in reader.moments(name).items()} == {
            key: full_tensor(f"{key}.{name}", shape).tolist() for key in MOMENTS
        }
    table = "decoder.layers.1.engram.table"
    assert len(reader.manifest.tables[table].files) == 4
    assert torch.equal(reader.rows(table, 3, 36), full_tensor(table, (ROWS, 3))[3:36])


@pytest.mark.parametrize(
    "layouts",
    [
        [Layout(world_size=1)],
        [Layout(world_size=2, tp=2), Layout(world_size=2, pp=2), Layout(world_size=2)],
        [Layout(world_size=4, pp=2, ep=2), Layout(world_size=4, tp=2, pp=2), Layout(world_size=4, ep=4)],
    ],
    ids=["1", "2", "4"],
)
def test_loads_under_other_layouts(saved: Path, layouts: list[Layout]) -> None:
    for wrong in run_distributed(load_under, layouts[0].world_size, layouts, saved):
        assert wrong == []


def test_pipeline_stages_load_into_tensor_and_expert_parallel(tmp_path: Path) -> None:
    assert run_distributed(save_under, 2, Layout(world_size=2, pp=2), tmp_path) == [[], []]
    for wrong in run_distributed(load_under, 4, [FULL], tmp_path / "step_00000005"):
        assert wrong == []


@pytest.mark.parametrize("phase", ["local", "dense"])
def test_failure_of_one_rank_reaches_all_and_leaves_the_old_checkpoint(tmp_path: Path, phase: str) -> None:
    reports = run_distributed(save_with_failure, 2, Layout(world_size=2), tmp_path, 1, phase)
    assert len(set(reports)) == 1
    assert "No space left on device" in reports[0] and "rank 1" in reports[0]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "latest", "step_00000005"}
    CheckpointReader(tmp_path / "step_00000005").verify()


def real_run(layout: Layout, precision: str, seed: int) -> tuple[Any, Any, list[Any]]:
    """Groups, ZeRO engine and canonical entries of a small GPT with every kind of dense tensor."""
    from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
    from megamem.models.canonical import canonical_entries
    from megamem.models.config import ModelConfig, MoEConfig
    from megamem.models.gpt import build_model
    from megamem.parallel import groups as parallel_groups
    from megamem.parallel.zero import ZeroEngine
    from megamem.train.config import OptimizerConfig

    groups = parallel_groups.initialize(layout, seed=1)
    moe = MoEConfig(layers=[1], num_experts=4, ffn_hidden_size=8, shared_expert_hidden_size=4, router="sigmoid_bias")
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=20,
        make_vocab_size_divisible_by=8,
        moe=moe,
    )
    memory = MemoryConfig(
        engram=EngramConfig(layers=[0], heads=2, width=4, rows_per_head=64), bank=BankConfig(units=[2], branching=2)
    )
    gpt = build_model(
        model,
        memory,
        groups=groups,
        seq_length=8,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        seed=seed,
        sequence_parallel=layout.tp > 1,
    )
    optimizer = OptimizerConfig()
    engine = ZeroEngine(gpt, optimizer=optimizer, groups=groups, precision=precision, gradient_accumulation_steps=1)  # type: ignore[arg-type]
    return groups, engine, canonical_entries(gpt, groups)


def real_values(engine: Any, tensor: Tensor) -> dict[str, Tensor]:
    """Master weight and moments of a parameter, or a buffer, as the engine has them."""
    return engine.full_state(tensor) if isinstance(tensor, nn.Parameter) else {"master": tensor}


def save_real(layout: Layout, directory: Path, precision: str) -> None:
    """Give every tensor of the model, its moments included, the value that its name stands for, and save."""
    from megamem.models.canonical import global_shape, shard

    groups, engine, entries = real_run(layout, precision, seed=1)
    for entry in entries:
        state = {key: value.clone() for key, value in real_values(engine, entry.tensor).items()}
        for key, value in state.items():
            value[entry.rows] = shard(entry, full_tensor(f"{key}.{entry.name}", global_shape(entry, groups)), groups)
        if isinstance(entry.tensor, nn.Parameter):
            engine.load_full_state(entry.tensor, state)
        else:
            entry.tensor.copy_(state["master"])
    checkpointer = Checkpointer(directory, CheckpointConfig(), groups=groups)
    checkpointer.save(5, entries=entries, state_of=engine.full_state, tables={}, meta={})


def load_real(layout: Layout, path: Path, precision: str) -> list[str]:
    """Load into a model of another seed; returns the tensors that are not what their names stand for."""
    from megamem.models.canonical import global_shape, shard

    groups, engine, entries = real_run(layout, precision, seed=2)
    checkpointer = Checkpointer(path.parent, CheckpointConfig(), groups=groups)
    checkpointer.load(path, entries=entries, put_state=engine.load_full_state, tables={})
    wrong = []
    for entry in entries:
        for key, value in real_values(engine, entry.tensor).items():
            full = full_tensor(f"{key}.{entry.name}", global_shape(entry, groups))
            if not torch.equal(value[entry.rows], shard(entry, full, groups)):
                wrong.append(f"{key}.{entry.name}")
            if key == "master" and not torch.equal(entry.local, value[entry.rows].to(entry.tensor.dtype)):
                wrong.append(f"model's own {entry.name}")
    return wrong


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_model_and_zero_state_move_between_layouts(tmp_path: Path, precision: str) -> None:
    run_distributed(save_real, 4, FULL, tmp_path, precision)
    path = tmp_path / "step_00000005"
    reader = CheckpointReader(path)
    assert "decoder.layers.1.mlp.router.expert_bias" in reader.names()
    assert "decoder.layers.1.mlp.experts.3.linear_fc1.gate.weight" in reader.names()
    for layout in (Layout(world_size=1), Layout(world_size=2, pp=2), FULL):
        for wrong in run_distributed(load_real, layout.world_size, layout, path, precision):
            assert wrong == []
