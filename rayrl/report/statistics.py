"""Figures: what a set of episodes comes to, each with its 95% interval.

An environment says what is worth reporting of one episode (`Environment.figures`); the *type* of
each value says how episodes are put together:

    {"win/draw/loss": "draw",     one of the names between the slashes -> a count of each
     "invalid %": False,          a bool -> the share of episodes where it is true
     "format %": 0.75,            a number -> the mean; `%` in the name shows it times 100
     "moves": 5}

Without a hook every score is a mean. Nothing here knows what is being played. Intervals allow for
tasks that were played several times, and a figure of a single episode, or of a single task, has
none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayrl.environment.group_reward import score_of
from rayrl.errors import DataError, EnvError, describe_error, did_you_mean
from rayrl.report.intervals import effective_n, mean_interval, wilson
from rayrl.types import Episode, Task

__all__ = [
    "Figure",
    "Mean",
    "Share",
    "Split",
    "figure_from_dict",
    "measure",
    "percent",
    "scores_of",
    "task_key",
]

Value = bool | float | int | str
Hook = Callable[[Episode], Mapping[str, Value]]


Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Share:
    """An event seen in `count` of `n` episodes.

    Attributes:
        effective: how many independent episodes say as much; None: all `n` are.
    """

    count: int
    n: int
    effective: float | None = None

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.count / self.n if self.n else math.nan

    @property
    def interval(self) -> Interval | None:
        """Wilson's 95% interval; None for the share of what is worth a single episode."""
        n = self.n if self.effective is None else self.effective
        return wilson(self.value * n, n) if n > 1 else None

    def text(self) -> str:
        """The share in percent."""
        return percent(self.value)

    def interval_text(self) -> str:
        """The interval in percent; empty if there is none."""
        return "–".join(percent(bound) for bound in self.interval or ())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json; an interval that is not there becomes null."""
        low, high = self.interval or (None, None)
        return {
            "kind": "share",
            "count": self.count,
            "n": self.n,
            "value": _finite(self.value),
            "low": low,
            "high": high,
            **({} if self.effective is None else {"effective": self.effective}),
        }


@dataclass(frozen=True, slots=True)
class Split:
    """Which of several outcomes each of `n` episodes had: `counts` has them all, in order.

    Attributes:
        effective: as a share's, by outcome; empty: all `n` episodes are independent.
    """

    counts: Mapping[str, int]
    n: int
    effective: Mapping[str, float] = field(default_factory=dict)

    def share(self, outcome: str) -> Share:
        """One outcome's share."""
        return Share(self.counts[outcome], self.n, self.effective.get(outcome))

    def text(self) -> str:
        """The shares in percent, with slashes: `90/9/1`."""
        return "/".join(self.share(outcome).text() for outcome in self.counts)

    def interval_text(self) -> str:
        """The intervals in percent, in the same order; those that are not there are left out."""
        texts = [self.share(outcome).interval_text() for outcome in self.counts]
        return " · ".join(text for text in texts if text)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json."""
        shares = {outcome: self.share(outcome).to_dict() for outcome in self.counts}
        return {"kind": "split", "n": self.n, "counts": dict(self.counts), "shares": shares}


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of a number over `n` episodes; `in_percent` only says how it is shown.

    Bounds that are not finite say that there is no interval.
    """

    value: float
    low: float
    high: float
    n: int
    in_percent: bool = False

    @property
    def interval(self) -> Interval | None:
        """The 95% interval of the mean; None for the mean of a single episode or task."""
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return (self.low, self.high) if known else None

    def text(self) -> str:
        """The mean, in percent or with three decimals."""
        return self._show(self.value)

    def interval_text(self) -> str:
        """The interval, shown as the mean is; empty if there is none."""
        return "–".join(self._show(bound) for bound in self.interval or ())

    def _show(self, value: float) -> str:
        return percent(value) if self.in_percent else f"{value:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json; an interval that is not there becomes null."""
        return {
            "kind": "mean",
            "n": self.n,
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "percent": self.in_percent,
        }


Figure = Share | Split | Mean


