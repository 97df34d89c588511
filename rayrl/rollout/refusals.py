"""Classify a server's errors: does it refuse one conversation, or every request of this setup?

Servers agree on HTTP statuses and on little else. Errors are classified by the structured fields
first (`code`, `type`, `param` of the error object, wherever it is nested). The message text is
used only to detect a context that is too short, which vLLM and others report in no other way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayrl.errors import clip

__all__ = ["Cause", "Refusal", "conversation_refused", "read_refusal", "setup_refused"]

Cause = Literal["length", "content", "setup", "unknown"]

_QUOTA = {
    "insufficient_quota",
    "insufficient_balance",
    "billing_error",
    "billing_hard_limit_reached",
    "billing_not_active",
    "exceeded_current_quota_error",
    "arrearage",
}
_LENGTH = {
    "context_length_exceeded",
    "context_window_exceeded",
    "exceed_context_size_error",
    "max_prompt_tokens_exceeded",
    "tokens_limit_reached",
    "model_context_window_exceeded",
}
_CONTENT = {
    "content_filter",
    "content_filtered",
    "content_policy_violation",
    "content_policy",
    "data_inspection_failed",
    "datainspectionfailed",
    "invalid_prompt",
    "json_validate_failed",
    "moderation_blocked",
    "request_too_large",
    "responsibleaipolicyviolation",
    "tool_use_failed",
}
_SETUP = {
    "authentication_error",
    "deploymentnotfound",
    "invalid_api_key",
    "invalid_model",
    "missing_required_parameter",
    "model_not_found",
    "model_not_supported",
    "not_found_error",
    "permission_error",
    "unknown_parameter",
    "unknown_url",
    "unsupported_parameter",
    "unsupported_value",
}
_SETTINGS = {
    "temperature": "eval.temperature or sampling.temperature",
    "top_p": "sampling.top_p",
    "stop": "sampling.stop",
    "max_tokens": "sampling.max_tokens",
    "max_completion_tokens": "sampling.max_tokens",
}  # rayrl's settings by the server's parameters
_CONVERSATION_PARAMS = ("messages", "prompt", "input", "input_tokens", "contents")
_SHORT_CONTEXT = re.compile(
    r"context (?:length|size|window|limit)|maximum (?:model|sequence|input|prompt) length|"
    r"maximum number of (?:input )?tokens|too many (?:input |prompt )?tokens|"
    r"(?:prompt|input) is too long|`inputs` tokens \+ `max_new_tokens`",
    re.IGNORECASE,
)


def _patterns(*patterns: str) -> list[re.Pattern[str]]:
    """Compile patterns in which `#` stands for a number; the last number is the value."""
    return [re.compile(p.replace("#", r"(\d[\d,_]*)"), re.IGNORECASE) for p in patterns]


_CONTEXT = _patterns(
    r"context limit: # \+ # > #",
    r"(?:context|maximum \w+) (?:length|size|window|limit)(?: is| of|:)?(?: only)? \(?#",
    r"# maximum context (?:length|size|window)",
    r"tokens > # maximum",
    r"must be <= #",
    r"tokens allowed \(#\)",
    r"limit of # tokens",
)
_PROMPT = _patterns(
    r"context limit: # \+",
    r"# (?:tokens )?(?:in|from) the (?:input |prompt )?(?:messages|prompt|input)",
    r"# (?:input|prompt|`inputs`) tokens",
    r"(?:prompt|request) contains (?:at least )?# ",
    r"(?:prompt is too long:|input \(|token count \(|prompt \(length) ?#",
    r"resulted in # tokens",
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error response to a request.

    Attributes:
        status: HTTP status.
        cause: "length" (the context is too short for this conversation and its reply), "content"
            (something else in this conversation), "setup" (every request would be refused) or
            "unknown".
        param: the parameter that the server names.
        code: the most specific error code the server sent.
        message: the server's error message, or else the whole body.
        reply_tokens: tokens left for a reply, if the server says so; may be 0 or negative.
    """

    status: int
    cause: Cause
    param: str = ""
    code: str = ""
    message: str = ""
    reply_tokens: int | None = None

    @property
    def no_quota(self) -> bool:
        """Whether the account's quota is used up."""
        return self.code in _QUOTA or self.status == 402


def read_refusal(status: int, text: str) -> Refusal:
    """Classify an error response.

    Args:
        status: HTTP status. Gateways may send a provider's error with a 200 and its status as the
            code.
        text: the body.
    """
    try:
        objects = list(_error_objects(json.loads(text)))
    except (ValueError, RecursionError):
        objects = []
    if status < 300:
        numbers = [item.get("code") for item in objects]
        status = next((n for n in numbers if isinstance(n, int) and 400 <= n < 600), 500)
    keys = ("code", "type", "error_type", "status")
    values = [item.get(key) for item in objects for key in keys]
    codes = [value.lower() for value in values if isinstance(value, str) and value]
    messages = [item.get("message") or item.get("msg") for item in objects]
    message = next((m for m in messages if m and isinstance(m, str)), text)
    param = next((p for item in objects if (p := _param(item))), "")
    cause, code = _classify(status, objects, codes, param, message)
    reply_tokens = _reply_tokens(objects, message) if cause == "length" else None
    return Refusal(status, cause, param, code, message, reply_tokens)


