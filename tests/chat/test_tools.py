from __future__ import annotations

import asyncio
import datetime as dt
import enum
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from rayrl.chat.text_protocol import parse_lines
from rayrl.chat.tools import (
    ParsedCall,
    Tool,
    ToolError,
    Toolkit,
    format_call,
    parse_calls,
    without_calls,
)
from rayrl.errors import ConfigError


def convert(
    value: float,
    unit: Literal["m", "ft"] = "m",
    digits: int | None = None,
    notes: list[str] = [],  # noqa: B006
) -> str:
    """Convert a length.

    Rounds half to even.

    Args:
        value: what to convert,
            in metres.
        unit (str): the target unit

    Returns:
        The length as text.
    """
    return f"{value}{unit}{digits}"


async def slowly(n: int) -> dict[str, Any]:
    """:param n: how many."""
    await asyncio.sleep(0)
    return {"n": n}


def fails(x: int) -> int:
    raise KeyError("no such row")


def test_schema_from_signature_and_docstring() -> None:
    assert Tool.from_function(convert).schema == {
        "type": "function",
        "function": {
            "name": "convert",
            "description": "Convert a length. Rounds half to even.",
            "parameters": {
                "type": "object",
                "properties": {
                    "value": {"type": "number", "description": "what to convert, in metres."},
                    "unit": {
                        "type": "string",
                        "enum": ["m", "ft"],
                        "description": "the target unit",
                        "default": "m",
                    },
                    "digits": {"type": "integer"},
                    "notes": {"type": "array", "items": {"type": "string"}, "default": []},
                },
                "required": ["value"],
            },
        },
    }
    parameters = Tool.from_function(slowly).schema["function"]["parameters"]
    assert parameters["properties"] == {"n": {"type": "integer", "description": "how many."}}


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Box:
    color: Color
    size: tuple[int, int] = (1, 1)


def paint(
    color: Color,
    when: dt.date,
    how: Literal["fast", "slow"] = "fast",
    over: Color = Color.RED,
    box: Box | None = None,
    boxes: tuple[Box, ...] = (Box(Color.BLUE),),
    limit: float = math.inf,
    sink: Any = print,
) -> str:
    """Paint."""
    return f"{color!r} {when!r} {how} {over!r} {box!r}"


def test_types_without_a_json_counterpart() -> None:
    """Their schemas, and defaults without a JSON form."""
    parameters = Tool.from_function(paint).schema["function"]["parameters"]
    json.dumps(parameters, allow_nan=False)
    found = parameters["properties"]
    colors = {"type": "string", "enum": ["red", "blue"]}
    assert found["color"] == colors
    assert found["when"] == {"type": "string", "format": "date"}
    assert found["over"] == {**colors, "default": "red"}
    assert found["box"]["properties"]["color"] == colors
    assert found["boxes"]["default"] == [{"color": "blue", "size": [1, 1]}]
    assert "default" not in found["limit"]
    assert found["sink"] == {}
    assert parameters["required"] == ["color", "when"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"color": "blue", "when": "2020-01-02", "box": {"color": "red", "size": [1, 2]}},
            "<Color.BLUE: 'blue'> datetime.date(2020, 1, 2) fast <Color.RED: 'red'> Box(color=<C",
        ),
        (
            {"color": "pink", "when": "2020-01-02"},
            "Error: paint: argument 'color': expected 'red' or 'blue', got 'pink'",
        ),
        (
            {"color": "red", "when": "2020-13-02"},
            "Error: paint: argument 'when': expected a valid date",
        ),
        (
            {"color": "red", "when": "2020-01-02", "box": {}},
            "Error: paint: argument 'box': Box needs the field 'color'",
        ),
    ],
)
async def test_calls_with_types_without_a_json_counterpart(
    arguments: dict[str, Any], expected: str
) -> None:
    text, _ = await Toolkit([paint]).run(ParsedCall("paint", arguments))
    assert text.startswith(expected)


def test_an_unresolvable_hint_does_not_affect_the_others() -> None:
    class Shade(enum.StrEnum):
        DARK = "dark"

    def shade(how: Shade, n: int, other: Missing) -> str:  # type: ignore[name-defined]  # noqa: F821
        return f"{Shade(how)}"

    found = Tool.from_function(shade).schema["function"]["parameters"]["properties"]
    assert found == {
        "how": {"type": "string", "enum": ["dark"]},
        "n": {"type": "integer"},
        "other": {},
    }


def test_tools_that_cannot_be_called() -> None:
    def spread(*numbers: int) -> int:
        return sum(numbers)

    with pytest.raises(ConfigError, match="'spread': every parameter needs a name"):
        Tool.from_function(spread)
    with pytest.raises(ConfigError, match="different names"):
        Toolkit([convert, convert])


