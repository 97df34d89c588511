"""Typed Python functions as tools of a model: their schemas, the format of calls, and execution.

A call is text, as Hermes and Qwen models write it, so that every player can write one and training
treats it like any other text:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayrl.chat.tool_schema import validated, validator_of
from rayrl.environment.signature import fit, keyword_hints, plain_default, schema, suggestion
from rayrl.errors import ConfigError, describe_error, did_you_mean
from rayrl.types import Message, replace_surrogates

__all__ = [
    "CALL_MARKS",
    "CUT_OFF",
    "THOUGHT_MARKS",
    "ParsedCall",
    "Tool",
    "ToolError",
    "Toolkit",
    "add_to_first_message",
    "as_user_messages",
    "close_open_mark",
    "describe_tools",
    "format_call",
    "new_tools",
    "parse_calls",
    "read_call",
    "thought_end",
    "tool_name",
    "without_calls",
]

ToolFunction = Callable[..., Any]

CUT_OFF = "the reply was cut off in this call, so it was not run: write less before it"

CALL_MARKS = _OPEN, _CLOSE = "<tool_call>", "</tool_call>"
THOUGHT_MARKS = _THINK, _THOUGHT = "<think>", "</think>"
_MARK = re.compile("|".join(map(re.escape, (_OPEN, *THOUGHT_MARKS))))
_LEAD = re.compile(r"\s*(?:```(?:json)?\s*)?")  # allowed before the JSON of a call
_DECODER = json.JSONDecoder(strict=False)
_LONGEST_WORD = len("-Infinity")  # the longest JSON literal outside strings, numbers aside
_GOOGLE_ARG = re.compile(r"^\s*\*{0,2}(\w+)\s*(?:\([^)]*\)\s*)?:\s*(.*)$")
_SPHINX_ARG = re.compile(r"^\s*:param\s(?:[^:]*\s)?(\w+)\s*:\s*(.*)$")
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?)\s*:\s*$")


class ToolError(Exception):
    """An error of a tool whose message is told to the model as it is."""


@dataclass(frozen=True)
class Tool:
    """Something that a model can call.

    Attributes:
        function: called with the arguments that `arguments` returns; sync or async.
        schema: name, description and JSON schema of the parameters, in OpenAI's function format.
        arguments: checks a call's arguments and converts them for the function; raises a TypeError,
            worded for the model, if one is unknown, missing or of the wrong type.
        fatal: exceptions of the function that end the episode; others are told to the model.
    """

    name: str
    function: ToolFunction
    schema: Mapping[str, Any]
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    fatal: tuple[type[Exception], ...] = ()

    def __call__(self, /, **arguments: Any) -> Any:
        """Call the function with checked arguments."""
        return self.function(**self.arguments(arguments))

    @classmethod
    def from_function(cls, function: ToolFunction) -> Tool:
        """Build a tool from a function's signature and docstring.

        Raises:
            ConfigError: the function has `*args` or positional-only parameters, which a JSON object
                cannot name.
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
                with contextlib.suppress(TypeError, ValueError):  # no JSON form: leave it out
                    properties[key]["default"] = plain_default(parameter.default)
        required = tuple(k for k, p in parameters.items() if p.default is p.empty)
        described = {"type": "object", "properties": properties, "required": list(required)}
        fitted = functools.partial(_fit_arguments, hints, required)
        return cls(name, function, _tool_schema(name, text, described), fitted)

    @classmethod
    def from_schema(
        cls,
        name: str,
        description: str,
        parameters: Mapping[str, Any],
        function: ToolFunction,
        fatal: tuple[type[Exception], ...] = (),
    ) -> Tool:
        """Build a tool from a JSON schema, which arguments are checked against.

        Raises:
            ConfigError: the schema is invalid, is not that of an object, or refers to others.
        """
        validator = validator_of(name, parameters)
        described = {**parameters, "type": "object"}
        properties = parameters.get("properties", {})  # a property may be `true`: anything
        described["properties"] = {
            key: value if isinstance(value, Mapping) else {} for key, value in properties.items()
        }
        checked = functools.partial(validated, validator)
        shown = _tool_schema(name, inspect.cleandoc(description), described)
        return cls(name, function, shown, checked, fatal)


