from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest

from rayrl.errors import ConfigError
from rayrl.textcalls import parse_lines
from rayrl.tools import ParsedCall, Tool, Toolkit, format_call, parse_calls, without_calls


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
    assert Tool.of(convert).schema == {
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
    parameters = Tool.of(slowly).schema["function"]["parameters"]
    assert parameters["properties"] == {"n": {"type": "integer", "description": "how many."}}


def test_tools_that_cannot_be_called() -> None:
    def spread(*numbers: int) -> int:
        return sum(numbers)

    with pytest.raises(ConfigError, match="'spread': every parameter needs a name"):
        Tool.of(spread)
    with pytest.raises(ConfigError, match="different names"):
        Toolkit([convert, convert])


@pytest.mark.parametrize(
    ("call", "said", "failed"),
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
async def test_calls(call: ParsedCall, said: str, failed: bool) -> None:
    text, wrong = await Toolkit([convert, slowly, fails]).run(call)
    assert text.startswith(said)
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
        '{"name": "a", "arguments": {"x": 1}}',  # closed below by nothing at all
        '```json\n{"name": "a", "arguments": {"x": 1}}\n```</tool_call>',
        '{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        '{"name": "a", "parameters": {"x": 1}}</tool_call>',
        '{"name": "a", "arguments": {"x": 1}}}</tool_call>',
    ],
)
def test_parse_sloppy(body: str) -> None:
    assert parse_calls(f"<tool_call>{body}") == [ParsedCall("a", {"x": 1})]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"name": "a", "argum', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "must be"),
        ('{"arguments": {}}', "must be"),
        ('{"name": "a", "arguments": [1]}', "arguments must be an object"),
        ('{"name": "a", "arguments": null}', "arguments must be an object"),
    ],
)
def test_parse_malformed(body: str, said: str) -> None:
    (call,) = parse_calls(f"<tool_call>{body}</tool_call>")
    assert said in call.error


@pytest.mark.parametrize("body", ["[" * 100_000, '{"name": ' + "9" * 5_000 + "}"])
def test_what_no_parser_takes_is_an_error_for_the_model(body: str) -> None:
    (call,) = parse_calls(f"<tool_call>{body}</tool_call>")
    assert "not valid JSON" in call.error
    (line,) = parse_lines(f"CALL slowly: {body}", [Tool.of(slowly).schema])
    assert line.name == "slowly"
