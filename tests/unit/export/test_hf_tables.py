"""Memory tables of an exported model: formats, shards, where they are kept, what trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from megamem.memory.config import EngramConfig
from megamem.memory.hashing import hash_specs
from megamem_checkpoints.hf.remote_code.configuration_megamem import MegamemConfig
from megamem_checkpoints.hf.remote_code.modeling_megamem import MegamemForCausalLM
from megamem_checkpoints.hf.remote_code.table_megamem import MegamemTable, MegamemTableShard
from megamem_kernels.formats import FormatName, row_fields
from megamem_kernels.rounding import quantize_rows
from megamem_kernels.row_gather import dequantize_rows

DTYPES: dict[str, FormatName] = {"float32": "fp32", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}


def build(dtype: str = "float32", shards: int = 1, **changes: object) -> MegamemForCausalLM:
    """A random model with two Engram tables of width 40 and a bank, stored in ``dtype``."""
    engram = EngramConfig(layers=[0, 1], heads=2, width=40, rows_per_head=11)
    specs = hash_specs(engram, 50)
    settings: dict[str, object] = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 32,
        "head_dim": 6,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "engram_layers": engram.layers,
        "engram_orders": engram.orders,
        "engram_heads": engram.heads,
        "engram_width": engram.width,
        "engram_multipliers": [[str(m) for m in specs[layer].multipliers] for layer in engram.layers],
        "engram_primes": [specs[layer].primes.ravel().tolist() for layer in engram.layers],
        "engram_conv_kernel_size": 4,
        "bank_layers": [1],
        "bank_units": [2, 3],
        "bank_branching": 3,
        "table_shards": shards,
        "engram_table_dtype": dtype,
        "bank_table_dtype": dtype,
    }
    model = MegamemForCausalLM(MegamemConfig(**(settings | changes))).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
        for module in model.modules():
            if isinstance(module, MegamemTableShard) and "scale" in module.shapes:
                fields = {"rows": module.weight, "scales": module.scale}
                quantize_rows(torch.randn(module.rows, module.width, generator=generator) * 0.3, fields)
    return model


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 50, (2, 19), generator=torch.Generator().manual_seed(1))
    ids[0, 7] = 1
    return {"input_ids": ids, "memory_paths": torch.tensor([[0, 7], [2, -1]])}


def tables(model: MegamemForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".shard_" in name}


@pytest.mark.parametrize("shards", [1, 2, 5, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_any_number_of_shards(dtype: str, shards: int) -> None:
    rows, width = 37, 70
    fields = {field.name: field.allocate(rows) for field in row_fields(DTYPES[dtype], width)}
    quantize_rows(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * 3, fields)
    expected = dequantize_rows(fields, torch.empty(rows, width))
    table = MegamemTable(MegamemConfig(table_shards=shards), rows, width, dtype)
    start = 0
    for shard in table.children():
        assert shard.rows > 0
        for name, source in (("weight", "rows"), ("scale", "scales")):
            if source in fields:
                getattr(shard, name).data.copy_(fields[source][start : start + shard.rows])
        start += shard.rows
    assert start == rows and len(list(table.children())) == min(shards, rows)
    index = torch.randint(rows, (3, 5, 2), generator=torch.Generator().manual_seed(2))
    found = table(index, like=torch.empty(0))
    assert torch.equal(found, expected[index])
    assert torch.equal(table(index, like=torch.empty(0, dtype=torch.bfloat16)), expected[index].bfloat16())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_placement_changes_no_logit_and_no_saved_tensor(dtype: str, shards: int, tmp_path: Path) -> None:
    model = build(dtype, shards)
    expected = model(**prompts()).logits
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    stored = tables(model)
    for placement in ("device", "cpu", "disk"):
        again, info = MegamemForCausalLM.from_pretrained(
            tmp_path / "first", table_placement=placement, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(**prompts()).logits, expected)
        assert again.state_dict().keys() == model.state_dict().keys()
        again.load_state_dict(model.state_dict())
        trainable = any(".shard_" in name for name, _ in again.named_parameters())
        assert trainable == (placement == "device" and dtype != "float8_e4m3fn")

        again.save_pretrained(tmp_path / placement)
        last = MegamemForCausalLM.from_pretrained(tmp_path / placement, table_placement="device")
        for name, tensor in tables(last).items():
            assert tensor.dtype == stored[name].dtype and torch.equal(raw(tensor), raw(stored[name])), name


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def test_tables_stay_where_they_are_while_the_rest_moves(tmp_path: Path) -> None:
    build("bfloat16", 2).save_pretrained(tmp_path)
    for placement in ("cpu", "disk"):
        # The meta device stands for an accelerator.
        mapped = MegamemForCausalLM.from_pretrained(tmp_path, table_placement=placement, device_map="meta")
        moved = MegamemForCausalLM.from_pretrained(tmp_path, table_placement=placement).to("meta")
        for model in (mapped, moved):
            kept = tables(model)
            assert len(kept) == 8 and all(tensor.device.type == "cpu" for tensor in kept.values())
            assert all(parameter.device.type == "meta" for parameter in model.parameters())
            files = {is_mapped(tensor) for tensor in kept.values()}
            assert files == {placement == "disk"}
        half = MegamemForCausalLM.from_pretrained(tmp_path, table_placement=placement).to(torch.float16)
        assert {tensor.dtype for tensor in tables(half).values()} == {torch.bfloat16}


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is a file."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        low, high = (int(address, 16) for address in addresses.split("-"))
        if low <= tensor.data_ptr() < high:
            return path.endswith(".safetensors")
    return False


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    for placement in ("cpu", "disk"):
        with pytest.raises(
            ValueError, match=r"shard_0\.weight has shape \(60, 40\), and \(30, 40\) by the configuration"
        ):
            MegamemForCausalLM.from_pretrained(tmp_path, table_placement=placement, table_shards=2)
        with pytest.raises(ValueError, match=r"has no model\.layers\.0\.engram\.table\.shard_0\.scale"):
            MegamemForCausalLM.from_pretrained(tmp_path, table_placement=placement, engram_table_dtype="float8_e4m3fn")
        with pytest.raises(RuntimeError, match="table_placement='device'"):
            build(table_placement=placement)(**prompts())


@pytest.mark.parametrize("placement", ["cpu", "disk"])
@torch.no_grad()
def test_a_model_can_be_saved_over_the_files_that_it_reads(placement: str, tmp_path: Path) -> None:
    model = build("float32", 2)
    expected = model(**prompts()).logits
    model.save_pretrained(tmp_path)
    reader = MegamemForCausalLM.from_pretrained(tmp_path, table_placement=placement)
    reader.save_pretrained(tmp_path)
    assert torch.equal(reader(**prompts()).logits, expected)
    assert torch.equal(MegamemForCausalLM.from_pretrained(tmp_path)(**prompts()).logits, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trainer_takes_steps_with_and_without_checkpointing(dtype: str, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        model = build(dtype, 2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        examples = [
            {"input_ids": row, "labels": row, "memory_paths": path}
            for row, path in zip(*prompts().values(), strict=True)
        ]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=examples)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert losses[-1][1] < losses[-1][0]
        after = model.state_dict()
        moved = {name for name in after if not torch.equal(raw(after[name]), raw(before[name]))}
        assert any("q_proj" in name for name in moved)
        assert any(".shard_" in name for name in moved) == (dtype != "float8_e4m3fn")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
