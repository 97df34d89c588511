"""Gymnasium's spaces as text: how an observation reads, and which replies are actions.

An action is the whole reply or what stands between `<action>` and `</action>`: the number of one of
`Discrete` actions or its name, the numbers of a `Box`, `MultiDiscrete` or `MultiBinary` space,
anything that a `Text` space has.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from rayrl.errors import ConfigError

__all__ = [
    "any_action",
    "check_actions",
    "check_observations",
    "choices",
    "instruction",
    "listed",
    "parse",
    "plain",
    "readable",
]

_TAGGED = re.compile(r"<action>(.*?)</action>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_HIGHLIGHT = re.compile(r"\x1b\[4\d(?:;1)?m(.*?)\x1b\[0m", re.DOTALL)  # where the agent is, say
_COLOUR = re.compile(r"\x1b\[3(\d)(?:;1)?m(.*?)\x1b\[0m", re.DOTALL)
_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NUMERIC = (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)
_LONG = 16  # numbers of a vector beyond which zeros are left out
_ONE_BOARD = 3  # planes that are drawn into one board


def check_actions(where: str, space: Any, names: Sequence[str]) -> None:
    """Check that actions can be written as text, and that names fit them.

    Args:
        where: what the space is of, for errors.
        names: of `Discrete` actions, in order; empty: their numbers.

    Raises:
        ConfigError: they cannot, or do not.
    """
    if not isinstance(space, (spaces.Discrete, spaces.Text, *_NUMERIC)):
        raise ConfigError(
            f"{where} has actions of {space}, which have no text here: Discrete, MultiDiscrete, "
            "MultiBinary, Box and Text have. Wrap it in an environment of your own, see "
            "rayrl.from_gymnasium."
        )
    if not names:
        return
    if not isinstance(space, spaces.Discrete):
        raise ConfigError(f"env.args.actions: {where} has no actions to name: {space}")
    if len(names) != int(space.n):
        raise ConfigError(
            f"env.args.actions has {len(names)} names, and {where} has {space.n} actions"
        )
    if len({name.strip().lower() for name in names}) < len(names):
        raise ConfigError("env.args.actions: two names are the same")
    for name in names:
        if name != name.strip() or not name or "," in name or "\n" in name:
            raise ConfigError(f"env.args.actions: {name!r} is no name: give words without commas")


def check_observations(where: str, space: Any) -> None:
    """Check that observations can be written as text.

    Raises:
        ConfigError: they are images, or more than three dimensions deep.
    """
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            check_observations(f"{where} ({key})", part)
    elif isinstance(space, spaces.Tuple):
        for part in space.spaces:
            check_observations(where, part)
    elif isinstance(space, spaces.Box):
        if space.dtype == np.uint8 and len(space.shape) > 1 and int(space.high.max()) == 255:
            raise ConfigError(
                f"{where} shows images of {' × '.join(map(str, space.shape))}, which have no text. "
                "Set env.args.make to a form with other observations if it has one, or wrap it in "
                "an environment of your own."
            )
        if len(space.shape) > 3:
            raise ConfigError(f"{where} has observations of shape {space.shape}, which has no text")


def instruction(space: Any, names: Iterable[str] = ()) -> str:
    """What a model is told about the actions.

    Args:
        names: of the `Discrete` actions that can be taken now; empty: all, by their numbers.
    """
    names = list(names)
    if isinstance(space, spaces.Discrete):
        first = int(space.start)
        actions = listed(names or [str(first + k) for k in range(int(space.n))])
        numbered = not names or all(re.fullmatch(r"-?\d+", name) for name in names)
        what = "with the number of one only" if numbered else "with one of them only"
        return f"Actions: {actions}. Answer {what}."
    if isinstance(space, spaces.Text):
        of = space.characters
        return f"Answer with {space.min_length} to {space.max_length} of the characters {of}"
    ends = zip(*_bounds(space), strict=True)
    ranges = ", ".join(f"{low:g} to {high:g}" for low, high in ends)
    whole = "whole " if np.issubdtype(space.dtype, np.integer) else ""
    return f"An action has these {whole}numbers: {ranges}. Answer with the numbers only."


def listed(names: Sequence[str]) -> str:
    """Names in a row; three or more numbers that follow each other as their range."""
    if not all(re.fullmatch(r"-?\d+", name) for name in names):
        return ", ".join(names)
    runs = []
    numbers = [int(name) for name in names]
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run]
    return ", ".join(runs)


def choices(space: Any, names: Sequence[str]) -> dict[str, int]:
    """`Discrete` actions by the name or number that stands for each; of other spaces none."""
    if not isinstance(space, spaces.Discrete):
        return {}
    first = int(space.start)
    return {(names[k] if names else str(first + k)): first + k for k in range(int(space.n))}


def parse(reply: str, space: Any, offered: Mapping[str, int]) -> Any:
    """The action that a reply is; None if it is none.

    Args:
        offered: `Discrete` actions that can be taken, by name.
    """
    tagged = _TAGGED.findall(reply)
    text = (tagged[-1] if tagged else reply).strip()
    if isinstance(space, spaces.Text):
        return text if space.contains(text) else None
    if isinstance(space, spaces.Discrete):
        return {name.lower(): action for name, action in offered.items()}.get(text.lower())
    if _NUMBER.sub("", text).strip(" \n\t,[]()"):
        return None  # there is more than numbers
    numbers = np.array([float(number) for number in _NUMBER.findall(text)])
    if numbers.size != len(_bounds(space)[0]):
        return None
    with np.errstate(all="ignore"):  # what does not fit the type is not in the space
        action = numbers.astype(space.dtype).reshape(space.shape)
    if np.issubdtype(space.dtype, np.integer) and (action.ravel() != numbers).any():
        return None
    return action if space.contains(action) else None


def any_action(space: Any, offered: Mapping[str, int], rng: random.Random) -> str:
    """A reply that is an action, drawn evenly, or from -1000 to 1000 where there is no bound."""
    if isinstance(space, spaces.Discrete):
        return rng.choice(list(offered))
    if isinstance(space, spaces.Text):
        length = rng.randint(space.min_length, space.max_length)
        return "".join(rng.choices(sorted(space.character_set), k=length))
    low, high = _bounds(space)
    ends = zip(np.clip(low, -1e3, None), np.clip(high, None, 1e3), strict=True)
    if np.issubdtype(space.dtype, np.integer):
        return " ".join(str(rng.randint(int(least), int(most))) for least, most in ends)
    return " ".join(f"{rng.uniform(least, most):.3f}" for least, most in ends)


def _bounds(space: Any) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value of each number of an action."""
    if isinstance(space, spaces.Box):
        return space.low.ravel(), space.high.ravel()
    if isinstance(space, spaces.MultiBinary):
        size = int(np.prod(space.shape))
        return np.zeros(size, int), np.ones(size, int)
    return space.start.ravel(), (space.start + space.nvec - 1).ravel()


