"""Errors that a user can cause. Each message is one sentence: what is wrong, where, what to set instead.

The command line prints the message and exits with code 2; everything else is a bug and keeps its traceback.
"""

import errno

_MACHINE = {
    errno.ENOSPC: "free space where runs_dir and data.path lie",
    errno.EDQUOT: "free space where runs_dir and data.path lie",
    errno.EFBIG: "set a path on a file system that takes larger files",
    errno.EROFS: "set a path that can be written",
    errno.EACCES: "set a path that this user may use",
    errno.EPERM: "set a path that this user may use",
    errno.EEXIST: "move that file away or set another path",
    errno.ENOTDIR: "set a path whose parents are directories",
    errno.EISDIR: "set the path of a file",
    errno.ENAMETOOLONG: "set a shorter name",
    errno.EIO: "check the disk",
}


def machine_sentence(error: OSError) -> str | None:
    """What to tell a user whose disk or file system refused; None where the program may be at fault."""
    advice = _MACHINE.get(error.errno or 0)
    if advice is None:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; {advice}, then give the same command again"


class MegamemError(Exception):
    """Base of every error that a user can cause."""


class ConfigError(MegamemError, ValueError):
    """A setting is unknown, of the wrong type, or does not fit another one."""


class OutOfMemoryError(ConfigError):
    """A rank got no more memory: the settings want more than there is, or something else still holds it."""


class DataError(MegamemError):
    """A corpus, tokenizer or shard is missing, empty or damaged."""


class CheckpointError(MegamemError):
    """A checkpoint is missing, damaged, or of another model."""


class ExportError(MegamemError):
    """A checkpoint cannot be converted, or its conversion did not verify."""


class ExchangeError(MegamemError):
    """What arrived from another rank is not what was agreed or not what was sent, or another rank stopped."""


class TierError(MegamemError):
    """A table cannot be kept where it should be: no room, or its file is missing, truncated or not readable."""


class LaunchError(MegamemError):
    """A job cannot be submitted, found, or changed, or a run may not be written by this process."""
