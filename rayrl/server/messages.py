"""Convert the messages and tools of a request to ids as in training, see `rayrl.chat.renderer`.

Past replies are tokenized with `Chat.reply`, as for supervised training, and the messages after
them are appended like an agent's next message. Calls in past replies are written as models write
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.chat.renderer import Chat, Ids
from rayrl.chat.requests import ApiError, invalid, read_messages, read_tool
from rayrl.errors import ConfigError
from rayrl.server.fields import ChatBody
from rayrl.types import Message

__all__ = ["Prompt", "check_prompt_length", "read_chat"]


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
    tools = [read_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
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


def _tool_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return "none", "auto", "required" or "named", and the name."""
    if choice is None:
        return ("auto" if tools else "none"), ""
    if choice == "none":
        return "none", ""
    if not tools:
        raise invalid("tool_choice", "there are no tools to choose from.")
    if choice in ("auto", "required"):
        return str(choice), ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or name is None:
        raise invalid("tool_choice", "must be none, auto, required or a function by name.")
    if name not in [tool["function"]["name"] for tool in tools]:
        raise invalid("tool_choice.function.name", f"{name!r} is not among the tools.")
    return "named", str(name)
