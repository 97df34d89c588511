"""Convert the messages and tools of a request to ids as in training, see `rayrl.chat.renderer`.

Past replies are tokenized with `Chat.reply`, as for supervised training, and the messages after
them are appended like an agent's next message. Calls in past replies are written as models write
them.
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

__all__ = ["Prompt", "check_prompt_length", "read_chat"]

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
class Prompt:
    """A prompt for the model.

    Attributes:
        ids: the whole prompt.
        calls: whether `<tool_call>` in the answer is a call.
        prefix: beginning of the answer, if a call is required; included in `ids`.
        single_call: whether the first call ends the answer.
    """

    ids: Ids
    calls: bool = False
    prefix: str = ""
    single_call: bool = False


def read_chat(chat: Chat, body: ChatBody, max_len: int) -> Prompt:
    """Create the prompt of a chat request.

    Args:
        max_len: context length in ids; longer prompts are rejected, if possible before tokenizing.

    Raises:
        ApiError: 400, naming the field.
    """
    check_prompt_length(len(body.messages), max_len, "messages")  # each has at least one id
    messages = read_messages(body.messages)
    fewest = chat.min_ids(message.content for message in messages)
    check_prompt_length(fewest, max_len, "messages")
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    choice, name = _tool_choice(body.tool_choice, tools)
    offered = tools if choice != "none" else []
    fewest = chat.min_ids([json.dumps(offered)] if offered else [])
    check_prompt_length(fewest, max_len, "tools")
    prefix = ""
    if choice == "required":
        prefix = '<tool_call>\n{"name": "'
        if len(tools) == 1:
            name = tools[0]["function"]["name"]
    if name:
        prefix = f'<tool_call>\n{{"name": "{name}", "arguments":'
    try:
        ids = _prompt(chat, messages, offered)
    except ConfigError as error:
        param = "tools" if "tool" in str(error).split(":")[0] else "messages"
        raise ApiError(400, str(error), param=param) from error
    single_call = choice == "named" or body.parallel_tool_calls is False
    prefix_ids = chat.reply(prefix)[:-1] if prefix else ()
    return Prompt((*ids, *prefix_ids), bool(offered), prefix, single_call and bool(offered))


def _prompt(chat: Chat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Ids:
    replies = [at for at, message in enumerate(messages) if message.role == "assistant"]
    if replies[:1] == [0]:  # a conversation that starts with a reply is left to the template
        return chat.start(messages, tools)
    ends = [*replies[1:], len(messages)]
    ids = [*chat.start(messages[: replies[0] if replies else None], tools)]
    for at, end in zip(replies, ends, strict=False):
        ids += chat.reply(messages[at].content)
        ids += chat.extend(messages[at + 1 : end], last_ids_finished=True)
    return tuple(ids)


def check_prompt_length(fewest: int, max_len: int, param: str) -> None:
    """Raise ApiError (400) if a prompt of at least `fewest` ids leaves no space for an answer."""
    if fewest >= max_len:
        raise ApiError(
            400,
            f"This model's maximum context length is {max_len} tokens, and {param} has at least "
            f"{fewest}. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def read_messages(data: Sequence[object]) -> list[Message]:
    """Convert a request's messages; tool calls become part of the text."""
    messages: list[Message] = []
    call_ids: set[str] = set()
    for index, item in enumerate(data):
        where = f"messages[{index}]"
        if not isinstance(item, dict):
            raise _invalid(where, "must be an object with a role and content.")
        for key, value in item.items():
            if key not in _KEYS and value is not None:
                raise _invalid(f"{where}.{key}", "is not supported.", "unsupported_parameter")
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            raise _invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}.")
        message = Message(role, _content(item.get("content"), f"{where}.content", role))
        if role == "assistant":
            message = _with_calls(message, item.get("tool_calls"), where, call_ids)
        elif item.get("tool_calls") is not None:
            raise _invalid(f"{where}.tool_calls", "only assistant messages can have calls.")
        if role == "tool":
            call_id = item.get("tool_call_id")
            if not isinstance(call_id, str) or call_id not in call_ids:
                raise _invalid(f"{where}.tool_call_id", "must be the id of an earlier call.")
            message = replace(message, tool_call_id=call_id)
        messages.append(message)
    return messages


def _content(content: object, where: str, role: Role) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise _invalid(where, "must be a string or a list of text parts.")
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"content of type {kind!r} is not supported: this model reads text."
            raise _invalid(f"{where}[{index}].type", what, "unsupported_content")
        text = part.get("text")
        if not isinstance(text, str):
            raise _invalid(f"{where}[{index}].text", "must be a string.")
        texts.append(text)
    return "\n".join(texts)


def _with_calls(message: Message, calls: object, where: str, call_ids: set[str]) -> Message:
    """Append the calls to the message's text, and their ids to `call_ids`."""
    if calls is None:
        return message
    if not isinstance(calls, list):
        raise _invalid(f"{where}.tool_calls", "must be a list.")
    texts = [message.content] if message.content else []
    for index, call in enumerate(calls):
        here = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid(f"{here}.function", "must have a name and arguments.")
        if not isinstance(call.get("id"), str):
            raise _invalid(f"{here}.id", "must be a string.")
        text, param = function.get("arguments") or "{}", f"{here}.function.arguments"
        arguments = parse_json(text, param, param) if isinstance(text, str) else None
        if not isinstance(arguments, dict):
            raise _invalid(param, "must be a JSON object, as a string.")
        call_ids.add(call["id"])
        texts.append(format_call(function["name"], arguments))
    return replace(message, content="\n".join(texts))


def _tool(tool: object, where: str) -> dict[str, Any]:
    """Convert a tool to the templates' format; the model sees its keys, so their order is kept."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise _invalid(f"{where}.type", "must be 'function'.", "unsupported_parameter")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _invalid(f"{where}.function", "must be an object.")
    if not _NAME.fullmatch(str(function.get("name", ""))):
        raise _invalid(f"{where}.function.name", "must be 1 to 64 letters, digits, _, - or dots.")
    if function.get("strict"):
        what = "arguments cannot be forced to match a schema; omit it and validate them."
        raise _invalid(f"{where}.function.strict", what, "unsupported_parameter")
    if not isinstance(function.get("parameters") or {}, dict):
        raise _invalid(f"{where}.function.parameters", "must be a JSON schema.")
    schema = {k: value for k, value in function.items() if k != "strict" and value is not None}
    schema.setdefault("description", "")
    schema.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": schema}


def _tool_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return "none", "auto", "required" or "named", and the name."""
    if choice is None:
        return ("auto" if tools else "none"), ""
    if choice == "none":
        return "none", ""
    if not tools:
        raise _invalid("tool_choice", "there are no tools to choose from.")
    if choice in ("auto", "required"):
        return str(choice), ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or name is None:
        raise _invalid("tool_choice", "must be none, auto, required or a function by name.")
    if name not in [tool["function"]["name"] for tool in tools]:
        raise _invalid("tool_choice.function.name", f"{name!r} is not among the tools.")
    return "named", str(name)


def _invalid(where: str, what: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{where}: {what}", param=where, code=code)
