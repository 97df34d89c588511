"""Typed Python functions as tools of a model: schemas, how calls are written, safe calls.

A call is text (as Hermes and Qwen models write it), so that any player speaks it and it is trained
on like every other word:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayrl.errors import ConfigError, did_you_mean
from rayrl.hints import fit, keyword_hints, plain_default, schema, suggestion
from rayrl.types import Message

__all__ = [
    "CALL_MARKS",
    "CUT_OFF",
    "ParsedCall",
    "Tool",
    "Toolkit",
    "as_user_messages",
    "describe",
    "format_call",
    "introduce",
    "parse_calls",
    "tool_name",
    "untold",
    "without_calls",
]

ToolFunction = Callable[..., Any]

CUT_OFF = "the reply was cut off in this call, so it was not run: write less before it"

CALL_MARKS = _OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BLOCK = re.compile(re.escape(_OPEN) + r"(.*?)(?:" + re.escape(_CLOSE) + r"|\Z)", re.DOTALL)
_FENCE = re.compile(r"^```(?:json)?\s*|\s*```$")
_GOOGLE_ARG = re.compile(r"^\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_SPHINX_ARG = re.compile(r"^\s*:param\s+(?:[^:]*\s)?(\w+)\s*:\s*(.*)$")
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?)\s*:\s*$")


@dataclass(frozen=True)
class Tool:
    """A function and what a model is told about it.

    Attributes:
        schema: OpenAI's function format: name, description, JSON schema of the parameters.
        hints: type hint of every parameter.
        required: parameters without a default.
    """

    name: str
    function: ToolFunction
    schema: Mapping[str, Any]
    hints: Mapping[str, Any]
    required: tuple[str, ...]

    @classmethod
    def of(cls, function: ToolFunction) -> Tool:
        """Read signature and docstring.

        Raises:
            ConfigError: `*args` or positional-only parameters, which JSON cannot name.
        """
        name = getattr(function, "__name__", type(function).__name__)
        parameters = inspect.signature(function).parameters
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if any(parameter.kind not in kinds for parameter in parameters.values()):
            raise ConfigError(
                f"tool {name!r}: every parameter needs a name; *args cannot be called"
            )
        hints = keyword_hints(function)
        text, of_parameter = _docstring(function)
        properties: dict[str, Any] = {}
        for key, parameter in parameters.items():
            properties[key] = schema(hints[key])
            if of_parameter.get(key):
                properties[key]["description"] = of_parameter[key]
            if parameter.default is not parameter.empty and parameter.default is not None:
                with contextlib.suppress(TypeError, ValueError):  # the model need not know it
                    properties[key]["default"] = plain_default(parameter.default)
        required = tuple(k for k, p in parameters.items() if p.default is p.empty)
        arguments = {"type": "object", "properties": properties, "required": list(required)}
        described = {"name": name, "description": text, "parameters": arguments}
        return cls(name, function, {"type": "function", "function": described}, hints, required)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given`, checked and converted to the hints.

        Raises:
            TypeError: what is wrong, in words for the model.
        """
        for key in given:
            if key not in self.hints:
                raise TypeError(f"unknown argument {key!r}.{suggestion(key, list(self.hints))}")
        for key in self.required:
            if key not in given:
                raise TypeError(f"missing argument {key!r}")
        fitted = {}
        for key, value in given.items():
            try:
                fitted[key] = fit(value, self.hints[key])
            except TypeError as error:
                raise TypeError(f"argument {key!r}: {error}") from None
        return fitted


