"""The bodies of requests: which fields there are, what they may be, and what is refused.

A field is honoured, refused, or without any effect on the answer (`_NO_EFFECT`). Nothing that would
change the answer is dropped in silence, and an unknown field is an error, as it is at OpenAI's.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayrl.errors import did_you_mean
from rayrl.server.errors import ApiError
from rayrl.types import replace_surrogates

__all__ = ["Body", "ChatBody", "CompletionBody", "parse", "parse_json", "stop_strings"]

MAX_CHOICES = 128  # of a request, over all its prompts
LARGEST_INT = 2**31 - 1  # that engines count in
MAX_TOP = 20  # alternatives a token, as at OpenAI's
MAX_DEPTH = 100  # of a body's objects and lists: what is nested deeper overflows somebody's stack
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # escaped, or as bytes
MAX_STOPS = 4
MAX_STOP = 4096  # characters of one

_NO_EFFECT = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields about accounts, bills and caches: accepted, and nothing changes by them."""

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
"""Fields of OpenAI's that are not there, with the values that ask for nothing."""

_REPR = reprlib.Repr()  # which looks at no more of a value than it shows
_REPR.maxstring = _REPR.maxother = 80
_INSTEAD = {"function_call": " Use tool_choice.", "functions": " Use tools."}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Fields):
    """What else a stream tells."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; nothing is padded


class Body(_Fields):
    """What both routes take. `top_k` is not OpenAI's: 0 is off."""

    model: str
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=LARGEST_INT)
    max_tokens: int | None = Field(None, ge=1)
    stop: Any = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(Body):
    """Of `/v1/chat/completions`; messages and tools are read by `messages`."""

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class CompletionBody(Body):
    """Of `/v1/completions`."""

    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)


B = TypeVar("B", bound=Body)


def parse_json(text: bytes | str, what: str = "The body", param: str | None = None) -> Any:
    """JSON from a client.

    Args:
        what: it is called in an error. param: the field it comes from.

    Raises:
        ApiError: 400, it is not JSON or nested too deep.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        why = f"{what} is not valid JSON: {why}"
        raise ApiError(400, why, param=param, code="invalid_json") from None
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [x for part in inner for x in part if isinstance(x, dict | list)]
        if not level:
            raw = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
            return replace_surrogates(data) if _SURROGATE.search(raw) else data
    why = f"{what} is nested deeper than {MAX_DEPTH} levels."
    raise ApiError(400, why, param=param, code="invalid_json")


def parse(kind: type[B], data: object) -> B:
    """The body of a request.

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
        raise _complaint(error) from None
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true.", param="stream_options")
    return body


def stop_strings(stop: object) -> tuple[str, ...]:
    """`stop` as strings.

    Raises:
        ApiError: 400.
    """
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP for one in stops)
    ):
        why = (
            f"stop must be a string of 1 to {MAX_STOP} characters, or a list of up to {MAX_STOPS} "
            "of them."
        )
        raise ApiError(400, why, param="stop", code="invalid_value")
    return tuple(stops)


def _complaint(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        return ApiError(
            400, f"Missing required parameter: {param!r}.", param=param, code="missing_parameter"
        )
    value = _short(first["input"])
    why = f"Invalid value for {param!r}: {value}. {first['msg']}."
    return ApiError(400, why, param=param, code="invalid_value")


def _path(place: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).removeprefix(".")


def _short(value: object) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
