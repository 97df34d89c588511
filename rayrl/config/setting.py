"""One setting: its default, meaning and range, all on the dataclass field."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from rayrl.errors import did_you_mean

__all__ = ["Setting", "setting"]

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What a setting means and which values it takes.

    The range of a mapping is that of each of its values. null is always in range, a NaN in none.

    Attributes:
        meaning: in a line of a help page, with units.
        choices: the values it takes; empty: any.
        open: besides, `module:function` or `path/to/file.py:function`: any text with a colon.
        least: lower bound, included.
        above: lower bound, excluded.
        most: upper bound, included.
    """

    meaning: str
    choices: tuple[Any, ...] = ()
    open: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None

    def complaint(self, value: Any) -> str:
        """Why a value is out of range, as in "must be 0 or more."; empty if it is in range."""
        if value is None:
            return ""
        if self.choices and value not in self.choices and not (self.open and ":" in str(value)):
            known = [*map(str, self.choices)]
            also = ", or module:function or path/to/file.py:function" if self.open else ""
            return f"must be one of {', '.join(known)}{also}.{did_you_mean(str(value), known)}"
        fits = (  # in these forms a NaN does not
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )
        return "" if fits else f"must be {self._range()}."

    def _range(self) -> str:
        if self.most is None:
            return f"{self.least} or more" if self.above is None else f"more than {self.above}"
        if self.above is not None:
            return f"more than {self.above} and at most {self.most}"
        return f"at most {self.most}" if self.least is None else f"from {self.least} to {self.most}"


def setting(
    default: T,
    meaning: str,
    *,
    choices: Sequence[Any] = (),
    open: bool = False,  # noqa: A002  # as Setting has it
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> T:
    """A dataclass field with `default`, which each instance gets a copy of, and its `Setting`."""
    metadata = {"setting": Setting(meaning, tuple(choices), open, least, above, most)}
    if isinstance(default, list | dict):
        return cast(T, field(default_factory=lambda: copy.deepcopy(default), metadata=metadata))
    return field(default=default, metadata=metadata)
