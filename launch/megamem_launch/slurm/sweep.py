"""A sweep: one array of jobs, each of which trains one point in a directory of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamem.config import at_least, build
from megamem.errors import ConfigError, DataError, LaunchError
from megamem.files import write_text
from megamem_launch.cluster import Cluster
from megamem_launch.config import RunConfig, load_config, read_yaml
from megamem_launch.rundir import launch_dir, next_submission_folder
from megamem_launch.slurm.capture import CODE, records
from megamem_launch.slurm.render import render
from megamem_launch.slurm.shared import local_notes
from megamem_launch.slurm.submit import (
    SCRIPT,
    Submission,
    ask,
    claimed,
    record_job,
    submit,
    write_submission,
)
from megamem_launch.slurm.training import Submitted, absolute, check_run, job_name, mounted, training_script

_NAME_LENGTH = 80


@dataclass(kw_only=True, slots=True)
class Sweep:
    """The content of a sweep file."""

    grid: dict[str, Any] = field(default_factory=dict)
    """Setting to a list of its values; every combination is a point."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Further points, each a mapping of settings to values."""
    at_once: int = 0
    """Points that train at a time; 0 for as many as the cluster takes."""

    def __post_init__(self) -> None:
        at_least(self, 0, "at_once")
        for setting, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"grid.{setting} is {values!r}; set a list of values")
        if not self.grid and not self.points:
            raise ConfigError("neither grid nor points is there; set one of them, or both")

    def all_points(self) -> list[dict[str, Any]]:
        """Every point of the grid, the last setting fastest, then the others."""
        combinations = itertools.product(*self.grid.values()) if self.grid else ()
        return [dict(zip(self.grid, values, strict=True)) for values in combinations] + self.points


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file; ConfigError where it is none, or names a point twice."""
    if not path.is_file():
        raise ConfigError(f"no sweep at {path}; give a YAML file with grid or points")
    data = read_yaml(path)
    if isinstance(data.get("grid"), dict):
        data["grid"] = _flat(data["grid"])
    if isinstance(data.get("points"), list):
        data["points"] = [_flat(point) if isinstance(point, dict) else point for point in data["points"]]
    try:
        sweep = build(Sweep, data)
        points = sweep.all_points()
        for setting, value in (item for point in points for item in point.items()):
            _check_plain(setting, value)
        if len({json.dumps(point, sort_keys=True) for point in points}) < len(points):
            raise ConfigError("the same point is there twice; leave one out")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return sweep


def point_names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A directory name for each point: ``lr=0.001,width=16``, with longer names of settings where short ones are ambiguous."""
    settings = list(dict.fromkeys(setting for point in points for setting in point))
    last = [setting.rpartition(".")[2] for setting in settings]
    short = {setting: name if last.count(name) == 1 else setting for setting, name in zip(settings, last, strict=True)}
    names = []
    for point in points:
        text = ",".join(f"{short[setting]}={_value(value)}" for setting, value in point.items())
        name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", text)
        if name != text or len(name) > _NAME_LENGTH:  # something was lost, so the name may not be the only one
            name = f"{name[:_NAME_LENGTH]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        names.append(name)
    return [
        name if names.count(name) == 1 else f"{name}-{hashlib.sha256(json.dumps(point).encode()).hexdigest()[:6]}"
        for name, point in zip(names, points, strict=True)
    ]


def launch_sweep(
    source: str | Path, overrides: Sequence[str], sweep: Sweep, cluster: Cluster, *, dry_run: bool = False
) -> Submitted:
    """Check every point, then submit all as one array. The directory of the configuration's run holds those of the points.

    Raises:
        MegamemError: as :func:`~megamem_launch.slurm.training.launch_training`, naming the point. Nothing is then submitted.
    """
    base = absolute(load_config(source, overrides))
    parent, points = base.run_dir, sweep.all_points()
    if parent.exists():
        raise LaunchError(f"{parent} exists already; set another name for the sweep")
    names = point_names(points)
    configs = [
        _point_config(base, source, [*overrides, *_overrides(point)], name)
        for point, name in zip(points, names, strict=True)
    ]
    notes = local_notes("runs_dir", Path(base.runs_dir))
    for name, config in zip(names, configs, strict=True):
        try:
            notes += [note for note in check_run(config, cluster) if note not in notes]
        except (ConfigError, DataError) as error:
            raise type(error)(f"point {name}: {error}") from None
    cluster = mounted(cluster, configs, Path(base.runs_dir))
    folders = [next_submission_folder(config.run_dir) for config in configs]
    script = render(cluster, training_script(cluster, parent, folders, at_once=sweep.at_once or len(points)))
    answer = ask(script, cluster)
    if dry_run:
        return Submitted(job_ids=[], run_dir=parent, script=script, answer=answer, notes=notes)
    own = next_submission_folder(parent)
    kept = records(CODE)

    def record(job_id: str, _: str) -> None:
        record_job(parent, job_id, own, "sweep", job_name(parent))
        for number, (folder, config) in enumerate(zip(folders, configs, strict=True)):
            record_job(config.run_dir, f"{job_id}_{number}", folder, "sweep", job_name(parent))

    with claimed(parent, parent):
        for folder, config, point in zip(folders, configs, points, strict=True):
            write_submission(_submission(config, cluster, overrides, point), folder, kept)
        write_submission(_submission(base, cluster, overrides, {}), own, {SCRIPT: script, **kept})
        listed = [
            {"name": name, "run_dir": str(config.run_dir), "settings": dict(point)}
            for name, config, point in zip(names, configs, points, strict=True)
        ]
        write_text(launch_dir(parent) / "sweep.json", json.dumps({"points": listed}, indent=1) + "\n")
        ids = submit([own / SCRIPT], cluster, record)
    return Submitted(job_ids=ids, run_dir=parent, script=script, answer=answer, notes=notes)


def _point_config(base: RunConfig, source: str | Path, overrides: Sequence[str], name: str) -> RunConfig:
    try:
        config = absolute(load_config(source, overrides))
    except ConfigError as error:
        raise ConfigError(f"point {name}: {error}") from None
    if config.run_dir != base.run_dir:
        raise ConfigError(
            f"point {name}: a sweep cannot set name or runs_dir; the name of a point is made of its settings"
        )
    # All points are logged where the runs beside the sweep are, under one parent.
    uri = config.tracking.uri or f"sqlite:///{Path(base.runs_dir).resolve() / 'mlflow.db'}"
    tracking = dataclasses.replace(config.tracking, uri=uri, parent=base.name)
    return dataclasses.replace(config, runs_dir=str(base.run_dir), name=name, tracking=tracking)


def _submission(config: RunConfig, cluster: Cluster, overrides: Sequence[str], point: Mapping[str, Any]) -> Submission:
    return Submission(
        run_dir=config.run_dir,
        config=config,
        cluster=cluster,
        kind="sweep",
        world_size=cluster.world_size,
        overrides=(*overrides, *_overrides(point)),
    )


def _check_plain(setting: str, value: Any) -> None:
    try:
        json.dumps(value)
    except TypeError:
        raise ConfigError(
            f"{setting} has {value!s}, which YAML reads as a {type(value).__name__}; put it in quotes to set text"
        ) from None


def _overrides(point: Mapping[str, Any]) -> list[str]:
    return [f"{setting}={json.dumps(value)}" for setting, value in point.items()]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _flat(grid: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted settings of nested sections, which a reader of YAML may have made of dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in grid.items():
        name = f"{path}.{key}" if path else str(key)
        flat |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return flat
