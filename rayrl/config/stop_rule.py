"""When a training run has reached what it is for: `train.stop_when`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rayrl.errors import ConfigError, did_you_mean

__all__ = ["StopRule", "parse_stop_rule"]

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
FORM = "METRIC >= NUMBER for EVALUATIONS, as 'eval/win >= 0.97 for 2'"
_WORDS = re.compile(r"(\S+?)\s*([<>=!]+)\s*(\S+)(?:\s+(\S+)\s+(\S+))?")


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


def parse_stop_rule(text: str) -> StopRule:
    """Read `METRIC >= NUMBER for EVALUATIONS`; without `for`, one evaluation is enough.

    Raises:
        ConfigError: naming the word that is wrong, and the nearest that is right.
    """
    found = _WORDS.fullmatch(text.strip())
    if found is None:
        raise _wrong(text, f"write {FORM}.")
    metric, compare, bound, keyword, times = found.groups()
    if not metric.startswith("eval/"):
        near = did_you_mean(metric, [f"eval/{metric.rpartition('/')[2]}"])
        raise _wrong(text, f"{metric!r} is no metric of an evaluation: eval/….{near}")
    if compare not in COMPARE:
        turned = [compare[::-1]] if compare[::-1] in COMPARE else COMPARE  # => for >=
        near = did_you_mean(compare, turned)
        raise _wrong(text, f"{compare!r} is none of {', '.join(COMPARE)}.{near}")
    try:
        number = float(bound)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(text, f"{bound!r} is no number; write {FORM}.")
    if keyword is None:
        return StopRule(metric, compare, number)
    if keyword != "for":
        near = did_you_mean(keyword, ["for"])
        raise _wrong(text, f"{keyword!r} is not understood.{near} Write {FORM}.")
    if not times.isdecimal() or int(times) < 1:
        raise _wrong(text, f"{times!r} is no number of evaluations, 1 or more.")
    return StopRule(metric, compare, number, int(times))


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"train.stop_when={text}: {why}")
