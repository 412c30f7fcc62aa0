"""Watching the ranks of a run from outside: heartbeats, hangs, stacks, stragglers. Needs only the standard library."""
