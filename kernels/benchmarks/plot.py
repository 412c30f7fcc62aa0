"""The chart of a benchmark run: every peer's time as a multiple of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "megamem", "svg.fonttype": "none", "font.size": 9})

from matplotlib import pyplot as plt  # noqa: E402 - after the choice of a form without a display
from matplotlib.ticker import ScalarFormatter  # noqa: E402

_FASTER, _SLOWER, _INK = "#2b6cb0", "#c2610c", "#22252a"


def plot_ratios(results: list[dict[str, Any]], path: Path) -> None:
    """Write an SVG with one bar per peer that was measured.

    Args:
        results: ``cases`` of ``bench.json``.
        path: Where the picture goes.
    """
    labels: list[str] = []
    figure, axes = plt.subplots(layout="constrained")
    for result in results:
        peers = [entry for entry in result["contenders"] if "ratio_min" in entry]
        if peers:
            title = {"xycoords": ("axes fraction", "data"), "va": "center", "weight": "bold", "fontsize": 8}
            axes.annotate(result["case"], (0.0, len(labels)), **title)
            labels.append("")
        for entry in peers:
            y, ratio = len(labels), entry["ratio_min"]
            labels.append(entry["name"])
            axes.barh(y, ratio - 1, left=1, height=0.6, color=_FASTER if ratio >= 1 else _SLOWER)
            axes.plot(entry["ratio_median"], y, "|", color=_INK, markersize=9)
            if "bar" in entry:
                axes.plot(entry["bar"], y, "D", color=_INK, markersize=4)
            axes.annotate(f"{ratio:.2f}", (1.01, y), xycoords=("axes fraction", "data"), va="center")
    figure.set_size_inches(9, 1.0 + 0.24 * len(labels))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.axvline(1, color=_INK, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time of the peer over ours: fastest rounds (bars), medians (strokes), what is demanded (diamonds)")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
