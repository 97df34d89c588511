"""Figures: what a set of episodes comes to, each with its 95% interval.

An environment says what is worth reporting of one episode (`Environment.figures`); the *type* of
each value says how episodes are put together:

    {"win/draw/loss": "draw",     one of the names between the slashes -> a count of each
     "invalid %": False,          a bool -> the share of episodes where it is true
     "format %": 0.75,            a number -> the mean; `%` in the name shows it times 100
     "moves": 5}

Without a hook every score is a mean. Nothing here knows what is being played.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.errors import DataError, EnvError, described, did_you_mean
from rayrl.groups import score_of
from rayrl.intervals import mean_interval, wilson
from rayrl.types import Episode

__all__ = [
    "Figure",
    "Mean",
    "Share",
    "Split",
    "figure_from_dict",
    "measure",
    "percent",
    "scores_of",
]

Value = bool | float | int | str
Hook = Callable[[Episode], Mapping[str, Value]]


@dataclass(frozen=True, slots=True)
class Share:
    """An event seen in `count` of `n` episodes."""

    count: int
    n: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.count / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval."""
        return wilson(self.count, self.n)

    def text(self) -> str:
        """The share in percent."""
        return percent(self.value)

    def interval_text(self) -> str:
        """The interval in percent."""
        return "–".join(percent(bound) for bound in self.interval)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json."""
        low, high = self.interval
        return {
            "kind": "share",
            "count": self.count,
            "n": self.n,
            "value": _finite(self.value),
            "low": low,
            "high": high,
        }


@dataclass(frozen=True, slots=True)
class Split:
    """Which of several outcomes each of `n` episodes had: `counts` has them all, in order."""

    counts: Mapping[str, int]
    n: int

    def share(self, outcome: str) -> Share:
        """One outcome's share."""
        return Share(self.counts[outcome], self.n)

    def text(self) -> str:
        """The shares in percent, with slashes: `90/9/1`."""
        return "/".join(self.share(outcome).text() for outcome in self.counts)

    def interval_text(self) -> str:
        """The intervals in percent, in the same order."""
        return " · ".join(self.share(outcome).interval_text() for outcome in self.counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json."""
        shares = {outcome: self.share(outcome).to_dict() for outcome in self.counts}
        return {"kind": "split", "n": self.n, "counts": dict(self.counts), "shares": shares}


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of a number over `n` episodes; `in_percent` only says how it is shown."""

    value: float
    low: float
    high: float
    n: int
    in_percent: bool = False

    @property
    def interval(self) -> tuple[float, float]:
        """The normal 95% interval of the mean."""
        return (self.low, self.high)

    def text(self) -> str:
        """The mean, in percent or with three decimals."""
        return self._show(self.value)

    def interval_text(self) -> str:
        """The interval, shown as the mean is."""
        return "–".join(self._show(bound) for bound in self.interval)

    def _show(self, value: float) -> str:
        return percent(value) if self.in_percent else f"{value:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for eval.json; an unbounded interval becomes null."""
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
            return Share(int(data["count"]), int(data["n"]))
        if kind == "split":
            counts = {str(name): int(count) for name, count in data["counts"].items()}
            return Split(counts, int(data["n"]))
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


def measure(episodes: Sequence[Episode], hook: Hook | None = None) -> dict[str, Figure]:
    """Figures of the episodes that ended with a score, in the order the hook names them.

    Failed episodes have no scores and are left out; callers report how many there were. Without a
    hook, the mean of a score is over the episodes that have it: tool calls are counted only where
    tools were offered.

    Raises:
        EnvError: if the hook raises, names different figures for different episodes, gives an
            outcome that is not in the figure's name, or what is no finite number.
    """
    rows = [_row(hook or scores_of, e) for e in episodes if e.failure is None]
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
    return {name: _combine(name, [row[name] for row in rows if name in row]) for name in names}


def _row(hook: Hook, episode: Episode) -> dict[str, Value]:
    try:
        return dict(hook(episode))
    except Exception as error:
        raise EnvError(f"figures of episode {episode.id}: {described(error)}") from error


def _combine(name: str, values: Sequence[Value]) -> Figure:
    if all(isinstance(value, bool) for value in values):
        return Share(sum(map(bool, values)), len(values))
    if all(isinstance(value, str) for value in values):
        outcomes = name.removesuffix("%").strip().split("/")
        for value in values:
            if value not in outcomes:
                raise EnvError(
                    f"figure {name!r} is {value!r} in some episode, but its name offers only "
                    f"{', '.join(outcomes)}.{did_you_mean(str(value), outcomes)}"
                )
        return Split({outcome: values.count(outcome) for outcome in outcomes}, len(values))
    if any(isinstance(value, str) for value in values):
        raise EnvError(f"figure {name!r} is text in some episodes and a number in others")
    try:
        numbers = [score_of(value) for value in values]
    except ValueError as error:
        raise EnvError(f"figure {name!r} of some episode: {error}") from error
    return Mean(*mean_interval(numbers), len(numbers), in_percent=name.endswith("%"))


def percent(share: float) -> str:
    """A share in percent with as many decimals as it needs: 100, 97.5, 0.3."""
    if not math.isfinite(share):
        return "?" if math.isnan(share) else ("-∞" if share < 0 else "∞")
    return f"{100 * share:.1f}".removesuffix(".0")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
