"""Messages and tools in OpenAI's format, as clients send them, and the errors that they get."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rayrl.chat.tools import format_call
from rayrl.errors import clip
from rayrl.types import Message, Role, replace_surrogates

__all__ = ["ApiError", "invalid", "parse_json", "read_messages", "read_tool"]

MAX_DEPTH = 100  # nesting of objects and lists; deeper ones overflow stacks further on
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # escaped, or as bytes
_TYPES = {401: "authentication_error", 404: "not_found_error"}
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ApiError(Exception):
    """An error response to a request.

    Args:
        status: HTTP status.
        message: what is wrong and what to do; clipped, because it may quote the request.
        param: the field of the body, e.g. `messages[0].content`.
        code: machine-readable code, e.g. `context_length_exceeded`.
        retry_after: seconds after which to retry; 0 for none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = 0,
    ) -> None:
        super().__init__(clip(message, 2_000))
        self.status, self.message, self.code = status, str(self), code
        self.param = param and clip(param, 200)
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the response."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def parse_json(text: bytes | str, what: str = "The body", param: str | None = None) -> Any:
    """Parse a client's JSON.

    Args:
        text: the JSON.
        what: its name in errors.
        param: the field that contains it.

    Raises:
        ApiError: 400, it is not JSON or nested too deeply.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        why = f"{what} is not valid JSON: {why}"
        raise ApiError(400, why, param=param, code="invalid_json") from None
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(MAX_DEPTH):
        children = [item.values() if isinstance(item, dict) else item for item in level]
        level = [x for part in children for x in part if isinstance(x, dict | list)]
        if not level:
            raw = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
            return replace_surrogates(data) if _SURROGATE.search(raw) else data
    why = f"{what} is nested deeper than {MAX_DEPTH} levels."
    raise ApiError(400, why, param=param, code="invalid_json")


def read_messages(
    data: Sequence[object], start: int = 0, call_ids: Iterable[str] = ()
) -> list[Message]:
    """Convert a request's messages; tool calls become part of the text.

    Args:
        data: the messages.
        start: number of those before, which were converted earlier.
        call_ids: ids of the tool calls in these.
    """
    messages: list[Message] = []
    call_ids = set(call_ids)
    for index, item in enumerate(data, start):
        where = f"messages[{index}]"
        if not isinstance(item, dict):
            raise invalid(where, "must be an object with a role and content.")
        for key, value in item.items():
            if key not in _KEYS and value is not None:
                raise invalid(f"{where}.{key}", "is not supported.", "unsupported_parameter")
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            raise invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}.")
        message = Message(role, _content(item.get("content"), f"{where}.content", role))
        if role == "assistant":
            message = _with_calls(message, item.get("tool_calls"), where, call_ids)
        elif item.get("tool_calls") is not None:
            raise invalid(f"{where}.tool_calls", "only assistant messages can have calls.")
        if role == "tool":
            call_id = item.get("tool_call_id")
            if not isinstance(call_id, str) or call_id not in call_ids:
                raise invalid(f"{where}.tool_call_id", "must be the id of an earlier call.")
            message = replace(message, tool_call_id=call_id)
        messages.append(message)
    return messages


def _content(content: object, where: str, role: Role) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise invalid(where, "must be a string or a list of text parts.")
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"content of type {kind!r} is not supported: this model reads text."
            raise invalid(f"{where}[{index}].type", what, "unsupported_content")
        text = part.get("text")
        if not isinstance(text, str):
            raise invalid(f"{where}[{index}].text", "must be a string.")
        texts.append(text)
    return "\n".join(texts)


def _with_calls(message: Message, calls: object, where: str, call_ids: set[str]) -> Message:
    """Append the calls to the message's text, and their ids to `call_ids`."""
    if calls is None:
        return message
    if not isinstance(calls, list):
        raise invalid(f"{where}.tool_calls", "must be a list.")
    texts = [message.content] if message.content else []
    for index, call in enumerate(calls):
        here = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"{here}.function", "must have a name and arguments.")
        if not isinstance(call.get("id"), str):
            raise invalid(f"{here}.id", "must be a string.")
        text, param = function.get("arguments") or "{}", f"{here}.function.arguments"
        arguments = parse_json(text, param, param) if isinstance(text, str) else None
        if not isinstance(arguments, dict):
            raise invalid(param, "must be a JSON object, as a string.")
        call_ids.add(call["id"])
        texts.append(format_call(function["name"], arguments))
    return replace(message, content="\n".join(texts))


def read_tool(tool: object, where: str) -> dict[str, Any]:
    """Convert a tool to the templates' format; the model sees its keys, so their order is kept."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise invalid(f"{where}.type", "must be 'function'.", "unsupported_parameter")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function", "must be an object.")
    if not _NAME.fullmatch(str(function.get("name", ""))):
        raise invalid(f"{where}.function.name", "must be 1 to 64 letters, digits, _, - or dots.")
    if function.get("strict"):
        what = "arguments cannot be forced to match a schema; omit it and validate them."
        raise invalid(f"{where}.function.strict", what, "unsupported_parameter")
    if not isinstance(function.get("parameters"), dict | None):
        raise invalid(f"{where}.function.parameters", "must be a JSON schema.")
    if not isinstance(function.get("description"), str | None):
        raise invalid(f"{where}.function.description", "must be a string.")
    schema = {k: value for k, value in function.items() if k != "strict" and value is not None}
    schema.setdefault("description", "")
    schema.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": schema}


def invalid(where: str, what: str, code: str = "invalid_value") -> ApiError:
    """The error for a field at `where`."""
    return ApiError(400, f"{where}: {what}", param=where, code=code)