def figure_from_dict(data: Mapping[str, Any]) -> Figure:
    """The inverse of `to_dict`.

    Raises:
        DataError: if `data` is not a figure.
    """
    try:
        kind = data["kind"]
        if kind == "share":
            effective = data.get("effective")
            known = None if effective is None else float(effective)
            return Share(int(data["count"]), int(data["n"]), known)
        if kind == "split":
            counts = {str(name): int(count) for name, count in data["counts"].items()}
            shares = data.get("shares", {})
            known_of = {
                str(name): float(share["effective"])
                for name, share in shares.items()
                if "effective" in share
            }
            return Split(counts, int(data["n"]), known_of)
        if kind == "mean":
            value, low, high = (
                default if data[key] is None else float(data[key])
                for key, default in (("value", math.nan), ("low", -math.inf), ("high", math.inf))
            )
            return Mean(value, low, high, int(data["n"]), bool(data["percent"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not a figure: {data!r} ({error!r})") from error
    raise DataError(f"not a figure: kind {kind!r} is none of share, split, mean")


def scores_of(episode: Episode) -> dict[str, float]:
    """An episode's scores under one level of names: `win`, or `x.win` with several seats."""
    if len(episode.scores) == 1:
        (scores,) = episode.scores.values()
        return dict(scores)
    return {
        f"{seat}.{name}": value
        for seat, scores in episode.scores.items()
        for name, value in scores.items()
    }


def task_key(task: Task) -> str:
    """The same text for equal tasks, whether they were drawn or read from a file."""
    return json.dumps(task.to_dict(), default=repr)


def measure(episodes: Sequence[Episode], hook: Hook | None = None) -> dict[str, Figure]:
    """Figures of the episodes that ended with a score, in the order the hook names them.

    Failed episodes have no scores and are left out; callers report how many there were. Without a
    hook, the mean of a score is over the episodes that have it: tool calls are counted only where
    tools were offered. Episodes of equal tasks (the seed is part of a task) are clustered.

    Raises:
        EnvError: if the hook raises, names different figures for different episodes, gives an
            outcome that is not in the figure's name, or what is no finite number.
    """
    valid = [e for e in episodes if e.failure is None]
    rows = [_row(hook or scores_of, e) for e in valid]
    tasks = [task_key(e.task) for e in valid]
    if not rows:
        return {}
    names = list(dict.fromkeys(name for row in rows for name in row))
    for row in rows if hook else ():
        if row.keys() != rows[0].keys():
            odd = sorted(row.keys() ^ rows[0].keys())
            raise EnvError(
                f"figures differ between episodes: {', '.join(odd)} not in all of them; "
                "return every figure for every episode"
            )
    figures = {}
    for name in names:
        having = [k for k, row in enumerate(rows) if name in row]
        figures[name] = _combine(name, [rows[k][name] for k in having], [tasks[k] for k in having])
    return figures


def _row(hook: Hook, episode: Episode) -> dict[str, Value]:
    try:
        return dict(hook(episode))
    except Exception as error:
        raise EnvError(f"statistics of episode {episode.id}: {describe_error(error)}") from error


def _combine(name: str, values: Sequence[Value], tasks: Sequence[str]) -> Figure:
    n, repeated = len(values), len(set(tasks)) < len(values)
    if all(isinstance(value, bool) for value in values):
        seen = [float(value) for value in values]
        return Share(int(sum(seen)), n, effective_n(seen, tasks) if repeated else None)
    if all(isinstance(value, str) for value in values):
        outcomes = name.removesuffix("%").strip().split("/")
        for value in values:
            if value not in outcomes:
                raise EnvError(
                    f"figure {name!r} is {value!r} in some episode, but its name offers only "
                    f"{', '.join(outcomes)}.{did_you_mean(str(value), outcomes)}"
                )
        effective = {
            outcome: effective_n([float(value == outcome) for value in values], tasks)
            for outcome in (outcomes if repeated else ())
        }
        return Split({outcome: values.count(outcome) for outcome in outcomes}, n, effective)
    if any(isinstance(value, str) for value in values):
        raise EnvError(f"figure {name!r} is text in some episodes and a number in others")
    try:
        numbers = [score_of(value) for value in values]
    except ValueError as error:
        raise EnvError(f"figure {name!r} of some episode: {error}") from error
    return _mean(numbers, tasks, in_percent=name.endswith("%"))


def _mean(numbers: Sequence[float], tasks: Sequence[str], in_percent: bool) -> Mean:
    """Numbers that are all 0 or 1 are an event: their mean has the interval of a share."""
    mean, low, high = mean_interval(numbers, tasks)
    if set(numbers) <= {0.0, 1.0}:
        effective = effective_n(numbers, tasks)
        bounds = Share(int(sum(numbers)), len(numbers), effective).interval
        low, high = bounds or (-math.inf, math.inf)
    elif in_percent and math.isfinite(low) and min(numbers) >= 0 and max(numbers) <= 1:
        low, high = max(0.0, low), min(1.0, high)
    return Mean(mean, low, high, len(numbers), in_percent)


def percent(share: float) -> str:
    """A share in percent with as many decimals as it needs: 100, 97.5, 0.3."""
    if not math.isfinite(share):
        return "?" if math.isnan(share) else ("-∞" if share < 0 else "∞")
    return f"{100 * share:.1f}".removesuffix(".0")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
