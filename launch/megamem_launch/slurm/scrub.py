"""Which variables of the submitting shell a job inherits."""

from __future__ import annotations

from collections.abc import Mapping

from megamem_launch.rundir import INCARNATION

_PREFIXES = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SRUN_",
    "SALLOC_",
    "PMI_",
    "PMI2_",
    "PMIX_",
    "OMPI_",
    "MPI_LOCAL",
    "TORCHELASTIC_",
)
_NAMES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK"),
    INCARNATION,
}
_KEPT = {"SLURM_CONF"}
"""Names the cluster to talk to, not a job."""


def scrubbed(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables for a submission, without those of an allocation, a step, a launcher or a rank.

    A launcher is often started inside a job. sbatch hands its variables on, and reads ``SBATCH_*`` as options that go before
    those of the script; a rank that finds another job's ``RANK``, CPU mask or devices misbehaves without a message.
    """
    return {
        name: value
        for name, value in variables.items()
        if name in _KEPT or not (name.startswith(_PREFIXES) or name in _NAMES)
    }
