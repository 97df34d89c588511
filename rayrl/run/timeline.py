"""Who waited for whom: when the stages of a step were, and how much was played meanwhile.

A line of RUN/timeline.jsonl is one step; all times are wall-clock seconds, so that what several
steps did at once can be laid over each other:

    {"step": 3, "stages": [["collect", began, ended], …],
     "episodes": {"began": …, "width": …, "mean": […]}, "requests": {…}}

`episodes` has the mean number of live ones in intervals of `width` seconds from `began` on, and
`requests` that of completions an engine was asked for and had not given. Each is of the episodes
the step was trained on (and of those it dropped), whenever they were played. Times of episodes are
those of their env worker's clock: on several nodes the lanes are as exact as the nodes' clocks
agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayrl.types import Group

__all__ = ["TIMELINE", "curve", "row", "shown"]

Span = tuple[float, float]

TIMELINE = "timeline.jsonl"
BINS = 80
STEPS_SHOWN = 50


def row(
    step: int, stages: Sequence[tuple[str, float, float]], groups: Iterable[Group]
) -> dict[str, Any]:
    """A line of timeline.jsonl.

    Args:
        stages: name, begin and end of each; a stage may be there several times.
        groups: what was played for the step, dropped groups included.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    live = [(e.began, e.began + e.seconds) for e in episodes if e.began]
    asked = [(t.began, t.began + t.seconds) for e in episodes for t in e.turns if t.began]
    return {
        "step": step,
        "stages": [[name, round(began, 4), round(ended, 4)] for name, began, ended in stages],
        "episodes": curve(live),
        "requests": curve(asked),
    }


def curve(spans: Sequence[Span], bins: int = BINS) -> dict[str, Any]:
    """How many spans there were at once: the mean over each of `bins` intervals.

    Returns:
        `began`, `width` of an interval in seconds, and `mean`; nothing without spans.
    """
    if not spans:
        return {}
    first = min(began for began, _ in spans)
    width = max(max(ended for _, ended in spans) - first, 1e-3) / bins
    filled = [0.0] * bins  # intervals that a span covers, in all
    for began, ended in spans:
        low, high = (began - first) / width, (ended - first) / width
        i, j = min(int(low), bins - 1), min(int(high), bins - 1)
        if i == j:
            filled[i] += high - low
            continue
        filled[i] += i + 1 - low
        for k in range(i + 1, j):
            filled[k] += 1
        filled[j] += high - j
    return {
        "began": round(first, 4),
        "width": round(width, 6),
        "mean": [round(value, 2) for value in filled],
    }


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last steps for the picture, with times in seconds since the first stage among them."""
    last = [one for one in rows if one.get("stages")][-STEPS_SHOWN:]
    if not last:
        return []
    zero = min(began for one in last for _, began, _ in one["stages"])
    return [
        {
            "step": one["step"],
            "stages": [
                [name, round(b - zero, 3), round(e - zero, 3)] for name, b, e in one["stages"]
            ],
            **{lane: _moved(one.get(lane) or {}, zero) for lane in ("episodes", "requests")},
        }
        for one in last
    ]


def _moved(found: Mapping[str, Any], zero: float) -> dict[str, Any]:
    return {**found, "began": round(found["began"] - zero, 3)} if found else {}
