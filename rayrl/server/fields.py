"""Request bodies: fields and their validation.

Every field is honoured, rejected, or has no effect on the answer (`_NO_EFFECT`). Nothing that would
change the answer is ignored silently, and an unknown field is an error, as in OpenAI's API.
"""

from __future__ import annotations

import reprlib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayrl.chat.requests import ApiError
from rayrl.errors import did_you_mean

__all__ = ["Body", "ChatBody", "CompletionBody", "parse", "stop_strings"]

MAX_CHOICES = 128  # per request, over all its prompts
MAX_INT = 2**31 - 1  # engines use 32-bit integers
MAX_TOP_LOGPROBS = 20  # as in OpenAI's API
MAX_STOPS = 4
MAX_STOP_LENGTH = 4096  # characters

_NO_EFFECT = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields about accounts, billing and caches: accepted and ignored."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None,),
    "functions": (None,),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Unsupported OpenAI fields, with the values that have no effect."""

_REPR = reprlib.Repr()  # does not traverse more of a value than it prints
_REPR.maxstring = _REPR.maxother = 80
_INSTEAD = {"function_call": " Use tool_choice.", "functions": " Use tools."}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Fields):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted, but nothing is padded


class Body(_Fields):
    """Fields of both routes. `top_k` is not in OpenAI's API; 0 is off."""

    model: str
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_INT)
    max_tokens: int | None = Field(None, ge=1)
    stop: Any = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(Body):
    """Body of `/v1/chat/completions`; `server.messages` validates messages and tools."""

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class CompletionBody(Body):
    """Body of `/v1/completions`."""

    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


B = TypeVar("B", bound=Body)


def parse(kind: type[B], data: object) -> B:
    """Validate the body of a request.

    Raises:
        ApiError: 400, naming the field.
    """
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.")
    known: dict[str, Any] = {}
    for key, value in data.items():
        if key in kind.model_fields:
            known[key] = value
        elif key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                why = f"{key}={_short(value)} is not supported.{_INSTEAD.get(key, '')}"
                raise ApiError(400, why, param=key, code="unsupported_parameter")
        elif key not in _NO_EFFECT:
            near = did_you_mean(key, kind.model_fields)
            why = f"Unrecognized request argument supplied: {key}.{near}"
            raise ApiError(400, why, param=key, code="unknown_parameter")
    try:
        body = kind.model_validate(known)
    except ValidationError as error:
        raise _validation_error(error) from None
    if body.stream_options is not None and not body.stream:
        what = "stream_options needs stream=true."
        raise ApiError(400, what, param="stream_options", code="invalid_value")
    return body


def stop_strings(stop: object) -> tuple[str, ...]:
    """Validate `stop` and return its strings.

    Raises:
        ApiError: 400.
    """
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(item, str) and 0 < len(item) <= MAX_STOP_LENGTH for item in stops)
    ):
        why = (
            f"stop must be a string of 1 to {MAX_STOP_LENGTH} characters, or a list of up to "
            f"{MAX_STOPS} of them."
        )
        raise ApiError(400, why, param="stop", code="invalid_value")
    return tuple(stops)


def _validation_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
    param = "".join(parts).removeprefix(".")
    if first["type"] == "missing":
        return ApiError(
            400, f"Missing required parameter: {param!r}.", param=param, code="missing_parameter"
        )
    value = _short(first["input"])
    why = f"Invalid value for {param!r}: {value}. {first['msg']}."
    return ApiError(400, why, param=param, code="invalid_value")


def _short(value: object) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
