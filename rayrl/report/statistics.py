"""Evaluation statistics: aggregates over episodes with 95% intervals.

An environment may choose what to report of an episode (`Environment.figures`); the *type* of each
value determines the statistic:

    {"win/draw/loss": "draw",     one of the names between the slashes -> a count of each
     "invalid %": False,          a bool -> the share of episodes where it is true
     "format %": 0.75,            a number -> the mean; `%` in the name shows it times 100
     "moves": 5}

Without this hook, the mean of every score is reported. Intervals allow for tasks that were played
several times; statistics of a single episode or task have no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayrl.environment.group_reward import score_of
from rayrl.environment.scoring import scores_of
from rayrl.environment.tasks import task_key
from rayrl.errors import DataError, EnvError, describe_error, did_you_mean
from rayrl.run.evaluation.intervals import effective_n, score_interval, wilson
from rayrl.types import Episode

__all__ = [
    "Mean",
    "Share",
    "Split",
    "Statistic",
    "eval_statistics",
    "percent",
    "statistic_from_dict",
]

Value = bool | float | int | str
Hook = Callable[[Episode], Mapping[str, Value]]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Share:
    """Share of episodes with an event: `count` of `n`.

    Attributes:
        effective: effective sample size (`intervals.effective_n`); None if it is `n`.
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
        """Wilson's 95% interval; None if the effective sample size is at most 1."""
        n = self.n if self.effective is None else self.effective
        return wilson(self.value * n, n) if n > 1 else None

    def text(self) -> str:
        """The share in percent."""
        return percent(self.value)

    def interval_text(self) -> str:
        """The interval in percent; empty without one."""
        return "–".join(percent(bound) for bound in self.interval or ())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json; a missing interval becomes null."""
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
    """Counts of the outcomes of `n` episodes.

    Attributes:
        counts: by outcome, in display order.
        effective: effective sample size by outcome; empty if it is `n`.
    """

    counts: Mapping[str, int]
    n: int
    effective: Mapping[str, float] = field(default_factory=dict)

    def share(self, outcome: str) -> Share:
        """Share of one outcome."""
        return Share(self.counts[outcome], self.n, self.effective.get(outcome))

    def text(self) -> str:
        """The shares in percent, with slashes: `90/9/1`."""
        return "/".join(self.share(outcome).text() for outcome in self.counts)

    def interval_text(self) -> str:
        """The intervals in percent, in the same order, without missing ones."""
        texts = [self.share(outcome).interval_text() for outcome in self.counts]
        return " · ".join(text for text in texts if text)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json."""
        shares = {outcome: self.share(outcome).to_dict() for outcome in self.counts}
        return {"kind": "split", "n": self.n, "counts": dict(self.counts), "shares": shares}


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean of a number over `n` episodes; `in_percent` affects only its text.

    Infinite bounds mean that there is no interval.
    """

    value: float
    low: float
    high: float
    n: int
    in_percent: bool = False

    @property
    def interval(self) -> Interval | None:
        """95% interval of the mean; None for the mean of a single episode or task."""
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return (self.low, self.high) if known else None

    def text(self) -> str:
        """The mean, in percent or with three decimals."""
        return self._format(self.value)

    def interval_text(self) -> str:
        """The interval in the format of the mean; empty without one."""
        return "–".join(self._format(bound) for bound in self.interval or ())

    def _format(self, value: float) -> str:
        return percent(value) if self.in_percent else f"{value:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json; a missing interval becomes null."""
        return {
            "kind": "mean",
            "n": self.n,
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "percent": self.in_percent,
        }


Statistic = Share | Split | Mean


def statistic_from_dict(data: Mapping[str, Any]) -> Statistic:
    """Restore a statistic from its `to_dict`.

    Raises:
        DataError: `data` is not a statistic.
    """
    try:
        kind = data["kind"]
        if kind == "share":
            effective = data.get("effective")
            effective = None if effective is None else float(effective)
            return Share(int(data["count"]), int(data["n"]), effective)
        if kind == "split":
            counts = {str(name): int(count) for name, count in data["counts"].items()}
            effective_by_outcome = {
                str(name): float(share["effective"])
                for name, share in data.get("shares", {}).items()
                if "effective" in share
            }
            return Split(counts, int(data["n"]), effective_by_outcome)
        if kind == "mean":
            value, low, high = (
                default if data[key] is None else float(data[key])
                for key, default in (("value", math.nan), ("low", -math.inf), ("high", math.inf))
            )
            return Mean(value, low, high, int(data["n"]), bool(data["percent"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not a statistic: {data!r} ({error!r})") from error
    raise DataError(f"not a statistic: kind {kind!r} is none of share, split, mean")


def eval_statistics(episodes: Sequence[Episode], hook: Hook | None = None) -> dict[str, Statistic]:
    """Aggregate the episodes that ended with a score.

    Failed episodes have no scores and are left out; callers report their number. Without `hook`,
    the mean of a score is over the episodes that have it: tool calls are counted only where tools
    were offered. Episodes of equal tasks (the seed is part of a task) are clustered.

    Args:
        hook: values to report of an episode, by name; None: its scores.

    Returns:
        Statistics by name, in the order of the names in the first episodes.

    Raises:
        EnvError: `hook` raises, returns different names for different episodes, an outcome that is
            not in its name, or a number that is not finite.
    """
    valid = [e for e in episodes if e.failure is None]
    rows: list[dict[str, Value]] = []
    for episode in valid:
        try:
            rows.append(dict((hook or scores_of)(episode)))
        except Exception as error:
            what = f"statistics of episode {episode.id}: {describe_error(error)}"
            raise EnvError(what) from error
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
    result = {}
    for name in names:
        having = [k for k, row in enumerate(rows) if name in row]
        result[name] = _aggregate(name, [rows[k][name] for k in having], [tasks[k] for k in having])
    return result


def _aggregate(name: str, values: Sequence[Value], tasks: Sequence[str]) -> Statistic:
    n, repeated = len(values), len(set(tasks)) < len(values)
    if all(isinstance(value, bool) for value in values):
        events = [float(value) for value in values]
        return Share(int(sum(events)), n, effective_n(events, tasks) if repeated else None)
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
    """Mean of numbers; if all are 0 or 1 they are an event, and it gets the interval of a share."""
    mean, low, high = score_interval(numbers, tasks)
    events = set(numbers) <= {0.0, 1.0}
    if not events and in_percent and math.isfinite(low) and min(numbers) >= 0 and max(numbers) <= 1:
        low, high = max(0.0, low), min(1.0, high)
    return Mean(mean, low, high, len(numbers), in_percent)


def percent(share: float) -> str:
    """Format a share in percent with at most one decimal: 100, 97.5, 0.3."""
    if not math.isfinite(share):
        return "?" if math.isnan(share) else ("-∞" if share < 0 else "∞")
    return f"{100 * share:.1f}".removesuffix(".0")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
