"""The scripts in ``slurm/``: what the launcher renders for the quickstart on the shipped clusters, for people to read.

``python -m megamem_launch.slurm.samples slurm`` writes them anew; a test compares.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from megamem.files import write_text
from megamem_launch.cluster import build_cluster
from megamem_launch.config import load_config
from megamem_launch.slurm.data_array import data_scripts
from megamem_launch.slurm.render import render
from megamem_launch.slurm.training import training_script

_HOME = Path("/shared/project")


def samples() -> dict[str, str]:
    """Text of every sample by file name. Names and paths are those of a made-up account on a made-up cluster."""
    run_dir = _HOME / "runs" / "quickstart"
    folder = run_dir / "launch" / "submission-1"
    slurm = {
        "partition": "gpu",
        "account": "physics",
        "time": "24:00:00",
        "memory": "0",
        "signal_seconds": 300,
        "setup": ["module load cuda"],
        "environment": {"NCCL_DEBUG": "WARN"},
        "python": str(_HOME / ".venv" / "bin" / "python"),
    }
    apptainer = {"kind": "apptainer", "image": str(_HOME / "megamem.sif"), "environment": ["NCCL_DEBUG"]}
    torchrun, srun, contained = (
        build_cluster({"nodes": 4, "gpus_per_node": 8, "cpus_per_node": 96, "slurm": slurm | own}, "sample")
        for own in ({}, {"mode": "srun"}, {"container": apptainer})
    )
    sweep_dir = _HOME / "runs" / "rates"
    points = [sweep_dir / f"lr={rate}" / "launch" / "submission-1" for rate in ("0.0003", "0.001")]
    config = load_config(None, ["base=quickstart", "data.path=data/quickstart"])
    data = _HOME / "data" / "quickstart.parts"
    scripts = {
        "train_torchrun.sbatch": (torchrun, training_script(torchrun, run_dir, [folder])),
        "train_srun.sbatch": (srun, training_script(srun, run_dir, [folder])),
        "train_apptainer.sbatch": (contained, training_script(contained, run_dir, [folder])),
        "sweep.sbatch": (torchrun, training_script(torchrun, sweep_dir, points, at_once=2)),
    } | {
        f"data_{name}.sbatch": (torchrun, script)
        for name, script in data_scripts(config, torchrun, data, data / "launch" / "submission-1", 4).items()
    }
    return {
        name: render(cluster, dataclasses.replace(script, workdir=_HOME)) for name, (cluster, script) in scripts.items()
    }


if __name__ == "__main__":
    for file_name, text in samples().items():
        write_text(Path(sys.argv[1]) / file_name, text)
