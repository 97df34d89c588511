"""What a server's refusal is about: one conversation, or the way everything is set up.

Servers agree on HTTP statuses and on little else. What they say is read from the structured fields
first (`code`, `type`, `param` of the error object, wherever it stands) and from the words only for
a context that is too short, which vLLM and others tell in no other way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayrl.errors import clip

__all__ = ["About", "Refusal", "advice", "read_refusal", "words"]

About = Literal["length", "content", "setup", "unknown"]

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
}  # ours, by theirs
_OF_A_CONVERSATION = ("messages", "prompt", "input", "input_tokens", "contents")  # parameters
_SHORT_CONTEXT = re.compile(
    r"context (?:length|size|window|limit)|maximum (?:model|sequence|input|prompt) length|"
    r"maximum number of (?:input )?tokens|too many (?:input |prompt )?tokens|"
    r"(?:prompt|input) is too long|`inputs` tokens \+ `max_new_tokens`",
    re.IGNORECASE,
)


def _patterns(*patterns: str) -> list[re.Pattern[str]]:
    """`#` is a number; the last one of a pattern is meant."""
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
    """A request that was answered with an error.

    Attributes:
        status: of HTTP.
        about: "length": the context is too short for this conversation and its reply; "content":
            something else of this conversation; "setup": every request would be refused; or
            "unknown".
        param: the parameter that the server names.
        code: the most telling of its words for programs.
        message: its words for people, or all it sent.
        room: tokens that a reply can have, where it says so; it may be below one.
    """

    status: int
    about: About
    param: str = ""
    code: str = ""
    message: str = ""
    room: int | None = None

    @property
    def no_quota(self) -> bool:
        """Whether the account has nothing left to spend."""
        return self.code in _QUOTA or self.status == 402


def read_refusal(status: int, text: str) -> Refusal:
    """What a response with an error status says.

    Args:
        status: of HTTP. Gateways put a provider's error into a 200, with its status as the code.
        text: the body.
    """
    objects = list(_objects(_parsed(text)))
    if status < 300:
        codes = [told.get("code") for told in objects]
        status = next((c for c in codes if isinstance(c, int) and 400 <= c < 600), 500)
    keys = ("code", "type", "error_type", "status")
    named = [word for o in objects for key in keys if (word := _word(o.get(key)))]
    said = [o.get("message") or o.get("msg") for o in objects]
    message = next((one for one in said if one and isinstance(one, str)), text)
    param = next((p for o in objects if (p := _param(o))), "")
    about, code = _about(status, objects, named, param, message)
    room = _room(objects, message) if about == "length" else None
    return Refusal(status, about, param, code, message, room)


def advice(url: str, model: str, refusal: Refusal) -> str:
    """What to do about a refusal that every request would meet."""
    key = refusal.param.partition(".")[0].partition("[")[0]
    if refusal.no_quota:
        remedy = "the account has nothing left to spend"
    elif refusal.status == 401 or refusal.code in ("invalid_api_key", "authentication_error"):
        remedy = "check the key in the variable that endpoint.api_key_env names"
    elif refusal.status == 403:
        remedy = f"the key may not use endpoint.model={model!r}"
    elif 300 <= refusal.status < 400:
        remedy = "it redirects to another address: give that one as endpoint.url"
    elif key == "model" or refusal.code in ("model_not_found", "invalid_model"):
        remedy = f"it has no endpoint.model={model!r}"
    elif key == "tools":
        remedy = "it does not take the environment's tools: use a server or a model that does"
    elif key:
        own = f"change {_SETTINGS[key]}, or " if key in _SETTINGS else ""
        remedy = f"it does not take {refusal.param!r} so: {own}leave it out by "
        remedy += f"endpoint.extra.{key}=null"
    elif refusal.status in (404, 405):
        remedy = f"check endpoint.url (does it end in /v1?) and endpoint.model={model!r}"
    else:
        remedy = (
            f"it answers nothing with these settings: check endpoint.model={model!r}, the sampling "
            "settings and endpoint.extra (a key it does not take is left out by "
            "endpoint.extra.KEY=null)"
        )
    said = f" It said: {clip(refusal.message, 400)}" if refusal.message else ""
    return f"{url} refused the request (HTTP {refusal.status}): {remedy}.{said}"


def words(url: str, refusal: Refusal, why: str) -> str:
    """What is recorded of a conversation that a server refuses, and `why` it is not the set-up."""
    code = f", {refusal.code}" if refusal.code else ""
    said = clip(refusal.message, 400)
    return f"{url} refused this conversation (HTTP {refusal.status}{code}); {why}. It said: {said}"


def _about(
    status: int,
    objects: Sequence[Mapping[str, Any]],
    named: Sequence[str],
    param: str,
    message: str,
) -> tuple[About, str]:
    kinds: tuple[tuple[set[str], About], ...] = (
        (_QUOTA, "setup"),
        (_LENGTH, "length"),
        (_CONTENT, "content"),
        (_SETUP, "setup"),
    )
    for known, about in kinds:
        for word in named:
            if word in known:
                return about, word
    code = named[0] if named else ""
    if status == 413 or any("flagged_input" in told for told in objects):  # OpenRouter's: a 403
        return "content", code
    if status not in (400, 422):
        return "setup", code
    if _SHORT_CONTEXT.search(message):
        return "length", code
    if param:
        return ("content" if re.split(r"[.\[]", param)[0] in _OF_A_CONVERSATION else "setup"), code
    return "unknown", code


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _objects(data: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The objects that may say what is wrong, the innermost first: it is the most exact."""
    if depth > 4:
        return
    if isinstance(data, list):  # FastAPI's `detail`, Google's list of one
        for item in data[:8]:
            yield from _objects(item, depth + 1)
    elif isinstance(data, Mapping):
        for key in ("error", "detail", "innererror", "inner_error", "metadata"):
            yield from _objects(data.get(key), depth + 1)
        yield data
    elif isinstance(data, str):
        yield {"message": data}


def _word(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""


def _param(told: Mapping[str, Any]) -> str:
    param, place = told.get("param"), told.get("loc")
    if isinstance(param, str) and param:
        return param
    if isinstance(place, list):
        parts = [str(part) for part in place if part != "body"]
        return ".".join(parts)
    return ""


def _room(objects: Sequence[Mapping[str, Any]], message: str) -> int | None:
    limit = _first(objects, "n_ctx") or _found(_CONTEXT, message)
    prompt = _first(objects, "n_prompt_tokens") or _found(_PROMPT, message)
    return None if limit is None or prompt is None else limit - prompt


def _first(objects: Sequence[Mapping[str, Any]], key: str) -> int | None:
    values = [told.get(key) for told in objects]
    return next((value for value in values if type(value) is int), None)


def _found(patterns: Sequence[re.Pattern[str]], text: str) -> int | None:
    for pattern in patterns:
        if match := pattern.search(text):
            return int(re.sub(r"[,_]", "", match.groups()[-1]))
    return None