def setup_refused(url: str, model: str, refusal: Refusal) -> str:
    """Error message for a refusal of every request: says what to change."""
    key = refusal.param.partition(".")[0].partition("[")[0]
    if refusal.no_quota:
        remedy = "the account has no quota left"
    elif refusal.status == 401 or refusal.code in ("invalid_api_key", "authentication_error"):
        remedy = "check the key in the variable that endpoint.api_key_env names"
    elif refusal.status == 403:
        remedy = f"the key may not use endpoint.model={model!r}"
    elif 300 <= refusal.status < 400:
        remedy = "it redirects to another address: set endpoint.url to that one"
    elif key == "model" or refusal.code in ("model_not_found", "invalid_model"):
        remedy = f"it has no endpoint.model={model!r}"
    elif key == "tools":
        remedy = "it does not accept the environment's tools: use a server or model that does"
    elif key:
        own = f"change {_SETTINGS[key]}, or " if key in _SETTINGS else ""
        remedy = f"it does not accept this {refusal.param!r}: {own}omit it with "
        remedy += f"endpoint.extra.{key}=null"
    elif refusal.status in (404, 405):
        remedy = f"check endpoint.url (does it end in /v1?) and endpoint.model={model!r}"
    else:
        remedy = (
            f"it refuses every request with these settings: check endpoint.model={model!r}, the "
            "sampling settings and endpoint.extra (omit a key it does not accept with "
            "endpoint.extra.KEY=null)"
        )
    reply = f" Server message: {clip(refusal.message, 400)}" if refusal.message else ""
    return f"{url} refused the request (HTTP {refusal.status}): {remedy}.{reply}"


def conversation_refused(url: str, refusal: Refusal, why: str) -> str:
    """Error message for the refusal of one conversation; `why` rules out the setup as the cause."""
    code = f", {refusal.code}" if refusal.code else ""
    return (
        f"{url} refused this conversation (HTTP {refusal.status}{code}); {why}. "
        f"Server message: {clip(refusal.message, 400)}"
    )


def _classify(
    status: int,
    objects: Sequence[Mapping[str, Any]],
    codes: Sequence[str],
    param: str,
    message: str,
) -> tuple[Cause, str]:
    """Return the cause and the code that tells it."""
    kinds: tuple[tuple[set[str], Cause], ...] = (
        (_QUOTA, "setup"),
        (_LENGTH, "length"),
        (_CONTENT, "content"),
        (_SETUP, "setup"),
    )
    for known, cause in kinds:
        for code in codes:
            if code in known:
                return cause, code
    code = codes[0] if codes else ""
    if status == 413 or any("flagged_input" in item for item in objects):  # OpenRouter's 403
        return "content", code
    if status not in (400, 422):
        return "setup", code
    if _SHORT_CONTEXT.search(message):
        return "length", code
    if param:
        in_conversation = re.split(r"[.\[]", param)[0] in _CONVERSATION_PARAMS
        return ("content" if in_conversation else "setup"), code
    return "unknown", code


def _error_objects(data: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield the objects that may describe the error, innermost (most specific) first."""
    if depth > 4:
        return
    if isinstance(data, list):  # FastAPI's `detail`, Google's list of one
        for item in data[:8]:
            yield from _error_objects(item, depth + 1)
    elif isinstance(data, Mapping):
        for key in ("error", "detail", "innererror", "inner_error", "metadata"):
            yield from _error_objects(data.get(key), depth + 1)
        yield data
    elif isinstance(data, str):
        yield {"message": data}


def _param(item: Mapping[str, Any]) -> str:
    param, path = item.get("param"), item.get("loc")
    if isinstance(param, str) and param:
        return param
    if isinstance(path, list):
        return ".".join(str(part) for part in path if part != "body")
    return ""


def _reply_tokens(objects: Sequence[Mapping[str, Any]], message: str) -> int | None:
    limit = _number(objects, "n_ctx", message, _CONTEXT)
    prompt = _number(objects, "n_prompt_tokens", message, _PROMPT)
    return None if limit is None or prompt is None else limit - prompt


def _number(
    objects: Sequence[Mapping[str, Any]],
    key: str,
    message: str,
    patterns: Sequence[re.Pattern[str]],
) -> int | None:
    """Return a number from a field, or else from the first pattern the message matches."""
    values = [item.get(key) for item in objects]
    if value := next((value for value in values if type(value) is int), None):
        return value
    for pattern in patterns:
        if match := pattern.search(message):
            return int(re.sub(r"[,_]", "", match.groups()[-1]))
    return None
