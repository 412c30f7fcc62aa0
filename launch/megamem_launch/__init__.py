"""Entry points: the composition of a run from its parts, and the verbs of the `megamem` command."""
