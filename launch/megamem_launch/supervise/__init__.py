"""The supervisor: starts the ranks of a run, watches them, decides what happens when they end. Needs no torch."""
