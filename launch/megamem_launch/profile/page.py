"""The profile as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megamem.files import write_text
from megamem.observe.allocations import KINDS
from megamem.observe.phases import NAMES
from megamem_launch.profile.table import Sheet, headlines, sheets

Bar = dict[str, Any]


def write_page(profile: Mapping[str, Any], out: Path) -> Path:
    """Write ``profile.html`` of a profile beside its traces."""
    subtitle = " · ".join(
        [
            f"{profile['world_size']} x {profile['device']}",
            profile["precision"],
            " ".join(f"{name}={size}" for name, size in profile["layout"].items() if size > 1) or "one rank",
            f"{profile['windows']['measured']} steps of {profile['batch']['global']} x {profile['batch']['seq_length']} tokens",
            profile["time"],
        ]
    )
    held = max(profile["memory"]["held_bytes"])
    return _write(
        out / "profile.html",
        title=profile["name"],
        subtitle=subtitle,
        headlines=headlines(profile),
        charts=[
            ("Step time by phase", _bars(profile["breakdown"]["ranks"], NAMES, profile["breakdown"]["step_seconds"])),
            ("Peak memory by kind", _bars(profile["memory"]["ranks"], KINDS, [held] * profile["world_size"])),
        ],
        sheets=sheets(profile),
        files=[*profile["traces"], *profile["snapshots"], "profile.json"],
        plot=Markup(""),
    )


def write_sweep_page(name: str, sheet: Sheet, plot: str, links: Sequence[str], out: Path) -> Path:
    """Write ``sweep.html``: ``plot`` is an SVG, ``links`` the pages of the points."""
    return _write(
        out / "sweep.html",
        title=f"{name}: sweep",
        subtitle="",
        headlines=[],
        charts=[],
        sheets=[sheet],
        files=[*links, "sweep.json"],
        plot=Markup(plot),  # made here, not by a user
    )


def _bars(ranks: Sequence[Mapping[str, float]], names: Sequence[str], whole: Sequence[float]) -> list[Bar]:
    """For every rank, the share of ``whole`` that each name has."""
    return [
        {
            "label": f"rank {rank}",
            "parts": [
                {"name": name, "color": names.index(name), "share": max(0.0, values[name] / whole[rank])}
                for name in names
                if name in values
            ],
        }
        for rank, values in enumerate(ranks)
    ]


def _write(path: Path, **content: Any) -> Path:
    environment = Environment(
        loader=PackageLoader("megamem_launch.profile"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template("profile.html.j2").render(**content))
    return path
