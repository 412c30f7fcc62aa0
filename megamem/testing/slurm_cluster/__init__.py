"""A real SLURM on this machine, for tests: slurmctld, munged and one slurmd for every virtual node.

Started in well under a second by root or by an ordinary user, on private ports, with every file below one directory; gone when
its owner goes, however that happens. ``python -m megamem.testing.slurm_cluster --help`` is the same for people. Needs the Debian
packages that ``missing_packages`` names, and only Python's standard library.
"""

from megamem.testing.slurm_cluster.cluster import ClusterError, SlurmCluster
from megamem.testing.slurm_cluster.packages import missing_packages

__all__ = ["ClusterError", "SlurmCluster", "missing_packages"]