@dataclass(frozen=True)
class ParsedCall:
    """One call found in a reply; `error` says, for the model, why it cannot be run."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


class Toolkit:
    """The tools offered in one call of an agent."""

    def __init__(self, functions: Sequence[ToolFunction]) -> None:
        self.tools = {tool.name: tool for tool in map(_tool, functions)}
        if len(self.tools) != len(functions):
            names = [tool.name for tool in map(_tool, functions)]
            raise ConfigError(f"tools must have different names, got {', '.join(names)}")
        self.schemas = tuple(tool.schema for tool in self.tools.values())

    async def run(self, call: ParsedCall) -> tuple[str, bool]:
        """Run a call.

        Returns:
            What the model is told, and whether it went wrong. Nothing a tool raises gets out.
        """
        tool = self.tools.get(call.name)
        if call.error:
            return f"Error: {call.error}", True
        if tool is None:
            near = did_you_mean(call.name, self.tools)
            known = ", ".join(self.tools)
            return f"Error: there is no tool {call.name!r}.{near} Tools: {known}.", True
        try:
            arguments = tool.arguments(call.arguments)
        except TypeError as error:
            return f"Error: {call.name}: {error}", True
        try:
            result = tool.function(**arguments)
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            return f"Error: {call.name} raised {type(error).__name__}: {error}", True
        return _as_text(result), False


@functools.lru_cache(256)
def _tool(function: ToolFunction) -> Tool:
    return Tool.of(function)


def _as_text(result: object) -> str:
    if isinstance(result, str):
        return str(result)
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(result)


def parse_calls(text: str, *, cut: bool = False) -> list[ParsedCall]:
    """Every `<tool_call>` of a reply, in order; a malformed one carries its error.

    Args:
        text: the reply.
        cut: whether the reply was cut off; if that broke its last call, the error says so.
    """
    calls = [_parse(block) for block in _BLOCK.findall(text)]
    if cut and calls and calls[-1].error and _CLOSE not in text[text.rindex(_OPEN) :]:
        calls[-1] = replace(calls[-1], error=CUT_OFF)
    return calls


def without_calls(text: str) -> str:
    """A reply without its `<tool_call>` blocks."""
    return _BLOCK.sub("", text).strip()


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as a model writes it."""
    body = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
    return f"{_OPEN}\n{body}\n{_CLOSE}"


def describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tools in words, for templates that have no place for them."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = format_call("tool_name", {"argument": "value"})
    return (
        f"You can call these tools:\n{lines}\n"
        f"To call one, write\n{example}\nThe results come back in the next message."
    )


def introduce(messages: Sequence[Message], text: str) -> list[Message]:
    """Messages whose first one also describes the tools: after the rules, before a question."""
    first = messages[0]
    joined = [first.content, text] if first.role == "system" else [text, first.content]
    return [replace(first, content="\n\n".join(joined)), *messages[1:]]


def as_user_messages(
    messages: Sequence[Message], keep: Container[str | None] = ()
) -> list[Message]:
    """Messages for readers that know no role `tool`: results that stand together become one user's.

    One, because many templates refuse two messages of the same role in a row.

    Args:
        messages: any.
        keep: ids of calls whose results stay as they are.
    """
    given: list[Message] = []
    joins = False
    for message in messages:
        if message.role != "tool" or message.tool_call_id in keep:
            given.append(message)
            joins = False
            continue
        content = f"<tool_response>{message.content}</tool_response>"
        if joins:
            content = f"{given.pop().content}\n{content}"
        given.append(Message("user", content))
        joins = True
    return given


def _parse(block: str) -> ParsedCall:
    body = _FENCE.sub("", block.strip())
    try:
        parsed, _ = json.JSONDecoder(strict=False).raw_decode(body)
    except (ValueError, RecursionError) as error:  # too deep, or a number of 5,000 digits
        why = getattr(error, "msg", type(error).__name__)
        return ParsedCall("", error=f"the tool call is not valid JSON ({why}): {body[:200]}")
    if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str):
        return ParsedCall("", error='a tool call must be {"name": ..., "arguments": {...}}')
    arguments = parsed.get("arguments", parsed.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as a JSON string
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return ParsedCall(parsed["name"], error=f"{parsed['name']}: arguments must be an object")
    return ParsedCall(parsed["name"], arguments)


def _docstring(function: ToolFunction) -> tuple[str, dict[str, str]]:
    """What comes before the first section, and the description of each parameter."""
    lines = (inspect.getdoc(function) or "").splitlines()
    text: list[str] = []
    of_parameter: dict[str, str] = {}
    section, current = "", ""
    for line in lines:
        heading, sphinx = _SECTION.match(line), _SPHINX_ARG.match(line)
        if heading:
            section, current = heading[1], ""
        elif sphinx:
            section, current = "Args", sphinx[1]
            of_parameter[current] = sphinx[2].strip()
        elif not section:
            text.append(line.strip())
        elif section in ("Args", "Arguments", "Parameters"):
            indent = len(line) - len(line.lstrip())
            entry = _GOOGLE_ARG.match(line) if indent <= 4 else None
            if entry:
                current = entry[1]
                of_parameter[current] = entry[2].strip()
            elif current and line.strip():
                of_parameter[current] += " " + line.strip()
    return " ".join(" ".join(text).split()), of_parameter


def tool_name(schema: Mapping[str, Any]) -> str:
    """The name in a tool's JSON schema."""
    return str(schema["function"]["name"])


def untold(tools: Sequence[Mapping[str, Any]], told: Container[str]) -> list[Mapping[str, Any]]:
    """Of the tools offered, those that the model has not been told about in this conversation."""
    return [schema for schema in tools if tool_name(schema) not in told]
