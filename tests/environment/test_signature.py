from __future__ import annotations

import datetime as dt
import decimal
import enum
import json
import pathlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import pytest

from rayrl.environment.signature import fit, schema


@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0


@pytest.mark.parametrize(
    ("value", "hint", "want"),
    [
        (1, float, 1.0),
        (3.0, int, 3),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([[1]], tuple[tuple[int, ...], ...], ((1,),)),
        (None, float | None, None),
        (1, int | float, 1),
        ("a", Literal["a", "b"], "a"),
        ({"k": [1]}, dict[str, list[float]], {"k": [1.0]}),
        ({"x": 1, "y": 2}, Point, Point(1, 2.0)),
        (object, Any, object),
    ],
)
def test_fit_converts(value: Any, hint: Any, want: Any) -> None:
    got = fit(value, hint)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        (True, int, "expected int, got True"),
        (1.5, int, "expected int, got 1.5"),
        (float("inf"), int, "expected int, got inf"),
        (10**400, float, "expected float, got 1000"),
        ("0.2", float, "expected float, got '0.2'"),
        (1, bool, "expected bool, got 1"),
        ("ab", list[str], r"expected list\[str\], got 'ab'; write \['ab'\]$"),
        ("ab", tuple[str, ...] | None, r"\| None, got 'ab'; write \['ab'\]$"),
        ({"x": 1}, Sequence[Point], r"got {'x': 1}; write \[{'x': 1}\]$"),
        ("ab", list[int], "got 'ab'$"),
        (None, list[Any], "got None$"),
        (1, str, "got 1$"),
        ([1], tuple[int, int], "expected 2 values"),
        ("c", Literal["a", "b"], "expected one of 'a', 'b', got 'c'"),
        (True, Literal[1, 2], "expected one of 1, 2, got True"),
        ({"x": 1, "z": 2}, Point, "Point has no field 'z'"),
        ("x", int | None, r"expected int \| None, got 'x'"),
    ],
)
def test_fit_rejects(value: Any, hint: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        fit(value, hint)


def test_schema() -> None:
    assert schema(list[int]) == {"type": "array", "items": {"type": "integer"}}
    assert schema(str | None) == {"type": "string"}
    assert schema(int | str) == {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    assert schema(Literal["a", "b"]) == {"type": "string", "enum": ["a", "b"]}
    assert schema(dict[str, bool]) == {
        "type": "object",
        "additionalProperties": {"type": "boolean"},
    }
    assert schema(Point) == {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
        "required": ["x"],
    }
    assert schema(Any) == {}


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Side(NamedTuple):
    name: str
    size: int


class Row(TypedDict):
    day: dt.date
    n: NotRequired[int]


@dataclass(frozen=True)
class Order:
    color: Color
    when: dt.date | None = None
    parts: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Node:
    value: int
    below: list[Node] = field(default_factory=list)


CONVERTED: list[tuple[Any, Any, Any]] = [
    ("red", Color, Color.RED),
    (Color.RED, Color, Color.RED),
    (1, Level, Level.LOW),
    ("2020-01-02", dt.date, dt.date(2020, 1, 2)),
    ("2020-01-02T03:04:05", dt.datetime, dt.datetime(2020, 1, 2, 3, 4, 5)),
    ("PT1H", dt.timedelta, dt.timedelta(hours=1)),
    ("1.10", decimal.Decimal, decimal.Decimal("1.10")),
    ("/a/b", pathlib.Path, pathlib.Path("/a/b")),
    ("00000000-0000-0000-0000-000000000005", uuid.UUID, uuid.UUID(int=5)),
    ("ab", bytes, b"ab"),
    ({"1": "a"}, dict[int, str], {1: "a"}),
    ({1: "a"}, dict[int, str], {1: "a"}),
    ({"red": [1]}, dict[Color, list[int]], {Color.RED: [1]}),
    (["red"], set[Color], {Color.RED}),
    (["a", 1], Side, Side("a", 1)),
    ("red", Literal[Color.RED], Color.RED),
    ("red", Color | None, Color.RED),
    (None, Color | None, None),
    (
        {"color": "blue", "when": "2020-01-02", "parts": [{"x": 1}]},
        Order,
        Order(Color.BLUE, dt.date(2020, 1, 2), (Point(1),)),
    ),
    ({"value": 1, "below": [{"value": 2}]}, Node, Node(1, [Node(2)])),
    ({"day": "2020-01-02"}, Row, {"day": dt.date(2020, 1, 2)}),
    ([1], Iterable[int], [1]),
]


@pytest.mark.parametrize(("value", "hint", "want"), CONVERTED, ids=str)
def test_fit_supports_pydantic_types(value: Any, hint: Any, want: Any) -> None:
    got = fit(value, hint)
    assert got == want
    assert type(got) is type(want)
    assert fit(want, hint) == want, "and takes it as it is"


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        ("pink", Color, "expected 'red' or 'blue', got 'pink'"),
        ("1", Level, "expected 1, got '1'"),
        (5, dt.date, "expected a valid date, got 5"),
        ("soon", dt.date, "expected a valid date .*, got 'soon'"),
        ({"x": 1}, dict[int, str], "x: expected a valid integer"),
        ({"when": "2020-01-02"}, Order, "Order needs the field 'color'"),
        ({"n": 1}, Row, "Row needs the field 'day'"),
        ({"day": "2020-01-02", "m": 1}, Row, "Row has no field 'm'"),
        ({"color": "pink"}, Order, "field 'color': expected 'red' or 'blue', got 'pink'"),
        ({"value": 1, "below": [{"value": "2"}]}, Node, "field 'value': expected int, got '2'"),
    ],
)
def test_fit_error_messages(value: Any, hint: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        fit(value, hint)


def test_schema_of_pydantic_types() -> None:
    assert schema(Color) == {"type": "string", "enum": ["red", "blue"]}
    assert schema(list[Color]) == {"type": "array", "items": schema(Color)}
    assert schema(dt.date) == {"type": "string", "format": "date"}
    assert schema(uuid.UUID) == {"type": "string", "format": "uuid"}
    assert schema(Literal[Color.RED]) == {"type": "string", "const": "red"}
    assert schema(Order)["properties"]["color"] == schema(Color)
    assert schema(Order)["required"] == ["color"]
    assert schema(Node) == {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "below": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["value"],
    }
    assert schema(Side)["prefixItems"] == [{"type": "string"}, {"type": "integer"}]
    assert schema(Row)["required"] == ["day"]
    assert schema(Row)["properties"] == {"day": schema(dt.date), "n": {"type": "integer"}}
    for hint in (*(one[1] for one in CONVERTED), object, type(None)):
        assert "$ref" not in json.dumps(schema(hint))
