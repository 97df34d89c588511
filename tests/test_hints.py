from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from rayrl.hints import fit, schema


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
        ("ab", list[str], r"expected list\[str\], got 'ab'"),
        ([1], tuple[int, int], "expected 2 values"),
        ("c", Literal["a", "b"], "expected one of 'a', 'b', got 'c'"),
        (True, Literal[1, 2], "expected one of 1, 2, got True"),
        ({"x": 1, "z": 2}, Point, "Point has no field 'z'"),
        ("x", int | None, r"expected int \| None, got 'x'"),
    ],
)
def test_fit_refuses(value: Any, hint: Any, said: str) -> None:
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
