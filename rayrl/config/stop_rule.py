"""When a run that learns may end early: `train.stop_when` and `sft.stop_when`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rayrl.errors import ConfigError, did_you_mean

__all__ = ["NoProgress", "StopRule", "parse_stop_rule"]

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
FORMS = (
    "METRIC >= NUMBER for EVALUATIONS or METRIC not improved for EVALUATIONS, on a command line in "
    "two pairs of quotes: \"{key}='eval/reward >= 0.9 for 2'\""
)
_BOUND = re.compile(r"(\S+?)\s*([<>=!]+)\s*(\S+)(?:\s+(\S+)\s+(\S+))?")
_NO_PROGRESS = re.compile(r"(\S+)\s+not\s+(\S+)\s+(\S+)\s+(\S+)")


@dataclass(frozen=True)
class StopRule:
    """A bound on a metric of the evaluations.

    Attributes:
        compare: >=, <=, > or <.
        times: evaluations in a row that must meet it.
    """

    metric: str
    compare: str
    bound: float
    times: int = 1

    def is_met(self, values: Sequence[float | None]) -> bool:
        """Whether the last `times` of the metric's values, oldest first, meet the bound.

        An evaluation that did not measure the metric (None) does not meet it.
        """
        last = values[-self.times :]
        meets = COMPARE[self.compare]
        return len(last) == self.times and all(
            value is not None and meets(value, self.bound) for value in last
        )


@dataclass(frozen=True)
class NoProgress:
    """Evaluations that may follow the best one, as `run.keep_best` judges it, with none better.

    Attributes:
        times: so many of them end the run.
    """

    metric: str
    times: int


def parse_stop_rule(key: str, text: str) -> StopRule | NoProgress | None:
    """Read `METRIC >= NUMBER for EVALUATIONS` or `METRIC not improved for EVALUATIONS`.

    Without `for`, one evaluation is enough to meet a bound. An empty text is no rule.

    Args:
        key: the setting that it is the value of, for messages.

    Raises:
        ConfigError: naming the word that is wrong, and the nearest that is right.
    """
    if not text:
        return None
    if found := _NO_PROGRESS.fullmatch(text.strip()):
        metric, improved, keyword, times = found.groups()
        _check_words(key, text, metric, ((improved, "improved"), (keyword, "for")))
        return NoProgress(metric, _count(key, text, times))
    found = _BOUND.fullmatch(text.strip())
    if found is None:
        raise _wrong(key, text, f"write {FORMS.format(key=key)}.")
    metric, compare, bound, keyword, times = found.groups()
    _check_words(key, text, metric, () if keyword is None else ((keyword, "for"),))
    if compare not in COMPARE:
        turned = [compare[::-1]] if compare[::-1] in COMPARE else COMPARE  # => for >=
        near = did_you_mean(compare, turned)
        raise _wrong(key, text, f"{compare!r} is none of {', '.join(COMPARE)}.{near}")
    try:
        number = float(bound)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(key, text, f"{bound!r} is no number; write {FORMS.format(key=key)}.")
    return StopRule(metric, compare, number, 1 if times is None else _count(key, text, times))


def _check_words(key: str, text: str, metric: str, words: Sequence[tuple[str, str]]) -> None:
    """Raise ConfigError if a word is not the expected one, or the metric is of no evaluation."""
    if not metric.startswith("eval/"):
        near = did_you_mean(metric, [f"eval/{metric.rpartition('/')[2]}"])
        raise _wrong(key, text, f"{metric!r} is no metric of an evaluation: eval/….{near}")
    for word, expected in words:
        if word != expected:
            near = did_you_mean(word, [expected])
            raise _wrong(
                key, text, f"{word!r} is not understood.{near} Write {FORMS.format(key=key)}."
            )


def _count(key: str, text: str, times: str) -> int:
    if not times.isdecimal() or int(times) < 1:
        raise _wrong(key, text, f"{times!r} is no number of evaluations, 1 or more.")
    return int(times)


def _wrong(key: str, text: str, why: str) -> ConfigError:
    return ConfigError(f"{key}={text}: {why}")
