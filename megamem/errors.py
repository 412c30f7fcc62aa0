"""Errors that a user can cause. Each message is one sentence: what is wrong, where, what to set instead.

The command line prints the message and exits with code 2; everything else is a bug and keeps its traceback.
"""


class MegamemError(Exception):
    """Base of every error that a user can cause."""


class ConfigError(MegamemError, ValueError):
    """A setting is unknown, of the wrong type, or does not fit another one."""


class DataError(MegamemError):
    """A corpus, tokenizer or shard is missing, empty or damaged."""


class CheckpointError(MegamemError):
    """A checkpoint is missing, damaged, or of another model."""


class ExportError(MegamemError):
    """A checkpoint cannot be converted, or its conversion did not verify."""


class ExchangeError(MegamemError):
    """Row ids or row counts that arrived from another rank are not what was agreed."""
