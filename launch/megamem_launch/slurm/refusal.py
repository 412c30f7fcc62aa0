"""What sbatch says when it refuses a job, as one sentence that names the setting."""

from __future__ import annotations

import re

from megamem_launch.cluster import Cluster

_NO_NODES = "requested node configuration is not available"
"""`sbatch --test-only` says so of nodes that do not exist, and of nodes that are down."""

_OF_THE_MOMENT = (
    "required node not available",
    "requested nodes are busy",
    "temporarily",
    "job dependency problem",
    "currently not possible",
)
"""Answers about now, not about the request: a job like that waits in the queue."""

_FOR_EVER = re.compile(
    r"Partition(Config|NodeLimit|TimeLimit)|BadConstraints|(Account|QOS)NotAllowed|Invalid(Account|QOS)|Job's (account|QOS)",
    re.I,
)
"""Reasons of pending jobs that no waiting cures; a cluster without EnforcePartLimits accepts such jobs."""


_SENTENCES = (
    (r"invalid partition", "{partition} is not a partition that you may use here; `sinfo` lists them"),
    (
        r"accounting/qos policy|violates",
        "a limit of your account or QOS is reached; wait for other jobs, or set nodes, slurm.time, slurm.account or slurm.qos",
    ),
    (
        r"invalid ?qos|qos ?not|job's qos",
        "slurm.qos={qos} is refused for {partition}; `sacctmgr show assoc user=$USER format=qos` lists yours",
    ),
    (
        r"invalid ?account|account/partition|user's account|not permitted to use|account ?not|job's account",
        "slurm.account={account} is refused for {partition}; `sacctmgr show assoc user=$USER` lists yours",
    ),
    (
        r"invalid feature|invalid constraint",
        "slurm.constraint={constraint} names features that no node has; `sinfo -o '%n %f'` lists them",
    ),
    (r"reservation", "slurm.reservation={reservation} cannot be used; `scontrol show reservation` lists them"),
    (
        r"invalid generic resource|\bgres\b",
        "gpus_per_node={gpus} is not what nodes of {partition} have; `sinfo -o '%n %G'` lists their GPUs",
    ),
    (
        r"time ?limit",
        "slurm.time={time} is more than {partition} allows; `sinfo -o '%P %l'` lists limits",
    ),
    (r"memory", "slurm.memory={memory} cannot be had on a node of {partition}"),
    (r"invalid node name", "slurm.exclude={exclude} names nodes that do not exist; `sinfo -N` lists them"),
    (r"job array", "the sweep has more points, or the data more shards, than a job array may have here; set fewer"),
    (
        r"node count|more processors|node configuration|partitionconfig|nodelimit|badconstraints",
        "{partition} can never run this: {wanted}; `sinfo -N -l` and `scontrol show partition` tell what it "
        "has; lower what is too much",
    ),
    (r"unable to contact|connection refused|timed out", "SLURM's controller does not answer; try again later"),
    (r"authentication|munge", "SLURM did not accept this user's credential; check that munge runs on this machine"),
    (
        r"unrecognized option|invalid option|ambiguous|sbatch --help",
        "slurm.directives has an option that this version of sbatch does not know",
    ),
)
"""What SLURM says, and what that means for the settings; the first that fits counts."""

_DEFAULT = "(the default)"


def is_transient(message: str) -> bool:
    """Whether a job may be taken although ``sbatch --test-only`` has no place for it now."""
    return any(text in message.lower() for text in _OF_THE_MOMENT)


def lacks_nodes(message: str) -> bool:
    """Whether nodes as asked for do not exist, or are down."""
    return _NO_NODES in message.lower()


def waits_for_ever(reason: str) -> bool:
    """Whether SLURM's reason for a pending job means that it will never start."""
    return bool(_FOR_EVER.match(reason))


def explain(message: str, cluster: Cluster) -> str:
    """One sentence from what SLURM said of a job: what is wrong, which setting, and its own last words."""
    said = _last_words(message)
    names = ("partition", "account", "qos", "constraint", "reservation", "time", "memory", "exclude")
    values = {name: getattr(cluster.slurm, name) for name in names}
    asked = {"nodes": cluster.nodes, "cpus_per_node": cluster.cpus_per_node, "gpus_per_node": cluster.gpus_per_node}
    asked |= {f"slurm.{name}": values[name] for name in ("memory", "time", "constraint", "exclude")}
    wanted = ", ".join(f"{name}={value}" for name, value in asked.items() if value)
    for pattern, sentence in _SENTENCES:
        if re.search(pattern, message, re.IGNORECASE):
            shown = {name: value or _DEFAULT for name, value in values.items()}
            shown["partition"] = (
                f"slurm.partition={values['partition']}" if values["partition"] else "the default partition"
            )
            return f"{sentence.format(**shown, gpus=cluster.gpus_per_node, wanted=wanted)} (SLURM: {said})"
    return f"SLURM refused the job: {said}"


def _last_words(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip() and "sbatch --help" not in line]
    last = lines[-1] if lines else "nothing"
    return re.sub(r"^(sbatch: )?(error: )?(Batch job submission failed: |allocation failure: )?", "", last)
