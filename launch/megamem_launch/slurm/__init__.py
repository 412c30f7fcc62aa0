"""`megamem launch` on SLURM: scripts, submission, and what SLURM says of jobs."""
