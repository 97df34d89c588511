"""Timeline of a run: when each stage of a step ran, and how many episodes and requests were active.

A line of RUN/timeline.jsonl is one step; all times are wall-clock seconds, so that overlapping
steps share one axis:

    {"step": 3, "stages": [["collect", began, ended], …],
     "episodes": {"began": …, "width": …, "mean": […]}, "requests": {…}}

`episodes` is the mean number of live episodes in intervals of `width` seconds starting at `began`,
and `requests` the mean number of requests in flight to an engine. Both count the episodes that the
step was trained on or dropped, whenever they were played. Episode times come from the clock of
their env worker, so across nodes they are as exact as the nodes' clocks agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayrl.types import Group

__all__ = ["TIMELINE", "active_counts", "latest_steps", "timeline_row"]

Span = tuple[float, float]

TIMELINE = "timeline.jsonl"
BINS = 80
LATEST_STEPS = 50


def timeline_row(
    step: int, stages: Sequence[tuple[str, float, float]], groups: Iterable[Group]
) -> dict[str, Any]:
    """Return a step's line of timeline.jsonl.

    Args:
        stages: name, begin and end of each; a stage may occur several times.
        groups: groups played for the step, dropped ones included.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    live = [(e.began, e.began + e.seconds) for e in episodes if e.began]
    requests = [(t.began, t.began + t.seconds) for e in episodes for t in e.turns if t.began]
    return {
        "step": step,
        "stages": [[name, round(began, 4), round(ended, 4)] for name, began, ended in stages],
        "episodes": active_counts(live),
        "requests": active_counts(requests),
    }


def active_counts(spans: Sequence[Span], bins: int = BINS) -> dict[str, Any]:
    """Count the spans active at once, as the mean over each of `bins` intervals.

    Returns:
        `began` and the `width` of an interval in seconds, and `mean`, (bins,); empty without spans.
    """
    if not spans:
        return {}
    first = min(began for began, _ in spans)
    width = max(max(ended for _, ended in spans) - first, 1e-3) / bins
    covered = [0.0] * bins  # sum over spans of the share of each interval
    for began, ended in spans:
        low, high = (began - first) / width, (ended - first) / width
        i, j = min(int(low), bins - 1), min(int(high), bins - 1)
        if i == j:
            covered[i] += high - low
            continue
        covered[i] += i + 1 - low
        for k in range(i + 1, j):
            covered[k] += 1
        covered[j] += high - j
    return {
        "began": round(first, 4),
        "width": round(width, 6),
        "mean": [round(value, 2) for value in covered],
    }


def latest_steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the latest steps for the report, in seconds since the first stage among them."""
    latest = [row for row in rows if row.get("stages")][-LATEST_STEPS:]
    if not latest:
        return []
    zero = min(began for row in latest for _, began, _ in row["stages"])

    def shift(counts: Mapping[str, Any]) -> dict[str, Any]:
        return {**counts, "began": round(counts["began"] - zero, 3)} if counts else {}

    return [
        {
            "step": row["step"],
            "stages": [
                [name, round(b - zero, 3), round(e - zero, 3)] for name, b, e in row["stages"]
            ],
            **{key: shift(row.get(key) or {}) for key in ("episodes", "requests")},
        }
        for row in latest
    ]