@pytest.mark.parametrize(
    ("call", "expected", "failed"),
    [
        (ParsedCall("convert", {"value": 2}), "2.0mNone", False),
        (ParsedCall("convert", {"value": 2, "unit": "ft", "digits": 1}), "2.0ft1", False),
        (ParsedCall("slowly", {"n": 3}), '{"n": 3}', False),
        (ParsedCall("convert", {}), "Error: convert: missing argument 'value'", True),
        (
            ParsedCall("convert", {"value": "2"}),
            "Error: convert: argument 'value': expected float, got '2'",
            True,
        ),
        (
            ParsedCall("convert", {"value": 2, "uint": "m"}),
            "Error: convert: unknown argument 'uint'. Did you mean 'unit'?",
            True,
        ),
        (ParsedCall("fails", {"x": 1}), "Error: fails raised KeyError: 'no such row'", True),
        (
            ParsedCall("covert", {}),
            "Error: there is no tool 'covert'. Did you mean 'convert'? Tools: convert, slow",
            True,
        ),
        (ParsedCall("convert", error="arguments must be an object"), "Error: arg", True),
    ],
)
async def test_calls(call: ParsedCall, expected: str, failed: bool) -> None:
    text, wrong = await Toolkit([convert, slowly, fails]).run(call)
    assert text.startswith(expected)
    assert wrong is failed


def test_parse_well_formed() -> None:
    second = '{"name": "b", "arguments": {"s": "</x> \\n"}}'
    text = f"First {format_call('a', {'x': 1})} then\n<tool_call>\n{second}\n</tool_call> done"
    assert parse_calls(text) == [ParsedCall("a", {"x": 1}), ParsedCall("b", {"s": "</x> \n"})]
    assert without_calls(text) == "First  then\n done"
    assert parse_calls("no call, only <tool> text") == []


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "a", "arguments": {"x": 1}}',  # without a closing mark
        '```json\n{"name": "a", "arguments": {"x": 1}}\n```</tool_call>',
        '{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        '{"name": "a", "parameters": {"x": 1}}</tool_call>',
        '{"name": "a", "arguments": {"x": 1}}}</tool_call>',
    ],
)
def test_parse_sloppy(body: str) -> None:
    assert parse_calls(f"<tool_call>{body}") == [ParsedCall("a", {"x": 1})]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"name": "a", "argum', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "must be"),
        ('{"arguments": {}}', "must be"),
        ('{"name": "a", "arguments": [1]}', "arguments must be an object"),
        ('{"name": "a", "arguments": null}', "arguments must be an object"),
    ],
)
def test_parse_malformed(body: str, expected: str) -> None:
    (call,) = parse_calls(f"<tool_call>{body}</tool_call>")
    assert expected in call.error


@pytest.mark.parametrize("body", ["[" * 100_000, '{"name": ' + "9" * 5_000 + "}"])
def test_unparsable_json_is_an_error_for_the_model(body: str) -> None:
    (call,) = parse_calls(f"<tool_call>{body}</tool_call>")
    assert "not valid JSON" in call.error
    (line,) = parse_lines(f"CALL slowly: {body}", [Tool.from_function(slowly).schema])
    assert line.name == "slowly"


def nothing(**arguments: Any) -> str:
    return json.dumps(arguments)


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({"type": "string"}, "must be an object's JSON schema"),
        ({"properties": 3}, "not a JSON schema: 3 is not of type 'object'"),
        ({"properties": {"a": {"$ref": "http://x/y"}}}, "refers to another, 'http://x/y'"),
        ({"$ref": "file:///a"}, "refers to another, 'file:///a'"),
    ],
)
def test_schemas_that_cannot_be_those_of_a_tool(parameters: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=f"tool 'x': .*{what}"):
        Tool.from_schema("x", "", parameters, nothing)


@pytest.mark.parametrize(
    ("parameters", "arguments", "said"),
    [
        ({}, {"any": 1}, '{"any": 1}'),
        ({"properties": {"self": True}}, {"self": [1]}, '{"self": [1]}'),
        ({"properties": {"$ref": {"type": "null"}}}, {"$ref": None}, '{"$ref": null}'),
        ({"additionalProperties": False}, {"a": 1}, "Error: x: Additional properties are not"),
        ({"minProperties": 1}, {}, "Error: x: {} "),
        (
            {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"maxLength": 1}}},
            {"a": "bb"},
            "Error: x: argument 'a': 'bb' is too long",
        ),
        (
            {"properties": {"a": {"$ref": "#"}}},
            {"a": {"a": 1}},
            "Error: x: argument 'a.a': 1 is not of type 'object'",
        ),
    ],
)
def test_arguments_are_checked_against_a_schema(
    parameters: dict[str, Any], arguments: dict[str, Any], said: str
) -> None:
    tool = Tool.from_schema("x", "", {"type": "object", **parameters}, nothing)
    result, failed = asyncio.run(Toolkit([tool]).run(ParsedCall("x", arguments)))
    assert result.startswith(said)
    assert failed == said.startswith("Error")
    properties = tool.schema["function"]["parameters"]["properties"]
    assert all(isinstance(value, dict) for value in properties.values())
    text = json.dumps(arguments)
    assert parse_lines(f"CALL x: {text}", [tool.schema])


def test_arguments_that_are_nested_too_deeply() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    tool = Tool.from_schema("x", "", schema, nothing)
    said, failed = asyncio.run(Toolkit([tool]).run(ParsedCall("x", deep)))
    assert failed
    assert "nested too deeply" in said


def test_fatal_exceptions_are_not_told() -> None:
    def fails(text: str) -> str:
        raise KeyError(text) if text == "a" else ToolError("b")

    tool = Tool.from_schema("x", "", {"type": "object"}, fails, fatal=(KeyError,))
    assert asyncio.run(Toolkit([tool]).run(ParsedCall("x", {"text": "b"}))) == ("Error: x: b", True)
    with pytest.raises(KeyError):
        asyncio.run(Toolkit([tool]).run(ParsedCall("x", {"text": "a"})))
