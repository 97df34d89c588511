"""The three APIs that programs speak, to and from messages of OpenAI's chat completions.

Every field of a request is honoured, refused, or concerns what the run decides (the model and its
sampling); an answer is complete before its first event is sent.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rayrl.chat.requests import ApiError, invalid
from rayrl.types import Turn

__all__ = ["DIALECTS", "Asked", "Dialect"]

Json = dict[str, Any]
Event = tuple[str, Json]  # its name, "" for none, and data


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        messages: as in OpenAI's chat completions.
        tools: likewise.
        max_tokens: the request's own limit.
        temperature: the request's own.
        stream: whether the answer is sent as events.
        body: the request.
    """

    messages: Sequence[Json]
    tools: Sequence[Json]
    max_tokens: int | None
    temperature: float | None
    stream: bool
    body: Mapping[str, Any]


class Dialect(Protocol):
    """One API."""

    path: str

    def read(self, body: Json) -> Asked:
        """Read a request.

        Raises:
            ApiError: 400, naming the field.
        """

    def answer(self, asked: Asked, message: Json, turn: Turn) -> Json:
        """The whole answer."""

    def events(self, asked: Asked, message: Json, turn: Turn) -> Iterator[Event]:
        """The answer as server-sent events."""

    def error(self, error: ApiError) -> Json:
        """The body of an error."""


def _tokens(turn: Turn) -> tuple[int, int]:
    return turn.offset + len(turn.prompt_ids), len(turn.completion_ids)


def _list(body: Mapping[str, Any], key: str, *, needed: bool = False) -> list[Any]:
    value = body.get(key)
    if value is None and not needed:
        return []
    if not isinstance(value, list) or (needed and not value):
        raise invalid(key, "must be a list that is not empty." if needed else "must be a list.")
    return value


