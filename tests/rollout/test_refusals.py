"""Errors as servers write them, and how each is classified."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.rollout.refusals import read_refusal, setup_refused


def openai(message: str = "no", **fields: Any) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return {"error": error | fields}


def vllm(message: str, kind: str = "BadRequestError", code: int = 400) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def anthropic(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}}


LONG = (
    "This model's maximum context length is 4,097 tokens. However, you requested 4500 tokens "
    "(4000 in the messages, 500 in the completion). Please reduce the length."
)
VLLM_LONG = (
    "'max_tokens' or 'max_completion_tokens' is too large: 500. This model's maximum context "
    "length is 4096 tokens and your request has 4000 input tokens (500 > 4096 - 4000)."
)
AZURE_FILTER = {
    "message": "The response was filtered due to the prompt.",
    "type": None,
    "param": "prompt",
    "code": "content_filter",
    "status": 400,
    "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}},
}
LLAMA = {
    "code": 400,
    "message": "the request exceeds the available context size, try increasing it",
    "type": "exceed_context_size_error",
    "n_prompt_tokens": 4196,
    "n_ctx": 4096,
}
OPENROUTER = {"code": 403, "message": "flagged", "metadata": {"flagged_input": "…"}}


# status, body, cause, tokens left for the reply
ERRORS: list[tuple[int, Any, str, int | None]] = [
    # OpenAI
    (400, openai(LONG, code="context_length_exceeded", param="messages"), "length", 97),
    (400, openai("no", code="context_length_exceeded"), "length", None),
    (400, openai("flagged", code="invalid_prompt"), "content", None),
    (400, openai("bad image", code="invalid_value", param="messages[0].content"), "content", None),
    (400, openai(code="unsupported_parameter", param="temperature"), "setup", None),
    (400, openai(code="unsupported_value", param="messages[0].role"), "setup", None),
    (400, openai("too large", code="invalid_value", param="max_tokens"), "setup", None),
    (401, openai(code="invalid_api_key"), "setup", None),
    (403, openai(code="unsupported_country_region_territory"), "setup", None),
    (404, openai(code="model_not_found"), "setup", None),
    (429, openai(type="insufficient_quota", code="insufficient_quota"), "setup", None),
    (400, openai("We could not parse it."), "unknown", None),
    # Azure
    (400, {"error": AZURE_FILTER}, "content", None),
    (404, {"error": {"code": "DeploymentNotFound", "message": "no such"}}, "setup", None),
    (400, {"error": {"code": "context_length_exceeded", "message": LONG}}, "length", 97),
    # vLLM, SGLang, TGI
    (400, vllm(VLLM_LONG), "length", 96),
    (400, {"error": vllm(VLLM_LONG) | {"param": "max_tokens"}}, "length", 96),
    (400, vllm("The decoder prompt (length 5000) is longer than the maximum model length of 4096."),
     "length", -904),
    (400, vllm("You passed 4090 input tokens and requested 16 output tokens. However, the model's "
               "context length is only 4096 tokens"), "length", 6),
    (400, vllm("The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
     "length", -904),
    (400, vllm("Requested token count exceeds the model's maximum context length of 4096 tokens. "
               "You requested a total of 5000 tokens: 4000 tokens from the input messages and 1000 "
               "tokens for the completion."), "length", 96),
    (404, vllm("The model `x` does not exist.", "NotFoundError", 404), "setup", None),
    (400, vllm("can only concatenate str"), "unknown", None),
    (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. "
                    "Given: 4000 `inputs` tokens and 500 `max_new_tokens`",
           "error_type": "validation"}, "length", 96),
    # FastAPI's validation
    (422, {"detail": [{"loc": ["body", "messages", 3, "content"], "msg": "no"}]}, "content", None),
    (422, {"detail": [{"loc": ["body", "top_p"], "msg": "less than 1"}]}, "setup", None),
    # llama.cpp
    (400, {"error": LLAMA}, "length", -100),
    (400, {"error": {"code": 400, "message": "odd", "type": "server"}}, "unknown", None),
    # Anthropic and what speaks its errors
    (400, anthropic("invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"),
     "length", -10000),
    (400, anthropic("invalid_request_error", "input length and `max_tokens` exceed context limit: "
                    "190000 + 20000 > 200000, decrease input length"), "length", 10000),
    (400, anthropic("invalid_request_error", "messages.0: must have non-empty content"), "unknown",
     None),
    (401, anthropic("authentication_error", "invalid x-api-key"), "setup", None),
    (404, anthropic("not_found_error", "model: x"), "setup", None),
    (413, anthropic("request_too_large", "too large"), "content", None),
    # gateways and others
    (403, {"error": OPENROUTER}, "content", None),
    (402, {"error": {"message": "Insufficient Balance", "code": "invalid_request_error"}}, "setup",
     None),
    (400, {"object": "error", "message": "Prompt contains 40000 tokens and 0 draft tokens, too "
           "large for model with 32768 maximum context length", "code": 3051}, "length", -7232),
    (400, [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "The input token "
            "count (1100000) exceeds the maximum number of tokens allowed (1048576)."}}],
     "length", -51424),
    (400, {"error": {"code": "data_inspection_failed", "message": "bad"}}, "content", None),
    (400, {"error": {"code": "Arrearage", "message": "overdue"}}, "setup", None),
    (400, openai("failed", code="tool_use_failed"), "content", None),
    (301, "moved", "setup", None),
    (413, "<html>too large</html>", "content", None),
    (400, "no way", "unknown", None),
    (400, "", "unknown", None),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "cause", "reply_tokens"), ERRORS)
def test_a_refusal_is_classified(
    status: int, body: Any, cause: str, reply_tokens: int | None
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    refusal = read_refusal(status, text)
    assert (refusal.cause, refusal.reply_tokens) == (cause, reply_tokens)


@pytest.mark.parametrize(
    ("status", "body", "remedy"),
    [
        (401, "", "endpoint.api_key_env"),
        (400, openai(code="invalid_api_key"), "endpoint.api_key_env"),
        (403, "", "the key may not use endpoint.model='m'"),
        (404, "", "check endpoint.url"),
        (404, openai(code="model_not_found"), "it has no endpoint.model='m'"),
        (400, openai(param="model"), "it has no endpoint.model='m'"),
        (
            400,
            openai(param="top_p"),
            "sampling.top_p, or omit it with endpoint.extra.top_p=null",
        ),
        (400, openai(param="tools[0].function"), "does not accept the environment's tools"),
        (400, openai(param="logit_bias"), "endpoint.extra.logit_bias=null"),
        (402, "", "no quota left"),
        (307, "", "redirects to another address"),
        (400, "odd", "it refuses every request with these settings"),
    ],
)
def test_the_message_says_what_to_change(status: int, body: Any, remedy: str) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    said = setup_refused("http://x/v1", "m", read_refusal(status, text))
    assert remedy in said
    assert remedy.startswith("it has no") or "it has no" not in said


def test_an_error_in_a_200_has_its_own_status() -> None:
    assert read_refusal(200, '{"error": {"code": 429, "message": "slow"}}').status == 429
    assert read_refusal(200, '{"error": {"code": "x"}}').status == 500
    assert read_refusal(200, '{"error": "broken"}').message == "broken"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "code", "type", "param", "message", "detail", "loc", "n_ctx"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100)
@given(JSON, st.sampled_from([200, 301, 400, 401, 403, 413, 422, 429, 500]))
def test_any_body_can_be_read(body: Any, status: int) -> None:
    refusal = read_refusal(status, json.dumps(body))
    assert isinstance(refusal.message, str)
    assert "HTTP" in setup_refused("http://x/v1", "m", refusal)


def test_a_body_that_is_nested_too_deeply_is_text() -> None:
    text = '{"error": ' * 900 + "1" + "}" * 900
    assert read_refusal(400, text).cause == "unknown"
    assert read_refusal(400, "[" * 100_000).cause == "unknown"
