"""How the ranks of a job get into their container."""

from __future__ import annotations

from collections.abc import Mapping

from megamem_launch.cluster import Cluster


def container_srun_options(cluster: Cluster) -> list[str]:
    """Options of the ``srun`` that starts ranks: pyxis' own, none for other containers."""
    container = cluster.slurm.container
    if container.kind != "pyxis":
        return []
    options = [f"--container-image={container.image}"]
    if container.mounts:
        options.append("--container-mounts=" + ",".join(map(_pair, container.mounts)))
    if container.workdir:
        options.append(f"--container-workdir={container.workdir}")
    if container.environment:
        options.append("--container-env=" + ",".join(container.environment))
    return [*options, *container.options]


def container_prefix(cluster: Cluster) -> list[str]:
    """What stands before the command of a rank, between ``srun`` and its interpreter: ``apptainer exec``, or nothing."""
    container = cluster.slurm.container
    if container.kind != "apptainer":
        return []
    command = ["apptainer", "exec"]
    if cluster.gpus_per_node:
        command.append("--nv")
    for mount in container.mounts:
        command += ["--bind", _pair(mount)]
    if container.workdir:
        command += ["--pwd", container.workdir]
    return [*command, *container.options, container.image]


def container_variables(cluster: Cluster) -> Mapping[str, str]:
    """For apptainer, the variable that sets each name of ``environment`` inside, and the name that it takes it from. Values do
    not stand on the command line, which everyone on a node can read."""
    container = cluster.slurm.container
    if container.kind != "apptainer":
        return {}
    return {f"APPTAINERENV_{name}": name for name in container.environment}


def rank_python(cluster: Cluster, supervisor_python: str) -> str:
    """Interpreter of the ranks: the container's, or that of the supervisor."""
    container = cluster.slurm.container
    return supervisor_python if container.kind == "none" else container.python


def _pair(mount: str) -> str:
    """``HOST`` alone means the same path inside, which pyxis wants spelled out."""
    return mount if ":" in mount else f"{mount}:{mount}"
