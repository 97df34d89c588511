"""Tool calls as plain lines, for models that cannot write JSON and templates without tools.

    CALL calculator: 12 * 7

The tools are described in a message, each call is a line of its own, and the results come back as a
user message. Neither the chat template nor a server needs to support tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rayrl.chat.tools import CUT_OFF, THOUGHT_MARKS, ParsedCall, thought_end, tool_name
from rayrl.types import replace_surrogates

__all__ = ["describe_lines", "format_line", "parse_lines", "results_text"]

_LINE = re.compile(r"^[ \t]*CALL\b[ \t]*(.*)$|" + "|".join(THOUGHT_MARKS), re.MULTILINE)
_PARTS = re.compile(r"([\w.-]+)[ \t]*:[ \t]*(.*)")
_FORM = 'a call must be a line of its own: "CALL name: argument"'


def describe_lines(tools: Sequence[Mapping[str, Any]]) -> str:
    """Describe tools as text, one line each."""
    lines = []
    for tool in tools:
        description = " ".join(tool["function"]["description"].split())  # may have several lines
        lines.append(f"CALL {tool_name(tool)}:{_form(tool)} - {description}")
    return "\n".join(
        [
            "You can use these tools. Write each call as a line of its own and stop:",
            *lines,
            "The results come back in the next message.",
        ]
    )


def format_line(name: str, argument: str) -> str:
    """Format a call as a model writes it."""
    return f"CALL {name}: {argument}"


def parse_lines(
    text: str, tools: Sequence[Mapping[str, Any]], *, cut: bool = False, thinking: bool = False
) -> list[ParsedCall]:
    """Parse every call of a reply, in order; a malformed one carries its error.

    Lines within thoughts are ignored.

    Args:
        text: the reply.
        tools: JSON schemas of the functions offered, which name the arguments.
        cut: whether the reply was cut off. A call in its last line is then an error, because it may
            be incomplete and still valid: `12 * 7` of `12 * 75`.
        thinking: whether the reply begins within a thought that the prompt opened.
    """
    parameters = {
        tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in tools
    }
    calls: list[ParsedCall] = []
    at = thought_end(text, 0) if thinking else 0
    while line := _LINE.search(text, at):
        at = line.end()
        if line[0] == THOUGHT_MARKS[0]:
            at = thought_end(text, at)
            continue
        if line[0] == THOUGHT_MARKS[1]:  # ends a thought that began before the reply
            calls.clear()
            continue
        parts = _PARTS.fullmatch(line[1].rstrip())
        if cut and line.end() == len(text):
            calls.append(ParsedCall(parts[1] if parts else "", error=CUT_OFF))
        elif parts is None:
            calls.append(ParsedCall("", error=_FORM))
        else:
            calls.append(_parse_arguments(parts[1], parts[2], parameters.get(parts[1], {})))
    return calls


def results_text(calls: Sequence[ParsedCall], results: Sequence[str]) -> str:
    """Format the results of calls for the model."""
    return "\n".join(
        f"RESULT {call.name or 'of a malformed call'}: {result}"
        for call, result in zip(calls, results, strict=True)
    )


def _form(tool: Mapping[str, Any]) -> str:
    properties = tool["function"]["parameters"]["properties"]
    if len(properties) <= 1:
        return "".join(f" {key}" for key in properties)
    return " " + json.dumps({key: hint.get("type", "value") for key, hint in properties.items()})


def _parse_arguments(name: str, text: str, properties: Mapping[str, Any]) -> ParsedCall:
    """Parse the text after the colon: a single argument as it is, several as a JSON object."""
    try:
        value = replace_surrogates(json.loads(text))
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, dict) and value.keys() <= properties.keys():
        return ParsedCall(name, value)
    if not text:
        return ParsedCall(name)
    if len(properties) > 1:
        return ParsedCall(name, error=f"{name}: write its arguments as a JSON object")
    for key, hint in properties.items():
        use_text = hint.get("type") == "string" and not isinstance(value, str)
        return ParsedCall(name, {key: text if use_text else value})
    return ParsedCall(name, {"argument": text})  # a tool without parameters, or an unknown tool
