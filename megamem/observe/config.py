"""The ``tracking`` section."""

from __future__ import annotations

from dataclasses import dataclass

from megamem.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """``tracking``: where measurements go. A JSONL journal in the run directory is always written."""

    mlflow: bool = True
    """Log to MLflow as well."""
    uri: str = ""
    """MLflow tracking URI; empty means SQLite in the directory of runs."""
    experiment: str = "megamem"
    """MLflow experiment that the run belongs to."""
    parent: str = ""
    """Name of the MLflow run that this one is shown under, as the points of a sweep are; made where there is none yet."""
    system_metrics: bool = True
    """Let MLflow measure processors, memory, disk, network and GPUs of the first rank's machine."""

    def __post_init__(self) -> None:
        if set(self.parent) & set("'\"`%\\"):
            raise ConfigError(f"tracking.parent is {self.parent!r}; set a name without quotes, % and backslashes")
