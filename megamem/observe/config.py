"""The ``tracking`` section."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """``tracking``: where measurements go. A JSONL journal in the run directory is always written."""

    mlflow: bool = True
    """Log to MLflow as well."""
    uri: str = ""
    """MLflow tracking URI; empty means SQLite in the directory of runs."""
    experiment: str = "megamem"
    """MLflow experiment that the run belongs to."""
