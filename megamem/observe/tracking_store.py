"""Where MLflow keeps measurements: the URI, and the SQLite file behind it, made whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megamem.observe.config import TrackingConfig


def tracking_uri(config: TrackingConfig, runs_dir: Path) -> str:
    """Where measurements go: ``tracking.uri``, or a SQLite file in the directory of runs."""
    return config.uri or f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def database_file(uri: str) -> Path | None:
    """The SQLite file behind ``uri``; None where it is something else."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    name = make_url(uri).database
    return Path(name).resolve() if name and name != ":memory:" else None


def create_database(uri: str) -> None:
    """Make MLflow's tables in the SQLite file behind ``uri``, where there is no such file yet.

    MLflow makes them in many statements that are not undone together: a process that dies meanwhile, or two that begin at the
    same moment, leave a file that MLflow never opens again ("duplicate column name"). So the file gets its name when it is whole.
    """
    path = database_file(uri)
    if path is None or path.exists():
        return
    from mlflow.tracking import MlflowClient
    from sqlalchemy.engine import make_url

    path.parent.mkdir(parents=True, exist_ok=True)
    # MLflow keeps the file open, so a network file system may refuse to remove the directory.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        made = Path(folder) / path.name
        url = make_url(uri).set(database=str(made))
        MlflowClient(tracking_uri=url.render_as_string(hide_password=False)).search_experiments(max_results=1)
        try:
            os.link(made, path)
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # a file system without links: two at the same moment are not kept apart
            if not path.exists():
                os.replace(made, path)
