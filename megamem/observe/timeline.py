"""The time line of a run: when its incarnations ran, and what happened meanwhile, against the clock."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup, escape

from megamem.observe.chart_axes import Axis, label
from megamem.observe.progress import format_duration
from megamem.observe.report_events import TROUBLE, Event, spans

_LANES = (
    ("checkpoints", ("checkpoint",)),
    ("skipped steps", ("skip",)),
    ("saved or stopped on request", ("save_requested", "stop_requested", "time_limit", "preempted", "cancelled")),
    ("trouble", TROUBLE),
)
_LEFT, _RIGHT, _LANE, _WIDTH = 190, 14, 26, 1080
_UNITS = ((86400 * 3, 86400, "days"), (3600 * 3, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))


def timeline(events: list[Event], last: float) -> Markup:
    """An ``<svg>`` of the run against the clock, one lane for each kind of event that there is; empty without events.

    ``last``: time of the last measurement [s since 1970].
    """
    runs = spans(events, last)
    if not runs:
        return Markup("")
    begin, end = runs[0][0], max(runs[-1][1], last, events[-1].time)
    unit, name = next((seconds, word) for limit, seconds, word in _UNITS if end - begin >= limit)
    axis = Axis.over(0.0, max((end - begin) / unit, 1e-3), _LEFT, _WIDTH - _RIGHT, log=False)
    lanes = [(title, shown) for title, names in _LANES if (shown := [e for e in events if e.name in names])]
    bottom = 8 + _LANE * (len(lanes) + 1)
    parts = [f'<svg class="chart timeline" viewBox="0 0 {_WIDTH} {bottom + 22}" role="img" aria-label="Time line">']
    for tick in axis.ticks(10):
        x = axis.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{bottom + 16}">{label(tick)}</text>')
    parts.append(f'<text class="tick end" x="{_LEFT - 12}" y="{bottom + 16}">{name}</text>')
    parts.append(_title("training", 0))
    for start, stop, ended in runs:
        left, right = axis.place((start - begin) / unit), axis.place((stop - begin) / unit)
        text = f"{format_duration(stop - start)}, {'running or cut off' if ended.name in ('start', 'resume') else ended.name}"
        parts.append(
            f'<rect class="span" x="{left:.1f}" y="12" width="{max(right - left, 2):.1f}" height="16" rx="3">'
            f"<title>{escape(text)}</title></rect>"
        )
    for number, (title, shown) in enumerate(lanes, start=1):
        parts.append(_title(title, number))
        middle = 20 + _LANE * number
        for event in shown:
            x = float(np.clip(axis.place((event.time - begin) / unit), _LEFT, _WIDTH - _RIGHT))
            text = f"{event.name.replace('_', ' ')} at step {event.step}" + (
                f": {event.details}" if event.details else ""
            )
            parts.append(
                f'<rect class="tick-mark {event.kind}" x="{x - 2.5:.1f}" y="{middle - 7}" width="5" height="14" rx="2">'
                f"<title>{escape(text)}</title></rect>"
            )
    return Markup("".join([*parts, "</svg>"]))


def _title(text: str, lane: int) -> str:
    return f'<text class="tick end" x="{_LEFT - 12}" y="{24 + _LANE * lane}">{text}</text>'