def _limit(body: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = body.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise invalid(key, "must be a whole number, 1 or more.")
            return value
    return None


def _temperature(body: Mapping[str, Any]) -> float | None:
    value = body.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2:
        raise invalid("temperature", "must be a number from 0 to 2.")
    return float(value)


def _refuse(body: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that would change the answer in a way that is not supported."""
    for key, values in harmless.items():
        if body.get(key) is not None and body[key] not in values:
            raise invalid(key, f"{body[key]!r} is not supported here.", "unsupported_parameter")


def _offered(tools: Sequence[Json], choice: object) -> Sequence[Json]:
    """The tools, unless none may be called; a call cannot be forced."""
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    if kind not in (None, "auto", "none"):
        raise invalid("tool_choice", f"{kind!r} is not supported: a model in training chooses.")
    return () if kind == "none" else tools


def _object(value: object, where: str) -> Json:
    if not isinstance(value, dict):
        raise invalid(where, "must be an object.")
    return value


def _text(content: object, where: str) -> str:
    """The text of a string or of a list of parts with a `text`."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [None]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise invalid(where, "must be a string or a list of texts: this model reads text.")
    return "\n".join(texts)


def _call(call_id: object, name: object, arguments: str, where: str) -> Json:
    if not isinstance(call_id, str) or not isinstance(name, str):
        raise invalid(where, "must have an id and a name.")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class _OpenAI:
    def error(self, error: ApiError) -> Json:
        """See `Dialect`."""
        return error.body


class ChatCompletions(_OpenAI):
    """OpenAI's chat completions."""

    path = "/v1/chat/completions"

    def read(self, body: Json) -> Asked:
        """See `Dialect`."""
        text = {"type": "text"}
        harmless = {"n": (1,), "logprobs": (False,), "response_format": (text,), "functions": ()}
        _refuse(body, {**harmless, "modalities": (["text"],), "audio": (), "stop": ([],)})
        return Asked(
            _list(body, "messages", needed=True),
            _offered(_list(body, "tools"), body.get("tool_choice")),
            _limit(body, "max_completion_tokens", "max_tokens"),
            _temperature(body),
            bool(body.get("stream")),
            body,
        )

    def answer(self, asked: Asked, message: Json, turn: Turn) -> Json:
        """See `Dialect`."""
        finish = "tool_calls" if message.get("tool_calls") else turn.finish
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return {
            **self._head(asked, "chat.completion"),
            "choices": [choice],
            "usage": self._usage(turn),
        }

    def events(self, asked: Asked, message: Json, turn: Turn) -> Iterator[Event]:
        """See `Dialect`."""
        head = self._head(asked, "chat.completion.chunk")
        finish = "tool_calls" if message.get("tool_calls") else turn.finish
        calls = [{"index": k, **call} for k, call in enumerate(message.get("tool_calls", ()))]
        for delta in (
            {"role": "assistant", "content": message["content"] or ""},
            *({"tool_calls": [call]} for call in calls),
        ):
            yield "", {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        yield "", {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
        if (asked.body.get("stream_options") or {}).get("include_usage"):
            yield "", {**head, "choices": [], "usage": self._usage(turn)}

    def _head(self, asked: Asked, kind: str) -> Json:
        model = asked.body.get("model", "policy")
        name = f"chatcmpl-{secrets.token_hex(12)}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def _usage(self, turn: Turn) -> Json:
        prompt, completion = _tokens(turn)
        total = prompt + completion
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": total,
        }


class Responses(_OpenAI):
    """OpenAI's Responses, without state kept at the server."""

    path = "/v1/responses"

    def read(self, body: Json) -> Asked:
        """See `Dialect`."""
        _refuse(body, {"background": (False,), "previous_response_id": (), "conversation": ()})
        form = (body.get("text") or {}).get("format") or {}
        if form.get("type", "text") != "text":
            raise invalid("text.format", f"{form['type']!r} is not supported here.")
        messages: list[Json] = []
        if body.get("instructions"):
            messages.append({"role": "system", "content": body["instructions"]})
        items = body.get("input")
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        for k, item in enumerate(_list({"input": items}, "input", needed=True)):
            self._add(messages, _object(item, f"input[{k}]"), f"input[{k}]")
        tools = []
        for k, tool in enumerate(_list(body, "tools")):
            tool = _object(tool, f"tools[{k}]")
            if tool.get("type") != "function":
                raise invalid(f"tools[{k}].type", "must be 'function'.", "unsupported_parameter")
            given = {key: value for key, value in tool.items() if key != "type"}
            tools.append({"type": "function", "function": given})
        return Asked(
            messages,
            _offered(tools, body.get("tool_choice")),
            _limit(body, "max_output_tokens"),
            _temperature(body),
            bool(body.get("stream")),
            body,
        )

    def _add(self, messages: list[Json], item: Json, where: str) -> None:
        kind = item.get("type", "message")
        last = messages[-1] if messages else {}
        if kind == "function_call":
            arguments = item.get("arguments") or "{}"
            call = _call(item.get("call_id"), item.get("name"), arguments, where)
            if last.get("role") != "assistant":
                last = {"role": "assistant", "content": None}
                messages.append(last)
            last.setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _text(item.get("output"), f"{where}.output")
            call_id = item.get("call_id")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        elif kind == "message":
            content = _text(item.get("content"), f"{where}.content")
            messages.append({"role": item.get("role"), "content": content})
        elif kind != "reasoning":
            raise invalid(f"{where}.type", f"{kind!r} is not supported here.")

    def answer(self, asked: Asked, message: Json, turn: Turn) -> Json:
        """See `Dialect`."""
        output: list[Json] = []
        if message["content"] or not message.get("tool_calls"):
            part = {"type": "output_text", "text": message["content"], "annotations": []}
            output.append(
                {
                    "type": "message",
                    "id": f"msg_{secrets.token_hex(12)}",
                    "role": "assistant",
                    "status": "completed",
                    "content": [part],
                }
            )
        output += [
            {
                "type": "function_call",
                "id": f"fc_{secrets.token_hex(12)}",
                "call_id": call["id"],
                "status": "completed",
                **call["function"],
            }
            for call in message.get("tool_calls", ())
        ]
        return self._response(asked, output, turn)

    def _response(self, asked: Asked, output: list[Json], turn: Turn | None) -> Json:
        body = asked.body
        cut = turn is not None and turn.finish == "length"
        status = "in_progress" if turn is None else "incomplete" if cut else "completed"
        usage = None
        if turn is not None:
            prompt, completion = _tokens(turn)
            usage = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            }
        return {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.get("model", "policy"),
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata") or {},
            "output": output,
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "temperature": body.get("temperature"),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p"),
            "usage": usage,
        }

    def events(self, asked: Asked, message: Json, turn: Turn) -> Iterator[Event]:
        """See `Dialect`."""
        whole = self.answer(asked, message, turn)
        begun = {**whole, "status": "in_progress", "output": [], "usage": None}
        begun["incomplete_details"] = None
        plain: list[Event] = [("response.created", {"response": begun})]
        plain.append(("response.in_progress", {"response": begun}))
        for k, item in enumerate(whole["output"]):
            at = {"output_index": k, "item_id": item["id"]}
            if item["type"] == "message":
                part = item["content"][0]
                text, empty = part["text"], {**part, "text": ""}
                start = {**item, "status": "in_progress", "content": []}
                inside: list[Event] = [
                    ("response.content_part.added", {"content_index": 0, "part": empty}),
                    ("response.output_text.delta", {"content_index": 0, "delta": text}),
                    ("response.output_text.done", {"content_index": 0, "text": text}),
                    ("response.content_part.done", {"content_index": 0, "part": part}),
                ]
                for _, data in inside[1:3]:
                    data["logprobs"] = []
            else:
                start = {**item, "status": "in_progress", "arguments": ""}
                arguments, name = item["arguments"], item["name"]
                inside = [
                    ("response.function_call_arguments.delta", {"delta": arguments}),
                    (
                        "response.function_call_arguments.done",
                        {"arguments": arguments, "name": name},
                    ),
                ]
            plain.append(("response.output_item.added", {"output_index": k, "item": start}))
            plain += [(name, {**at, **data}) for name, data in inside]
            plain.append(("response.output_item.done", {"output_index": k, "item": item}))
        end = "response.incomplete" if whole["status"] == "incomplete" else "response.completed"
        plain.append((end, {"response": whole}))
        for number, (name, data) in enumerate(plain):
            yield name, {"type": name, "sequence_number": number, **data}


class Messages:
    """Anthropic's Messages: text, `tool_use` and `tool_result` blocks."""

    path = "/v1/messages"

    def read(self, body: Json) -> Asked:
        """See `Dialect`."""
        _refuse(body, {"stop_sequences": ([],)})
        messages: list[Json] = []
        if body.get("system"):
            messages.append({"role": "system", "content": _text(body["system"], "system")})
        for k, item in enumerate(_list(body, "messages", needed=True)):
            self._add(messages, _object(item, f"messages[{k}]"), f"messages[{k}]")
        tools = []
        for k, tool in enumerate(_list(body, "tools")):
            tool = _object(tool, f"tools[{k}]")
            if tool.get("type", "custom") != "custom":
                raise invalid(f"tools[{k}].type", "must be 'custom'.", "unsupported_parameter")
            function = {
                "name": tool.get("name"),
                "description": tool.get("description", ""),
                "parameters": tool.get("input_schema"),
            }
            tools.append({"type": "function", "function": function})
        return Asked(
            messages,
            _offered(tools, body.get("tool_choice")),
            _limit(body, "max_tokens"),
            _temperature(body),
            bool(body.get("stream")),
            body,
        )

    def _add(self, messages: list[Json], item: Json, where: str) -> None:
        blocks = item.get("content")
        if isinstance(blocks, str):
            blocks = [{"type": "text", "text": blocks}]
        if not isinstance(blocks, list):
            raise invalid(f"{where}.content", "must be a string or a list of blocks.")
        texts: list[Json] = []
        calls: list[Json] = []
        for k, block in enumerate(blocks):
            here = f"{where}.content[{k}]"
            kind = _object(block, here).get("type")
            if kind == "text":
                texts.append(block)
            elif kind == "tool_use":
                arguments = json.dumps(_object(block.get("input"), f"{here}.input"))
                calls.append(_call(block.get("id"), block.get("name"), arguments, here))
            elif kind == "tool_result":
                result = _text(block.get("content"), f"{here}.content")
                call_id = block.get("tool_use_id")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
            elif kind not in ("thinking", "redacted_thinking"):
                raise invalid(f"{here}.type", f"{kind!r} is not supported: this model reads text.")
        said = _text(texts, where)
        if item.get("role") == "assistant":
            reply: Json = {"role": "assistant", "content": said or None}
            messages.append(reply | ({"tool_calls": calls} if calls else {}))
        elif said or not blocks:
            messages.append({"role": item.get("role"), "content": said})

    def answer(self, asked: Asked, message: Json, turn: Turn) -> Json:
        """See `Dialect`."""
        calls = message.get("tool_calls", ())
        content: list[Json] = []
        if message["content"]:
            content.append({"type": "text", "text": message["content"], "citations": None})
        for call in calls:
            function = call["function"]
            given = json.loads(function["arguments"])
            block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": given}
            content.append(block)
        prompt, completion = _tokens(turn)
        cut = turn.finish == "length"
        return {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": asked.body.get("model", "policy"),
            "content": content,
            "stop_reason": "tool_use" if calls else "max_tokens" if cut else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": prompt, "output_tokens": completion},
        }

    def events(self, asked: Asked, message: Json, turn: Turn) -> Iterator[Event]:
        """See `Dialect`."""
        whole = self.answer(asked, message, turn)
        begun = {**whole, "content": [], "stop_reason": None}
        begun["usage"] = {**whole["usage"], "output_tokens": 0}
        yield "message_start", {"type": "message_start", "message": begun}
        for k, block in enumerate(whole["content"]):
            if block["type"] == "text":
                start = {**block, "text": ""}
                delta = {"type": "text_delta", "text": block["text"]}
            else:
                start = {**block, "input": {}}
                part = json.dumps(block["input"])
                delta = {"type": "input_json_delta", "partial_json": part}
            name = "content_block_start"
            yield name, {"type": name, "index": k, "content_block": start}
            name = "content_block_delta"
            yield name, {"type": name, "index": k, "delta": delta}
            name = "content_block_stop"
            yield name, {"type": name, "index": k}
        delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
        usage = {"output_tokens": whole["usage"]["output_tokens"]}
        yield "message_delta", {"type": "message_delta", "delta": delta, "usage": usage}
        yield "message_stop", {"type": "message_stop"}

    def error(self, error: ApiError) -> Json:
        """See `Dialect`."""
        kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
        kind = kinds.get(
            error.status, "api_error" if error.status >= 500 else "invalid_request_error"
        )
        return {"type": "error", "error": {"type": kind, "message": error.message}}


DIALECTS: tuple[Dialect, ...] = (ChatCompletions(), Responses(), Messages())
