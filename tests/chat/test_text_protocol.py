from __future__ import annotations

import pytest

from rayrl.chat.text_protocol import describe_lines, format_line, parse_lines, results_text
from rayrl.chat.tools import CUT_OFF, ParsedCall, Tool


def search(query: str) -> str:
    """Find."""
    return query


def wait(seconds: float) -> None:
    """Wait."""


def convert(value: float, unit: str = "m") -> str:
    """Convert."""
    return f"{value}{unit}"


def now() -> str:
    """The time."""
    return "noon"


TOOLS = [Tool.from_function(function).schema for function in (search, wait, convert, now)]


@pytest.mark.parametrize(
    ("line", "call"),
    [
        (format_line("search", "red: kites"), ParsedCall("search", {"query": "red: kites"})),
        (
            "  CALL search : 12 ",
            ParsedCall("search", {"query": "12"}),
        ),  # a string argument stays a string
        ('CALL search: "a kite"', ParsedCall("search", {"query": "a kite"})),
        ('CALL search: {"query": "x"}', ParsedCall("search", {"query": "x"})),
        ('CALL search: {"a": 1}', ParsedCall("search", {"query": '{"a": 1}'})),
        ("CALL wait: 1.5", ParsedCall("wait", {"seconds": 1.5})),
        (
            "CALL wait: long",
            ParsedCall("wait", {"seconds": "long"}),
        ),  # the tool reports the wrong type
        ("CALL wait:", ParsedCall("wait")),
        (
            'CALL convert: {"value": 2, "unit": "ft"}',
            ParsedCall("convert", {"value": 2, "unit": "ft"}),
        ),
        ("CALL now:", ParsedCall("now")),
        ("CALL now: please", ParsedCall("now", {"argument": "please"})),
        ("CALL dance: a jig", ParsedCall("dance", {"argument": "a jig"})),
    ],
)
def test_a_call(line: str, call: ParsedCall) -> None:
    assert parse_lines(line, TOOLS) == [call]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("CALL", "line of its own"),
        ("CALL search", "line of its own"),
        ("CALL search(kites)", "line of its own"),
        ("CALL convert: 2", "convert: write its arguments as a JSON object"),
    ],
)
def test_a_malformed_call(line: str, error: str) -> None:
    (call,) = parse_lines(line, TOOLS)
    assert error in call.error


def test_calls_within_text() -> None:
    text = "They CALL it: no call.\nCALLER: me\nCALL now:\nthen\r\nCALL search: a\n"
    assert parse_lines(text, TOOLS) == [ParsedCall("now"), ParsedCall("search", {"query": "a"})]
    assert parse_lines("", TOOLS) == []


def test_a_reply_that_was_cut_off() -> None:
    whole = ParsedCall("search", {"query": "a"})
    assert parse_lines("CALL search: a\nCALL sea", TOOLS, cut=True) == [
        whole,
        ParsedCall("", error=CUT_OFF),
    ]
    assert parse_lines("CALL search: a", TOOLS, cut=True) == [ParsedCall("search", error=CUT_OFF)]
    assert parse_lines("CALL search: a\nand", TOOLS, cut=True) == [whole]
    assert parse_lines("CALL search: a\n", TOOLS, cut=True) == [whole]


def test_descriptions_and_results_for_the_model() -> None:
    assert describe_lines(TOOLS).splitlines()[1:-1] == [
        "CALL search: query - Find.",
        "CALL wait: seconds - Wait.",
        'CALL convert: {"value": "number", "unit": "string"} - Convert.',
        "CALL now: - The time.",
    ]
    calls = [ParsedCall("now"), ParsedCall("", error="x")]
    assert results_text(calls, ["noon", "Error: x"]) == (
        "RESULT now: noon\nRESULT of a malformed call: Error: x"
    )
