"""``python -m megamem_launch.supervise SUBMISSION_DIR``: what a batch script of `megamem launch slurm` ends as."""

from __future__ import annotations

import sys
from pathlib import Path

from megamem.errors import MegamemError, machine_sentence
from megamem_launch.supervise.allocation import SlurmAllocation
from megamem_launch.supervise.decide import EXHAUSTED, FATAL
from megamem_launch.supervise.submission import read_submission
from megamem_launch.supervise.supervisor import Supervisor


def main(argv: list[str]) -> int:
    """Supervise the run of a submission on the nodes of this job."""
    if len(argv) != 1:
        print("usage: python -m megamem_launch.supervise SUBMISSION_DIR", file=sys.stderr)
        return FATAL
    try:
        submission = read_submission(Path(argv[0]))
        return Supervisor(submission, SlurmAllocation.here(submission.cluster)).run()
    except MegamemError as error:
        print(f"supervisor: {error}", file=sys.stderr)
        return FATAL
    except OSError as error:
        print(f"supervisor: {machine_sentence(error) or error}", file=sys.stderr)
        return EXHAUSTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
