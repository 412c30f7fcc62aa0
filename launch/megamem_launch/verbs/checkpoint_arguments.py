"""What ``megamem checkpoint`` and its actions take, and the help that they print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Arguments:
    """Look after the checkpoints of a run.

      ls       every checkpoint: step, age, size, layout, whether it is whole
      verify   read every byte and compare it with what was written
      diff     in what two checkpoints differ: weights, moments, rows of tables, settings
      prune    delete old checkpoints, and what killed saves left behind

    `megamem checkpoint ACTION --help` teaches each.

    Examples:
      megamem checkpoint ls runs/quickstart
      megamem checkpoint verify runs/quickstart
      megamem checkpoint diff runs/one runs/two/checkpoints/step_00000400
      megamem checkpoint prune runs/quickstart --keep 2 --keep-every 1000 --dry-run
    """

    action: Annotated[Literal["ls", "verify", "diff", "prune"], tyro.conf.Positional]
    """What to do."""


@dataclass
class ListArguments:
    """List the checkpoints of a run, oldest first; an arrow marks the one that a resume starts from.

    `size` is what the files take, `own` what deleting the checkpoint would free: the rest is shared with others through hard
    links. `+2` of the tables were saved as rows that had changed. A checkpoint is whole when every file is there at its full
    length; `megamem checkpoint verify` reads them too.

    Examples:
      megamem checkpoint ls quickstart
      megamem checkpoint ls runs/quickstart --json | jq '.checkpoints[-1].step'
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of a run, its name below --runs-dir, or its directory of checkpoints."""
    runs_dir: Path = Path("runs")
    """Where runs are kept."""
    json: bool = False
    """Print JSON; sizes are bytes, times seconds since 1970."""


@dataclass
class VerifyArguments:
    """Read every file of a checkpoint, or of all checkpoints of a run, and compare it with the manifest's length and sha256.

    Names every file that is not what was written and ends with code 2 if there is one. A file that several checkpoints share is
    read once.

    Examples:
      megamem checkpoint verify runs/quickstart
      megamem checkpoint verify runs/quickstart/checkpoints/step_00000400 --threads 8
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """Directory of a run, its directory of checkpoints, or one checkpoint."""
    threads: int = 4
    """Files that are read at once."""
    json: bool = False
    """Print JSON."""


@dataclass
class DiffArguments:
    """Compare two checkpoints of one model, whatever layouts, owners and placements wrote them.

    Prints the dense weights and moments that differ with the largest absolute difference, per table how many rows differ in
    values and in optimizer state, and the settings that differ. Ends with code 0 where all tensors and tables are the same bit
    for bit, else 1; settings do not count.

    Examples:
      megamem checkpoint diff runs/one runs/two
      megamem checkpoint diff runs/one/checkpoints/step_00000100 runs/one/checkpoints/step_00000200 --json
    """

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A checkpoint, or the directory of a run, whose latest is taken."""
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The same."""
    json: bool = False
    """Print JSON with everything that differs."""


@dataclass
class PruneArguments:
    """Delete all but the newest checkpoints of a run, and the leftovers of killed saves.

    Damaged checkpoints do not count as kept, and the one that `latest` names always stays. Refuses while the run trains, which
    prunes by itself (settings checkpoint.keep and checkpoint.keep_every).

    Examples:
      megamem checkpoint prune runs/quickstart --keep 1 --dry-run
      megamem checkpoint prune runs/quickstart --keep 2 --keep-every 1000
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of a run, or its directory of checkpoints."""
    keep: int = 2
    """Newest whole checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay too; 0 for none."""
    dry_run: bool = False
    """Say what would go, and delete nothing."""
    json: bool = False
    """Print JSON."""