def readable(observation: Any, planes: Sequence[int] = ()) -> str:
    """An observation as text.

    Numbers have four digits. A long vector that is mostly zeros is written as what is not zero. Of
    three dimensions the last one counts planes: up to three that mark squares are drawn into one
    board, others one after the other.

    Args:
        planes: those to write, of three dimensions; empty: all.
    """
    if isinstance(observation, Mapping):
        parts = {key: readable(part, planes) for key, part in observation.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        return "\n".join(
            f"{key}:\n{text}" if "\n" in text else f"{key}: {text}" for key, text in parts.items()
        )
    if isinstance(observation, tuple | list):
        parts_in_order = [readable(part, planes) for part in observation]
        lines = any("\n" in part for part in parts_in_order)
        return "\n".join(parts_in_order) if lines else f"({', '.join(parts_in_order)})"
    if isinstance(observation, str):
        return observation
    array = np.asarray(observation)
    if array.dtype == object:
        return str(observation)
    if array.ndim == 3:
        return _planes(array, planes or range(array.shape[2]))
    if array.ndim == 2:
        return "\n".join(" ".join(map(_number, row)) for row in array)
    if array.ndim == 1:
        return _vector(array)
    return _number(array[()])


def _number(value: Any) -> str:
    return f"{float(value):.4g}" if np.issubdtype(type(value), np.floating) else str(int(value))


def _vector(vector: np.ndarray) -> str:
    if len(vector) <= _LONG or 2 * np.count_nonzero(vector) > len(vector):
        return ", ".join(map(_number, vector))
    if not vector.any():
        return f"{len(vector)} numbers, all 0"
    (places,) = vector.nonzero()
    if (vector[places] == 1).all():
        return f"{len(vector)} numbers, all 0 but 1 at {listed([str(k) for k in places])}"
    some = ", ".join(f"{_number(vector[k])} at {k}" for k in places)
    return f"{len(vector)} numbers, all 0 but {some}"


def _planes(array: np.ndarray, shown: Iterable[int]) -> str:
    shown = list(shown)
    array = array[:, :, shown]  # (rows, columns, planes)
    marks = np.isin(array, (0, 1)).all() and array.sum(axis=2).max() <= 1
    if marks and len(shown) <= _ONE_BOARD:
        return "\n".join(
            " ".join(str(shown[int(cell.argmax())]) if cell.any() else "." for cell in row)
            for row in array
        )
    parts = []
    for k, plane in zip(shown, np.moveaxis(array, 2, 0), strict=True):
        if (plane == plane[0, 0]).all():
            parts.append(f"plane {k}: all {_number(plane[0, 0])}")
        else:
            parts.append(f"plane {k}:\n{readable(plane)}")
    return "\n".join(parts)


def plain(rendered: str) -> str:
    """A rendering without the codes of a terminal: *highlights* in stars, colours in brackets."""
    text = _HIGHLIGHT.sub(r"*\1*", rendered)
    text = _COLOUR.sub(lambda found: f"{found[2]}({_COLOURS[int(found[1]) % 8]})", text)
    return _ANSI.sub("", text).strip()