def _tool_schema(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": replace_surrogates(function)}


def _fit_arguments(
    hints: Mapping[str, Any], required: Sequence[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Convert a call's arguments to the hinted types."""
    for key in given:
        if key not in hints:
            raise TypeError(f"unknown argument {key!r}.{suggestion(key, list(hints))}")
    for key in required:
        if key not in given:
            raise TypeError(f"missing argument {key!r}")
    fitted = {}
    for key, value in given.items():
        try:
            fitted[key] = fit(value, hints[key])
        except TypeError as error:
            raise TypeError(f"argument {key!r}: {error}") from None
    return fitted


@dataclass(frozen=True)
class ParsedCall:
    """A call in a reply; `error` tells the model why it cannot be run."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


class Toolkit:
    """The tools offered in one call of an agent.

    Raises:
        ConfigError: two tools have the same name, or a function cannot be a tool.
    """

    def __init__(self, functions: Sequence[ToolFunction]) -> None:
        if isinstance(functions, contextlib.AbstractAsyncContextManager):
            raise ConfigError(
                "tools=rayrl.mcp(…): open it first, `async with rayrl.mcp(…) as tools:`"
            )
        tools = [one if isinstance(one, Tool) else _tool(one) for one in functions]
        self.tools = {tool.name: tool for tool in tools}
        if len(self.tools) != len(tools):
            names = Counter(tool.name for tool in tools)
            twice = ", ".join(name for name, number in names.items() if number > 1)
            raise ConfigError(
                f"tools must have different names, got {twice} more than once: rename a function, "
                "or give the tools of an MCP server a prefix, rayrl.mcp(…, prefix='files_')"
            )
        self.schemas = tuple(tool.schema for tool in self.tools.values())

    async def run(self, call: ParsedCall) -> tuple[str, bool]:
        """Run a call; exceptions of the tool become error results, unless they are fatal.

        Returns:
            The result or error as text for the model, and whether the call failed.
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
            if not isinstance(result, str):
                with contextlib.suppress(TypeError, ValueError):  # no JSON form: use str()
                    return json.dumps(result, ensure_ascii=False), False
            return str(result), False
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt):  # not the tool's
            raise
        except tool.fatal:
            raise
        except ToolError as error:
            return f"Error: {call.name}: {error}", True
        except BaseException as error:  # SystemExit would end every other episode
            return f"Error: {call.name} raised {describe_error(error)}", True


_tool = functools.lru_cache(256)(Tool.from_function)


def parse_calls(text: str, *, cut: bool = False, thinking: bool = False) -> list[ParsedCall]:
    """Parse every `<tool_call>` of a reply, in order; a malformed one carries its error.

    Calls within a thought (`<think>`, closed or not) are drafts and are ignored.

    Args:
        text: the reply.
        cut: whether the reply was cut off; if that broke its last call, the call's error says so.
        thinking: whether the reply begins within a thought that the prompt opened.
    """
    blocks, _ = _read_blocks(text, thinking)
    calls = [block.call for block in blocks]
    if cut and calls and calls[-1].error and not blocks[-1].whole:
        calls[-1] = replace(calls[-1], error=CUT_OFF)
    return calls


def without_calls(text: str) -> str:
    """Remove the `<tool_call>` blocks from a reply."""
    blocks, _ = _read_blocks(text)
    starts = [block.start for block in blocks]
    ends = [block.end for block in blocks]
    pairs = zip([0, *ends], [*starts, len(text)], strict=True)
    return "".join(text[end:start] for end, start in pairs).strip()


def close_open_mark(text: str) -> str:
    """Append the closing mark if a text ends within a call or a thought."""
    return text + _read_blocks(text)[1]


def thought_end(text: str, start: int) -> int:
    """Return the index after the thought that contains `start`, or the text's length."""
    end = text.find(_THOUGHT, start)
    return len(text) if end < 0 else end + len(_THOUGHT)


@dataclass(frozen=True)
class _Block:
    """A call at text[start:end], marks included; `whole`: it has a closing mark."""

    call: ParsedCall
    start: int
    end: int
    whole: bool


def _read_blocks(text: str, thinking: bool = False) -> tuple[list[_Block], str]:
    """Return the calls outside thoughts, and the closing mark that the text lacks at its end."""
    blocks: list[_Block] = []
    at = thought_end(text, 0) if thinking else 0
    missing = _THOUGHT if thinking and not text.endswith(_THOUGHT, 0, at) else ""
    while mark := _MARK.search(text, at):
        missing = ""
        if mark[0] == _OPEN:
            call, at, whole = read_call(text, mark.end())
            blocks.append(_Block(call, mark.start(), at, whole))
            missing = "" if whole else _CLOSE
        elif mark[0] == _THINK:
            at = thought_end(text, mark.end())
            missing = "" if text.endswith(_THOUGHT, mark.end(), at) else _THOUGHT
        else:  # ends a thought that began before the text
            blocks, at = [], mark.end()
    return blocks, missing


def read_call(text: str, start: int, *, in_part: bool = False) -> tuple[ParsedCall, int, bool]:
    """Read the call whose opening mark ends at `start`.

    Its closing mark is the first one after its JSON, whose strings may contain that mark.

    Args:
        text: the text with the call.
        start: index after the opening mark.
        in_part: whether more text may follow; incomplete JSON is then not an error.

    Returns:
        The call, the index after it, and whether it has its closing mark.
    """
    begin = _LEAD.match(text, start).end()  # type: ignore[union-attr]
    close = _find_close(text, begin)
    while True:
        body = text[begin : close + len(_CLOSE)]
        try:
            parsed, size = _DECODER.raw_decode(body)
            call = _to_call(replace_surrogates(parsed))
            close = _find_close(text, begin + size)
        except (ValueError, RecursionError) as error:  # too deep, or a number of 5,000 digits
            reason = getattr(error, "msg", type(error).__name__)
            in_string = reason.startswith("Unterminated string")
            if in_string and close < len(text):
                # the searched length doubles, so that all attempts together take linear time
                close = _find_close(text, begin + 2 * len(body))
                continue
            at_end = in_string or getattr(error, "pos", 0) > len(body.rstrip()) - _LONGEST_WORD
            if not (in_part and at_end and close == len(text)):
                close = _find_close(text, begin)
            excerpt = text[begin : min(close, begin + 200)]
            call = ParsedCall("", error=f"the tool call is not valid JSON ({reason}): {excerpt}")
        return call, min(close + len(_CLOSE), len(text)), close < len(text)


def _find_close(text: str, start: int) -> int:
    """Return the index of the next closing mark, or the text's length."""
    index = text.find(_CLOSE, start)
    return len(text) if index < 0 else index


def format_call(name: str, arguments: Any) -> str:
    """Format a call as a model writes it.

    `arguments` is a mapping; any other value, as a model may write instead, is formatted as it is.
    """
    given = dict(arguments) if isinstance(arguments, Mapping) else arguments
    body = json.dumps({"name": name, "arguments": given}, ensure_ascii=False)
    return f"{_OPEN}\n{body}\n{_CLOSE}"


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Describe tools as text, for chat templates that do not support them."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = format_call("tool_name", {"argument": "value"})
    return (
        f"You can call these tools:\n{lines}\n"
        f"To call one, write\n{example}\nThe results come back in the next message."
    )


def add_to_first_message(messages: Sequence[Message], text: str) -> list[Message]:
    """Add a description of tools to the first message: after a system prompt, else before it."""
    first = messages[0]
    joined = [first.content, text] if first.role == "system" else [text, first.content]
    return [replace(first, content="\n\n".join(joined)), *messages[1:]]


def as_user_messages(
    messages: Sequence[Message], unchanged: Container[str | None] = ()
) -> list[Message]:
    """Convert tool results to user messages, for templates and servers without the role `tool`.

    Consecutive results become one message, because many templates refuse two of a role in a row.

    Args:
        messages: messages of any role.
        unchanged: ids of calls whose results are not converted.
    """
    converted: list[Message] = []
    for is_result, group in itertools.groupby(
        messages, lambda message: message.role == "tool" and message.tool_call_id not in unchanged
    ):
        if is_result:
            texts = [f"<tool_response>{result.content}</tool_response>" for result in group]
            converted.append(Message("user", "\n".join(texts)))
        else:
            converted += group
    return converted


def _to_call(parsed: Any) -> ParsedCall:
    if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str):
        return ParsedCall("", error='a tool call must be {"name": ..., "arguments": {...}}')
    arguments = parsed.get("arguments", parsed.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as a JSON string
        with contextlib.suppress(ValueError, RecursionError):
            arguments = replace_surrogates(json.loads(arguments))
    if not isinstance(arguments, dict):
        return ParsedCall(parsed["name"], error=f"{parsed['name']}: arguments must be an object")
    return ParsedCall(parsed["name"], arguments)


def _docstring(function: ToolFunction) -> tuple[str, dict[str, str]]:
    """Return the text before the first section, and the description of each parameter."""
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
    """Return the name in a tool's JSON schema."""
    return str(schema["function"]["name"])


def new_tools(tools: Sequence[Mapping[str, Any]], known: Container[str]) -> list[Mapping[str, Any]]:
    """Return the tools whose names are not in `known`: those not yet described to the model."""
    return [schema for schema in tools if tool_name(schema) not in known]
