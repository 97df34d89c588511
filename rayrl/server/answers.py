"""OpenAI's response formats: whole answers and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from rayrl.chat.renderer import Chat
from rayrl.server.choice import ChoiceDelta, Token
from rayrl.server.generation import Usage

__all__ = ["AnswerFormat", "ChatFormat", "CompletionFormat", "usage_object"]


def usage_object(usage: Usage) -> dict[str, Any]:
    """Create the `usage` object of an answer."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class AnswerFormat:
    """Base of the formats of both routes.

    Args:
        chat: chat renderer of the model, to decode tokens.
        model: name of the model.
        logprobs: whether the request asks for logprobs.
    """

    prefix = object_name = chunk_name = ""

    def __init__(self, chat: Chat, model: str, *, logprobs: bool) -> None:
        self._chat = chat
        self._logprobs = logprobs
        self._common = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def answer(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        """Create a whole answer."""
        return {
            **self._common,
            "object": self.object_name,
            "choices": [self._choice(index, content) for index, content in enumerate(choices)],
            "usage": usage_object(usage),
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Create a chunk of a stream."""
        return {**self._common, "object": self.chunk_name, "choices": choices}

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        """Create the chunks before the content of a choice."""
        raise NotImplementedError

    def chunks(self, index: int, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Create the chunks for new content of a choice."""
        raise NotImplementedError

    def _choice(self, index: int, content: ChoiceDelta) -> dict[str, Any]:
        raise NotImplementedError

    def _token_text(self, token: int) -> str:
        return self._chat.decode((token,))


class ChatFormat(AnswerFormat):
    """Answers of `/v1/chat/completions`."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        """Create the chunk with the role."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, [])]

    def chunks(self, index: int, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Create chunks with text, calls and finish reason; logprobs are in the first of them."""
        parts: list[dict[str, Any]] = []
        if delta.text:
            parts.append({"content": delta.text})
        if delta.calls:
            parts.append({"tool_calls": delta.calls})
        if delta.finish is not None or (delta.tokens and not parts):
            parts.append({})
        chunks = [
            self._chunk(index, part, delta.tokens if not k else []) for k, part in enumerate(parts)
        ]
        if delta.finish is not None:
            chunks[-1]["choices"][0]["finish_reason"] = delta.finish
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], tokens: list[Token]) -> dict[str, Any]:
        logprobs = self._logprobs_object(tokens) if tokens else None
        return self.chunk(
            [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}]
        )

    def _choice(self, index: int, content: ChoiceDelta) -> dict[str, Any]:
        only_calls = bool(content.calls) and not content.text
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if only_calls else content.text,
            "refusal": None,
        }
        if content.calls:
            calls = [{k: v for k, v in call.items() if k != "index"} for call in content.calls]
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs_object(content.tokens) if self._logprobs else None,
            "finish_reason": content.finish,
        }

    def _logprobs_object(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            top = [self._entry(other, logprob) for other, logprob in token.alternatives]
            content.append(self._entry(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = list(self._chat.id_bytes(token))
        return {"token": self._token_text(token), "logprob": logprob, "bytes": raw}


class CompletionFormat(AnswerFormat):
    """Answers of `/v1/completions`."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        """Return no chunks."""
        return []

    def chunks(self, index: int, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Create a chunk with text and finish reason."""
        return [self.chunk([self._choice(index, delta)])] if delta else []

    def _choice(self, index: int, content: ChoiceDelta) -> dict[str, Any]:
        return {
            "index": index,
            "text": content.text,
            "logprobs": self._logprobs_object(content.tokens) if self._logprobs else None,
            "finish_reason": content.finish,
        }

    def _logprobs_object(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._token_text(other): p for other, p in reversed(token.alternatives)}
                for token in tokens
            ],
            "text_offset": [token.start for token in tokens],
        }
