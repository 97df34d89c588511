"""What every setting means: the comment beside it, or above it, in `schema.py`."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rayrl.config.schema import Config

__all__ = ["meanings"]

_FIELD = re.compile(r"    (\w+): [^#]*?(?:  # (.*))?")


@functools.cache
def meanings() -> Mapping[str, str]:
    """Dotted key of every setting -> its meaning; empty where its name says it."""
    return dict(_of(Config, ""))


def _of(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    said = _comments(node)
    hints = typing.get_type_hints(node)
    for one in fields(node):
        key = f"{prefix}{one.name}"
        if not is_dataclass(hints[one.name]):
            yield key, said[one.name]
            continue
        for inner, meaning in _of(hints[one.name], f"{key}."):
            yield inner, "; ".join(filter(None, (said[one.name], meaning)))


def _comments(node: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(node).splitlines():
        if line.strip().startswith("#"):
            above.append(line.strip("# "))
        elif match := _FIELD.fullmatch(line):
            found[match[1]] = match[2] or " ".join(above)
            above = []
        else:
            above = []
    return found
