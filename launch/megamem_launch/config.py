"""The configuration of a run: one typed tree, from a named base, a YAML file and the command line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megamem.config import build, merge, parse_override, to_dict
from megamem.errors import ConfigError
from megamem.files import write_text
from megamem.memory.config import MemoryConfig
from megamem.models.config import ModelConfig
from megamem.observe.config import TrackingConfig
from megamem.parallel.config import ParallelConfig
from megamem.train.config import OptimizerConfig, TrainConfig
from megamem_checkpoints.config import CheckpointConfig
from megamem_data.config import DataConfig
from megamem_launch.bases import BASES
from megamem_launch.rundir import submission_folders


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that defines a run; saved as ``config.yaml`` in its directory, from which the run can be rebuilt."""

    name: str = "run"
    """Name of the run and of its directory below ``runs_dir``."""
    runs_dir: str = "runs"
    """Where runs are kept, relative to the current directory."""
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name == "..":
            raise ConfigError(f"name is {self.name!r}; set a plain directory name, without a path")

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return Path(self.runs_dir) / self.name


def load_config(source: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or the saved configuration of a run directory) and apply ``section.setting=value`` overrides.

    Precedence: the base that the file names with ``base: NAME`` < the file < overrides. ConfigError names the file, line or
    key that is wrong.
    """
    data: dict[str, Any] = {}
    if source is not None:
        data = read_yaml(Path(source))
    delta: dict[str, Any] = {}
    for text in overrides:
        delta = merge(delta, parse_override(text))
    data = merge(data, delta)
    base = data.pop("base", None)
    if base is not None:
        if not isinstance(base, str) or base not in BASES:
            raise ConfigError(f"base is {base!r}; set one of: {', '.join(sorted(BASES))}")
        data = merge(copy.deepcopy(BASES[base]), data)
    try:
        return build(RunConfig, data)
    except ConfigError as error:
        if source is not None and not overrides:
            raise ConfigError(f"{source}: {error}") from None
        raise


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, or of the saved configuration of a run directory; ConfigError names file and line."""
    if path.is_dir():
        # A run that was submitted and has not started yet has only what was submitted.
        kept = [folder / "config.yaml" for folder in submission_folders(path)[-1:]]
        path = next((file for file in (path / "config.yaml", *kept) if file.is_file()), path / "config.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}; give a YAML file or the directory of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a configuration") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold sections of settings at its top level")
    return merge({}, data)


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice, which plain YAML silently overwrites."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; :func:`load_config` of the file gives an equal one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heading = "# Resolved configuration of this run; `megamem train` on this directory rebuilds it.\n"
    write_text(path, heading + yaml.safe_dump(to_dict(config), sort_keys=False))
