"""Conversations in data: lists of messages in the form of a chat API."""

from __future__ import annotations

import json
from typing import Any, get_args

from rayrl.errors import DataError
from rayrl.types import Message, Role, ToolCall

__all__ = ["chat_messages", "short"]


def chat_messages(value: Any, where: str) -> list[Message]:
    """Messages from objects with role and content, and perhaps tool calls.

    Raises:
        DataError: it is something else; the message begins with `where`.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of messages, got {short(value)}")
    return [_message(message, f"{where}: message {k}") for k, message in enumerate(value, 1)]


def _message(value: Any, where: str) -> Message:
    roles = get_args(Role)
    if not isinstance(value, dict) or value.get("role") not in roles:
        raise DataError(f"{where} must have a role ({', '.join(roles)}), got {short(value)}")
    given = value.get("tool_calls") or []
    if not isinstance(given, list):
        raise DataError(f"{where}: its tool_calls must be a list, got {short(given)}")
    calls = tuple(_call(call, f"{where}: tool call {k}") for k, call in enumerate(given, 1))
    content = value.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} must have text as its content, got {short(value)}")
    return Message(value["role"], content, calls, value.get("tool_call_id"))


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _call(value: Any, where: str) -> ToolCall:
    """A call as an API gives it, its arguments as JSON text, or as data hold it."""
    called = value.get("function", value) if isinstance(value, dict) else None
    name = called.get("name") if isinstance(called, dict) else None
    if not isinstance(called, dict) or not isinstance(name, str):
        raise DataError(f"{where} must have a function with a name, got {short(value)}")
    arguments = called.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        raise DataError(f"{where}: its arguments are not JSON: {short(arguments)}") from None
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: its arguments must be an object, got {short(arguments)}")
    return ToolCall(str(value.get("id") or ""), name, arguments)


def short(value: Any) -> str:
    """A value as JSON, cut to what a message can show."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
