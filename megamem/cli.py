"""``megamem <verb>``: the one entry point.

Verbs are entry points of the group ``megamem.verbs``, so this library never imports the packages above it, and ``--help``
imports none of them.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from megamem import __version__
from megamem.errors import MegamemError, machine_sentence
from megamem.observe.noise import silence_libraries

SUMMARIES = {
    "data": "prepare text: tokenizer, token shards, document clusters",
    "train": "train a model, or go on where a run stopped",
    "export": "turn a run into a Hugging Face model directory",
    "import": "turn an open Hugging Face model into a run to start from",
    "generate": "write text with an exported model",
    "eval": "measure perplexity and tasks of a run or an export",
    "inspect": "look at a run: headline numbers in the terminal",
    "report": "draw one run, or compare several, on one HTML page",
    "profile": "measure where the time and the memory of a step go",
    "plan": "tell what fits on a cluster, how fast it would be, and which layout is best",
    "launch": "submit, supervise, watch and end runs, on SLURM or here",
    "checkpoint": "list, verify, compare and prune the checkpoints of a run",
}


def verbs() -> dict[str, EntryPoint]:
    """The installed verbs by name."""
    found = {entry.name: entry for entry in entry_points(group="megamem.verbs")}
    order = list(SUMMARIES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def usage() -> str:
    """The text of ``megamem --help``."""
    known = verbs()
    width = max((len(name) for name in known), default=0)
    lines = [f"  {name.ljust(width)}  {SUMMARIES.get(name, '')}".rstrip() for name in known]
    return "\n".join(
        [
            f"megamem {__version__}: pretraining of memory-augmented language models",
            "",
            "usage: megamem <verb> [arguments]     (megamem <verb> --help teaches the verb)",
            "",
            *lines,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; errors that the user caused end with one sentence on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    known = verbs()
    name = arguments[0]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `megamem {near[0]}`?" if near else f"verbs: {', '.join(known)}"
        print(f"megamem: unknown verb `{name}`: {hint}", file=sys.stderr)
        return 2
    silence_libraries()
    try:
        return int(known[name].load()(arguments[1:]) or 0)
    except MegamemError as error:
        print(f"megamem {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter complains when it flushes
        return 0
    except OSError as error:
        sentence = machine_sentence(error)
        if sentence is None:
            raise
        print(f"megamem {name}: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmegamem {name}: interrupted; the same command goes on or starts again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
