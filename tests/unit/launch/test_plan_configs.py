"""The planner on the published shapes: counts, what fits where, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamem.errors import ConfigError
from megamem.parallel.layout import Layout
from megamem_launch.cluster import Cluster, load_cluster
from megamem_launch.config import load_config
from megamem_launch.plan.hardware import CeilingsConfig, CollectiveCeilings, HardwareConfig, RankCeilings
from megamem_launch.plan.memory import model_tables
from megamem_launch.plan.parameters import count_parameters
from megamem_launch.plan.search import Planner, plan
from megamem_launch.verbs.plan import main

CONFIGS = Path(__file__).parents[3] / "configs"
H100 = CONFIGS / "clusters" / "slurm_8xh100.yaml"


@pytest.mark.parametrize(("name", "rows", "billions"), [("engram_27b", 5.79, 26.6), ("engram_40b", 18.53, 39.4)])
def test_counts_are_those_of_the_paper(name: str, rows: float, billions: float) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    tables = sum(spec.rows * spec.width for spec in model_tables(config)) / 1e9
    dense = sum(count_parameters(config.model, config.memory).values()) / 1e9
    assert tables == pytest.approx(rows, abs=0.01)
    # Table 5 of arXiv 2601.07372 says 26.7 and 39.5 with its latent attention and four residual branches.
    assert dense + tables == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("name", ["engram_27b", "engram_40b"])
def test_the_paper_shapes_fit_64_gpus(name: str) -> None:
    told = plan(load_config(CONFIGS / f"{name}.yaml"), load_cluster(H100, ["nodes=8"]))
    assert told.fits and told.layout.dp == 8
    assert 0 < told.peak("device") < 74 * 2**30
    rows = next(rank.held["tables_host"] for rank in told.ranks if "tables_host" in rank.held)
    spec = model_tables(told.config)
    # Rows, two fp32 moments, step and touched flag, over the 32 ranks of the stage, which holds both tables or one of them.
    record = 80 * 4 * 3 + 4 + 1
    assert rows == pytest.approx(sum(s.rows for s in spec) * record / 32, rel=0.01)


def test_a_200_gb_table_goes_to_the_host_and_is_refused_on_the_device() -> None:
    overrides = ["memory.engram.rows_per_head=40000000", "memory.storage.format=bf16"]
    config = load_config(CONFIGS / "engram_27b.yaml", overrides)
    assert sum(spec.rows * spec.width * 2 for spec in model_tables(config)) > 200e9
    cluster = load_cluster(H100, ["nodes=4"])
    assert plan(config, cluster).fits
    config.memory.storage.tier = "device"
    (refusal,) = plan(config, cluster).refusals
    assert refusal.startswith("a rank of stage 0 wants") and "of which tables take" in refusal
    assert refusal.endswith("hardware.device_memory_gib allows 74 GiB")


def test_a_plan_that_cannot_fit_ends_with_the_number_and_a_layout_that_can(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cluster = tmp_path / "small.yaml"
    ceilings = "{compute: [{ranks: 2, matmul_tflops_fp32: {'64': 0.05}, copy_gb_per_s: 8}]}"
    cluster.write_text(
        f"nodes: 1\nranks_per_node: 2\ncpus_per_node: 2\nhardware: {{host_memory_gib: 0.005, ceilings: {ceilings}}}\n"
    )
    options = ["--cluster", str(cluster), "--top", "1"]
    with pytest.raises(
        ConfigError, match=r"2 ranks of a node want .* of host memory.*hardware.host_memory_gib allows 5.12 MiB"
    ):
        main([str(CONFIGS / "tiny.yaml"), *options])
    capsys.readouterr()
    assert main([str(CONFIGS / "tiny.yaml"), "hardware.host_memory_gib=1", *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["fits"] and told["plan"]["tokens_per_second"] > 0
    assert told["recommended"][0]["tokens_per_second"] >= told["plan"]["tokens_per_second"]


def test_every_recommended_layout_is_legal_and_sorted() -> None:
    hardware = HardwareConfig(
        ceilings=CeilingsConfig(
            compute=[RankCeilings(ranks=4, matmul_tflops_fp32={"16": 0.01, "256": 0.05}, copy_gb_per_s=5)],
            collectives=[CollectiveCeilings(operation="all_reduce", ranks=4, latency_us=100, gb_per_s=1)],
        )
    )
    config = load_config(CONFIGS / "tiny.yaml", ["model.vocab_size=1024"])
    ranked, seen = Planner(config, Cluster(ranks_per_node=4, cpus_per_node=4, hardware=hardware)).best(20)
    assert seen > 20 and len(ranked) == 20
    speeds = [one.tokens_per_second for one in ranked]
    assert speeds == sorted(speeds, reverse=True)
    for one in ranked:
        again = load_config(CONFIGS / "tiny.yaml", ["model.vocab_size=1024", *one.settings])
        assert Layout.from_config(again.parallel, 4) == one.layout


def test_efficiency_slows_compute_and_leaves_collectives() -> None:
    def parts(ranks: int, efficiency: float) -> dict[str, float]:
        compute = RankCeilings(ranks=ranks, matmul_tflops_fp32={"64": 0.05}, copy_gb_per_s=5, efficiency=efficiency)
        links = [CollectiveCeilings(operation="all_gather", ranks=ranks, latency_us=100, gb_per_s=1)]
        hardware = HardwareConfig(ceilings=CeilingsConfig(compute=[compute], collectives=links))
        config = load_config(CONFIGS / "tiny.yaml", ["model.vocab_size=1024"])
        time = plan(config, Cluster(ranks_per_node=ranks, cpus_per_node=ranks, hardware=hardware), cores=2).time
        assert time is not None
        return time.parts

    full, half = parts(2, 1.0), parts(2, 0.5)
    assert half["compute"] == pytest.approx(2 * full["compute"])
    assert half["dense_gather"] == full["dense_gather"]
    # Four ranks on two cores have half the work of two, and take turns: their rates are those of a rank that has its core.
    assert parts(4, 1.0)["compute"] > 0.9 * full["compute"]


def test_heap_and_system_blocks_are_counted_apart() -> None:
    config = load_config(CONFIGS / "tiny.yaml", ["model.vocab_size=1024"])

    def peak(fragmentation: float, vocabulary: int = 1024) -> int:
        config.model.vocab_size = vocabulary
        hardware = HardwareConfig(ceilings=CeilingsConfig(fragmentation=fragmentation))
        return plan(config, Cluster(ranks_per_node=1, cpus_per_node=1, hardware=hardware)).peak("host")

    assert peak(0.5) - peak(0.0) == pytest.approx(peak(1.0) - peak(0.5), abs=2) != 0
    # An embedding, its gradient and logits beyond 32 MiB are given back to the system: no part of the heap.
    large = 256 * 1024
    assert peak(0.0, large) > 2**28
    assert peak(1.0, large) - peak(0.0, large) < 2 * (peak(1.0) - peak(0.0))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("{ranks: 2, matmul_tflops_fp32: {'64': 1}}", "copy_gb_per_s is 0.0"),
        ("{ranks: 2, copy_gb_per_s: 8}", "matmul_tflops_fp32 and matmul_tflops_bf16 are empty"),
        ("{ranks: 2, copy_gb_per_s: 8, matmul_tflops_bf16: {'64': 1}}", "has no matmul_tflops_fp32"),
    ],
)
def test_ceilings_that_no_time_follows_from_are_refused_as_such(tmp_path: Path, entry: str, sentence: str) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"{{nodes: 1, ranks_per_node: 2, cpus_per_node: 2, hardware: {{ceilings: {{compute: [{entry}]}}}}}}"
    )
    with pytest.raises(ConfigError, match=sentence) as refused:
        main(["--cluster", str(cluster), str(CONFIGS / "tiny.yaml")])
    assert "does not fit" not in str(refused.value)


def test_without_ceilings_the_smallest_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    disk = f"memory.disk.path={tmp_path / 'not' / 'yet'}"
    assert main([str(CONFIGS / "tiny.yaml"), "--top", "2", "parallel.nproc=2", disk]) == 0
    shown = capsys.readouterr().out
    assert "the smallest of" in shown and "fastest" not in shown
    assert "the process itself" in shown


def test_a_layout_that_is_none_is_not_called_too_large() -> None:
    options = ["--cluster", str(H100), "--top", "0"]
    with pytest.raises(
        ConfigError, match=r"^nodes=1 x .*: a world of 8 ranks does not fit .*nodes or ranks_per_node"
    ) as refused:
        main([str(CONFIGS / "tiny.yaml"), "parallel.tensor_model_parallel_size=3", *options])
    assert "tiny.yaml" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"this layout fits nodes=2$"):
        main([str(CONFIGS / "engram_27b.yaml"), *options])
