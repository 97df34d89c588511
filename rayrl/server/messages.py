"""Messages and tools of a request as ids: as training has them, see `rayrl.chat.renderer`.

A past reply is made of ids as `Chat.reply` makes them for supervised training, and what follows it
is appended as an agent's next message is. A call in a past reply is written as models write it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayrl.chat.renderer import Chat, Ids
from rayrl.chat.tools import format_call
from rayrl.errors import ConfigError
from rayrl.server.errors import ApiError
from rayrl.server.fields import ChatBody, parse_json
from rayrl.types import Message, Role

__all__ = ["Asked", "check_room", "read_chat"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Asked:
    """What the model is to continue.

    Attributes:
        ids: the whole prompt.
        calls: whether `<tool_call>` in the answer is a call.
        begun: how the answer begins, if a call is demanded; the last ids of the prompt say it.
        once: whether the first call ends the answer.
    """

    ids: Ids
    calls: bool = False
    begun: str = ""
    once: bool = False


def read_chat(chat: Chat, body: ChatBody, max_len: int) -> Asked:
    """The prompt of a chat request.

    Args:
        max_len: ids of the longest prompt there can be; one that must have more is not tokenized.

    Raises:
        ApiError: 400, naming the field.
    """
    check_room(len(body.messages), max_len, "messages")  # each has an id at least
    messages = read_messages(body.messages)
    check_room(chat.min_ids(message.content for message in messages), max_len, "messages")
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    choice, named = _choice(body.tool_choice, tools)
    offered = tools if choice != "none" else []
    check_room(chat.min_ids([json.dumps(offered)] if offered else []), max_len, "tools")
    begun = ""
    if choice == "required":
        begun = '<tool_call>\n{"name": "'
        if len(tools) == 1:
            named = tools[0]["function"]["name"]
    if named:
        begun = f'<tool_call>\n{{"name": "{named}", "arguments":'
    try:
        ids = _prompt(chat, messages, offered)
    except ConfigError as error:
        param = "tools" if "tool" in str(error).split(":")[0] else "messages"
        raise ApiError(400, str(error), param=param) from error
    once = choice == "named" or body.parallel_tool_calls is False
    opened = chat.reply(begun)[:-1] if begun else ()
    return Asked((*ids, *opened), bool(offered), begun, once and bool(offered))


def _prompt(chat: Chat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Ids:
    replies = [at for at, message in enumerate(messages) if message.role == "assistant"]
    if replies[:1] == [0]:  # nobody has asked anything: only the template knows how that looks
        return chat.start(messages, tools)
    ends = [*replies[1:], len(messages)]
    ids = [*chat.start(messages[: replies[0] if replies else None], tools)]
    for at, end in zip(replies, ends, strict=False):
        ids += chat.reply(messages[at].content)
        ids += chat.extend(messages[at + 1 : end], last_ids_finished=True)
    return tuple(ids)


def check_room(fewest: int, max_len: int, param: str) -> None:
    """Raise ApiError (400) if a prompt of `fewest` ids or more leaves no room for an answer."""
    if fewest >= max_len:
        raise ApiError(
            400,
            f"This model's maximum context length is {max_len} tokens, and {param} has at least "
            f"{fewest}. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def read_messages(data: Sequence[object]) -> list[Message]:
    """Messages as rayrl has them; calls are part of the text."""
    messages: list[Message] = []
    calls: set[str] = set()
    for index, one in enumerate(data):
        where = f"messages[{index}]"
        if not isinstance(one, dict):
            raise _wrong(where, "must be an object with a role and content.")
        for key, value in one.items():
            if key not in _KEYS and value is not None:
                raise _wrong(f"{where}.{key}", "is not supported.", "unsupported_parameter")
        role = _ROLES.get(str(one.get("role")))
        if role is None:
            raise _wrong(f"{where}.role", f"must be one of {', '.join(_ROLES)}.")
        message = Message(role, _content(one.get("content"), f"{where}.content", role))
        if role == "assistant":
            message = _with_calls(message, one.get("tool_calls"), where, calls)
        elif one.get("tool_calls") is not None:
            raise _wrong(f"{where}.tool_calls", "only an assistant's message has calls.")
        if role == "tool":
            answers = one.get("tool_call_id")
            if not isinstance(answers, str) or answers not in calls:
                raise _wrong(f"{where}.tool_call_id", "must be the id of a call made before.")
            message = replace(message, tool_call_id=answers)
        messages.append(message)
    return messages


def _content(content: object, where: str, role: Role) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise _wrong(where, "must be a string or a list of text parts.")
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"content of type {kind!r} is not supported: this model reads text."
            raise _wrong(f"{where}[{index}].type", what, "unsupported_content")
        text = part.get("text")
        if not isinstance(text, str):
            raise _wrong(f"{where}[{index}].text", "must be a string.")
        texts.append(text)
    return "\n".join(texts)


def _with_calls(message: Message, calls: object, where: str, known: set[str]) -> Message:
    """The message with its calls written out."""
    if calls is None:
        return message
    if not isinstance(calls, list):
        raise _wrong(f"{where}.tool_calls", "must be a list.")
    texts = [message.content] if message.content else []
    for index, call in enumerate(calls):
        here = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"{here}.function", "must have a name and arguments.")
        if not isinstance(call.get("id"), str):
            raise _wrong(f"{here}.id", "must be a string.")
        written, place = function.get("arguments") or "{}", f"{here}.function.arguments"
        arguments = parse_json(written, place, place) if isinstance(written, str) else None
        if not isinstance(arguments, dict):
            raise _wrong(place, "must be a JSON object, as a string.")
        known.add(call["id"])
        texts.append(format_call(function["name"], arguments))
    return replace(message, content="\n".join(texts))


def _tool(tool: object, where: str) -> dict[str, Any]:
    """A tool as the templates want it; the order of its keys is kept, for the model reads them."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise _wrong(f"{where}.type", "must be 'function'.", "unsupported_parameter")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _wrong(f"{where}.function", "must be an object.")
    if not _NAME.fullmatch(str(function.get("name", ""))):
        raise _wrong(f"{where}.function.name", "must be 1 to 64 letters, digits, _, - or dots.")
    if function.get("strict"):
        what = "arguments cannot be made to follow a schema; leave it out and check them."
        raise _wrong(f"{where}.function.strict", what, "unsupported_parameter")
    if not isinstance(function.get("parameters") or {}, dict):
        raise _wrong(f"{where}.function.parameters", "must be a JSON schema.")
    told = {key: value for key, value in function.items() if key != "strict" and value is not None}
    told.setdefault("description", "")
    told.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": told}


def _choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """none, auto, required or named; and the name."""
    if choice is None:
        return ("auto" if tools else "none"), ""
    if choice == "none":
        return "none", ""
    if not tools:
        raise _wrong("tool_choice", "there are no tools to choose from.")
    if choice in ("auto", "required"):
        return str(choice), ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or name is None:
        raise _wrong("tool_choice", "must be none, auto, required or a function by name.")
    if name not in [tool["function"]["name"] for tool in tools]:
        raise _wrong("tool_choice.function.name", f"{name!r} is not among the tools.")
    return "named", str(name)


def _wrong(where: str, what: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{where}: {what}", param=where, code=code)
