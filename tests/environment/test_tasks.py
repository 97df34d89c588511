"""Every task either round-trips through a file or is rejected."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import json
import math
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.environment.tasks import (
    LoggedTask,
    roundtrip_problem,
    same_task,
    task_from_json,
    task_to_json,
)
from rayrl.types import Task


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Kind(enum.Enum):
    A = "a"
    B = 2


class Flags(enum.Flag):
    R = 1
    W = 2


@dataclass(frozen=True)
class Point:
    x: int
    raw: bytes = b""
    size: float = 0.0


@dataclass(frozen=True)
class Tree:
    value: int
    below: tuple[Tree, ...] = ()


class Pair(NamedTuple):
    a: int
    b: tuple[int, ...]


def task_of(hint: str, value: Any) -> Task:
    """A task with one field of that hint, as a module with postponed annotations has it."""
    space = {"__annotations__": {"value": hint}, "__module__": __name__}
    made: Any = dataclass(frozen=True, kw_only=True)(type("Made", (Task,), space))
    task: Task = made(value=value, seed=3)
    return task


def through_a_file(task: Task) -> Task:
    return task_from_json(json.loads(json.dumps(task_to_json(task))))


UTC = dt.UTC
HELD: list[tuple[str, Any]] = [
    ("Color", Color.RED),
    ("Level", Level.LOW),
    ("Kind", Kind.A),
    ("Kind", Kind.B),
    ("Flags", Flags.R | Flags.W),
    ("dict[int, str]", {1: "a", -2: "b"}),
    ("dict[Color, int]", {Color.BLUE: 1}),
    ("dict[Kind, int]", {Kind.A: 1}),
    ("dict[bool, int]", {True: 1}),
    ("dict[float, int]", {1.5: 1}),
    ("dict[dt.date, int]", {dt.date(2020, 1, 1): 1}),
    ("Mapping[str, int]", {"a": 1}),
    ("tuple[tuple[int, ...], str]", ((1, 2), "a")),
    ("tuple[()]", ()),
    ("frozenset[int]", frozenset({1, 2})),
    ("set[tuple[int, int]]", {(1, 2)}),
    ("set[Color]", {Color.RED, Color.BLUE}),
    ("list[list[int]]", [[1], []]),
    ("Sequence[int]", [1]),
    ("Point", Point(1, b"\xff\0", math.inf)),
    ("list[Point]", [Point(1)]),
    ("Point | None", None),
    ("Point | Pair", Pair(1, (2,))),
    ("Tree", Tree(1, (Tree(2), Tree(3)))),
    ("Pair", Pair(1, (2, 3))),
    ("int | str", "5"),
    ("int | str", 5),
    ("str | int", 5),
    ("float | int", 1),
    ("int | float", 1.0),
    ("dt.date | str", dt.date(2020, 1, 1)),
    ("Literal['a', 1]", 1),
    ("Any", {"a": [1, None]}),
    ("dt.date", dt.date(2020, 1, 2)),
    ("dt.datetime", dt.datetime(2020, 1, 2, 3, 4, 5, 6, tzinfo=UTC)),
    ("dt.timedelta", dt.timedelta(days=-1, microseconds=7)),
    ("dt.time", dt.time(1, 2)),
    ("decimal.Decimal", decimal.Decimal("1.10")),
    ("uuid.UUID", uuid.UUID(int=5)),
    ("pathlib.Path", pathlib.Path("/a/b")),
    ("bytes", b"\xff\xfe"),
    ("complex", 1 + 2j),
    ("float", math.inf),
    ("float", math.nan),
    ("float", -0.0),
    ("int", 10**30),
    ("str", "half \ud83d"),
    ("int", np.int64(3)),
    ("float", np.float32(0.1)),
    ("bool", np.True_),
]


@pytest.mark.parametrize(("hint", "value"), HELD, ids=[f"{h}-{k}" for k, (h, _) in enumerate(HELD)])
def test_tasks_round_trip(hint: str, value: Any) -> None:
    task = task_of(hint, value)
    assert roundtrip_problem(task) == ""
    back = through_a_file(task)
    assert same_task(task, back)
    if "set[" not in hint:  # a set has no order of its own
        assert json.dumps(task_to_json(back)) == json.dumps(task_to_json(task))


OBJECTED: list[tuple[str, Any]] = [
    ("Any", (1, 2)),
    ("Any", Color.RED),
    ("Any", Point(1)),
    ("Sequence[int]", (1, 2)),
    ("tuple", (1, (2,))),
    ("dict", {1: 2}),
    ("str", 5),
    ("bool", 1),
    ("int", True),
    ("str | dt.date", object()),
    ("dict[tuple[int, int], str]", {(1, 2): "x"}),
    ("Any", len),
    ("type", int),
    ("np.ndarray", np.arange(3)),
    ("range", range(3)),
    ("Missing", 3),
]


@pytest.mark.parametrize(
    ("hint", "value"), OBJECTED, ids=[f"{h}-{k}" for k, (h, _) in enumerate(OBJECTED)]
)
def test_tasks_that_do_not_round_trip(hint: str, value: Any) -> None:
    try:
        said = roundtrip_problem(task_of(hint, value))
    except TypeError as error:
        said = str(error)
    assert "value" in said or "Missing" in said


def test_a_class_in_a_function_with_a_field_called_type() -> None:
    class Shape(enum.Enum):
        ROUND = "round"

    @dataclass(frozen=True)
    class Inner:
        shape: Shape

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Local(Task):
        inner: Inner
        type: str
        type_: str = "b"
        fields: tuple[int, ...] = (1,)
        size: int = field(default=0, init=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "size", len(self.type))

    task = Local(inner=Inner(Shape.ROUND), type="mine", seed=4)
    assert roundtrip_problem(task) == ""
    back = through_a_file(task)
    assert isinstance(back, Local)
    assert (back, back.size) == (task, 4)
    assert task_to_json(task)["type"].endswith("Local")


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Base(Task, Generic[T]):
    first: T
    color: Color = Color.RED


@dataclass(frozen=True, kw_only=True)
class Derived(Base[int]):
    more: Mapping[int, Sequence[str]] = field(default_factory=dict)


def test_inheritance_and_generics() -> None:
    task = Derived(first=2, more={1: ["a"]}, color=Color.BLUE)
    assert roundtrip_problem(task) == ""
    assert through_a_file(task) == task


def test_a_file_of_an_earlier_version_is_read() -> None:
    name = f"{Derived.__module__}:Derived"
    old = {"type": name, "seed": 5, "first": 1, "color": "blue", "more": {"3": ["x"]}}
    assert task_from_json(old) == Derived(seed=5, first=1, color=Color.BLUE, more={3: ["x"]})
    with pytest.raises(TypeError, match=r"Derived has no field 'frist'.* mean 'first'"):
        task_from_json({**old, "frist": 1})
    with pytest.raises(TypeError, match="field 'color': expected 'red' or 'blue', got 'pink'"):
        task_from_json({**old, "color": "pink"})
    unknown = task_from_json({**old, "type": "gone:Gone"})
    assert isinstance(unknown, LoggedTask)
    assert task_to_json(unknown) == {**old, "type": "gone:Gone"}


@settings(max_examples=60)
@given(
    st.dictionaries(st.integers(), st.tuples(st.floats(), st.text(st.characters(codec=None)))),
    st.frozensets(st.sampled_from(Kind)),
)
def test_any_values_round_trip(table: dict[int, tuple[float, str]], kinds: frozenset[Kind]) -> None:
    for hint, value in (("dict[int, tuple[float, str]]", table), ("frozenset[Kind]", kinds)):
        task = task_of(hint, value)
        assert same_task(through_a_file(task), task)


HINTS = (Literal, Pair, Point)  # named in hints as text
