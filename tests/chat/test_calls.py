"""Calls survive a round trip, drafts within thoughts are ignored, parsing takes linear time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.chat.text_protocol import parse_lines
from rayrl.chat.tools import ParsedCall, Tool, format_call, parse_calls, without_calls
from rayrl.rollout.agent import Agent
from rayrl.rollout.endpoint import _read
from rayrl.rollout.players import ScriptedPlayer
from rayrl.server.choice import CallReader

few = settings(max_examples=60)
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "```", "```json\n", '"', "\\", "}}"]
texts = st.lists(st.one_of(st.sampled_from([*MARKS, "\n", " "]), st.text(max_size=4))).map("".join)
clean = texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), clean, st.floats(allow_nan=False)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(clean, inner, max_size=3)
)
arguments = st.dictionaries(clean, values, max_size=3)
words = st.text('ab \n{}[]":,<>/', max_size=20).filter(
    lambda text: not any(mark in text for mark in MARKS[:4])
)


def streamed(text: str, size: int) -> list[str | ParsedCall]:
    """Parse a text in chunks; consecutive strings are joined."""
    reader, found = CallReader(), []
    for at in range(0, len(text), size):
        found += reader.push(text[at : at + size])
    joined: list[Any] = []
    for part in [*found, *reader.end()]:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@given(clean, arguments)
@few
def test_formatted_calls_are_parsed(name: str, given_: dict[str, Any]) -> None:
    text = format_call(name, given_)
    assert parse_calls(text) == [ParsedCall(name, given_)]
    assert without_calls(text) == ""


@given(st.lists(st.tuples(words, arguments), max_size=3), words, st.integers(1, 9))
@few
def test_calls_within_text(pairs: list[tuple[str, dict[str, Any]]], end: str, size: int) -> None:
    text = "".join(before + format_call("f", given_) for before, given_ in pairs) + end
    calls = [ParsedCall("f", given_) for _, given_ in pairs]
    assert parse_calls(text) == calls
    assert [part for part in streamed(text, size) if isinstance(part, ParsedCall)] == calls
    assert without_calls(text) == ("".join(before for before, _ in pairs) + end).strip()


@given(texts, st.integers(1, 9))
@few
def test_streaming_finds_the_same_calls(text: str, size: int) -> None:
    good = [call for call in parse_calls(text) if not call.error]
    calls = [part for part in streamed(text, size) if isinstance(part, ParsedCall)]
    assert calls[-len(good) :] == good or not good  # calls before a stray `</think>` were sent
    assert streamed(text, size) == streamed(text, len(text) + 1)


@given(texts, st.lists(st.tuples(arguments, st.booleans()), min_size=1, max_size=3))
@few
def test_native_calls_as_text(content: str, made: list[tuple[dict[str, Any], bool]]) -> None:
    """Every call of a server is one call of the text, whatever the text before it is."""
    calls = []
    for given_, whole in made:
        written = json.dumps(given_)
        function = {"name": "f", "arguments": written if whole else f"{written}</tool_call>,"}
        calls.append({"id": "c", "type": "function", "function": function})
    message = {"content": content, "tool_calls": calls}
    text = _read({"choices": [{"message": message, "finish_reason": "stop"}]}, "url").text
    read = parse_calls(text)[-len(made) :]
    for call, (given_, whole) in zip(read, made, strict=True):
        assert bool(call.error) is not whole
        assert call.arguments == (given_ if whole else {})


CALL = format_call("now", {})
LINE = "CALL now:"
TOOLS = [Tool.from_function(now).schema for now in [lambda: ""]]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("{}", 1),
        ("<think>\n{}\n</think>\n{}", 1),
        ("<think>\n{}\n", 0),
        ("<think>\n{}\n</think>\n", 0),
        ("<think>a</think>\n{}\n<think>\n{}\n</think>\n{}", 2),
        ("<think></think>\n{}", 1),
        ("{}\n<think>\n{}", 1),
        ("I may\n{}\nor not.\n</think>\n\n{}\n", 1),  # the prompt opened the thought
        ("<think>\n<think>\n{}</think>\n{}", 1),
        ("</think>\n{}", 1),
    ],
)
def test_drafts_within_thoughts_are_ignored(text: str, calls: int) -> None:
    assert parse_calls(text.replace("{}", CALL)) == [ParsedCall("now")] * calls
    assert without_calls(text.replace("{}", CALL)).count(CALL) == text.count("{}") - calls
    assert parse_lines(text.replace("{}", LINE), TOOLS) == [ParsedCall("now")] * calls


def test_a_reply_that_begins_within_a_thought() -> None:
    for text, calls in (("hm\n{}", 0), ("hm\n{}\n</think>\n{}", 1), ("</think>\n{}", 1), ("", 0)):
        found = parse_calls(text.replace("{}", CALL), thinking=True)
        assert found == [ParsedCall("now")] * calls
        assert parse_lines(text.replace("{}", LINE), TOOLS, thinking=True) == found
        reader = CallReader(thinking=True)
        parts = [*reader.push(text.replace("{}", CALL)), *reader.end()]
        assert [part for part in parts if isinstance(part, ParsedCall)] == found


@pytest.mark.parametrize("protocol", ["native", "text"])
async def test_an_agent_does_not_run_drafts(protocol: Any) -> None:
    ran: list[str] = []

    def note(word: str) -> str:
        """Note it."""
        ran.append(word)
        return word

    def player(messages: Any, rng: Any) -> str:
        if any(f"{word}" in messages[-1].content for word in ("real", "twice")):
            return "done"
        calls = [
            f"CALL note: {word}" if protocol == "text" else format_call("note", {"word": word})
            for word in ("draft", "real")
        ]
        return "<think>\n{}\n</think>\n{}".format(*calls)

    agent = Agent(ScriptedPlayer(player))
    assert await agent("?", tools=[note], protocol=protocol) == "done"
    assert ran == ["real"]


N = 300_000
LONG = {
    "blanks": "<tool_call>" + " " * N,
    "lines": "<tool_call>" + "\n" * N + "x",
    "fence": "<tool_call>```" + " \n" * (N // 2) + "```",
    "fences": "<tool_call>" + "```\n" * (N // 4),
    "open calls": "<tool_call>" * (N // 11),
    "broken calls": "<tool_call>x</tool_call>" * (N // 24),
    "calls in strings": '<tool_call>"</tool_call>" ' * (N // 26),
    "an open string": '<tool_call>{"' + "</tool_call>" * (N // 12),
    "open strings": '<tool_call>["</tool_call>' * (N // 25),
    "one long string": format_call("f", {"x": "</tool_call>" * (N // 12)}),
    "thoughts": "<think>" * (N // 7),
    "ends of thoughts": f"{CALL}</think>" * (N // 60),
    "brackets": "<tool_call>" + "[" * N,
    "digits": '<tool_call>{"name": ' + "9" * N,
    "escapes": '<tool_call>"' + "\\" * N,
    "a call after blanks": " \t" * (N // 2) + "CALL",
    "a line of blanks": "CALL" + " \t" * (N // 2) + "x",
    "a long name": "CALL " + "a" * N,
    "names": "CALL a" + " a" * (N // 2),
    "calls": "CALL now:\n" * (N // 100),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_any_text_is_parsed_in_linear_time(text: str) -> None:
    """In quadratic time, a test would take minutes to hours."""
    parse_calls(text)
    parse_calls(text, thinking=True)
    without_calls(text)
    parse_lines(text, TOOLS)
    reader = CallReader()
    [*reader.push(text), *reader.end()]


@pytest.mark.parametrize(
    "line", [":param" + " " * N, "a" + " " * N, "a (" + " " * N, ":param " + "a " * N, " " * N]
)
def test_any_docstring_is_parsed_in_linear_time(line: str) -> None:
    def tool(a: int) -> None: ...

    tool.__doc__ = f"Do.\n\nArgs:\n    {line}x"
    assert Tool.from_function(tool).schema["function"]["description"] == "Do."
