"""Answers as OpenAI writes them: objects, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from rayrl.chat.renderer import Chat
from rayrl.server.choice import News, Token
from rayrl.server.generation import Usage

__all__ = ["ChatAnswer", "CompletionAnswer", "Shape", "usage_object"]


def usage_object(usage: Usage) -> dict[str, Any]:
    """`usage` of an answer."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class Shape:
    """What the two routes' answers have in common.

    Args:
        chat: of the model, to write tokens.
        model: its name.
        logprobs: whether they were asked for.
    """

    prefix = object_name = chunk_name = ""

    def __init__(self, chat: Chat, model: str, *, logprobs: bool) -> None:
        self._chat = chat
        self._logprobs = logprobs
        self._frame = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def whole(self, choices: Sequence[News], usage: Usage) -> dict[str, Any]:
        """An answer in one piece."""
        told = [self._whole(index, news) for index, news in enumerate(choices)]
        return {
            **self._frame,
            "object": self.object_name,
            "choices": told,
            "usage": usage_object(usage),
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One chunk of a stream."""
        return {**self._frame, "object": self.chunk_name, "choices": choices}

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Chunks before anything of a choice is told."""
        raise NotImplementedError

    def part(self, index: int, news: News) -> list[dict[str, Any]]:
        """Chunks that tell the news."""
        raise NotImplementedError

    def _whole(self, index: int, news: News) -> dict[str, Any]:
        raise NotImplementedError

    def _text(self, one: int) -> str:
        return self._chat.decode((one,))


class ChatAnswer(Shape):
    """Of `/v1/chat/completions`."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Who speaks."""
        return [self._delta(index, {"role": "assistant", "content": ""}, [])]

    def part(self, index: int, news: News) -> list[dict[str, Any]]:
        """Words, then calls, then the reason for the end; logprobs with the first of these."""
        deltas: list[dict[str, Any]] = []
        if news.words:
            deltas.append({"content": news.words})
        if news.calls:
            deltas.append({"tool_calls": news.calls})
        if news.finish is not None or (news.tokens and not deltas):
            deltas.append({})
        chunks = [
            self._delta(index, delta, news.tokens if not at else [])
            for at, delta in enumerate(deltas)
        ]
        if news.finish is not None:
            chunks[-1]["choices"][0]["finish_reason"] = news.finish
        return chunks

    def _delta(self, index: int, delta: dict[str, Any], tokens: list[Token]) -> dict[str, Any]:
        logprobs = self._of(tokens) if tokens else None
        return self.chunk(
            [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}]
        )

    def _whole(self, index: int, news: News) -> dict[str, Any]:
        silent = bool(news.calls) and not news.words
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if silent else news.words,
            "refusal": None,
        }
        if news.calls:
            calls = [{k: v for k, v in call.items() if k != "index"} for call in news.calls]
            message["tool_calls"] = calls
        logprobs = self._of(news.tokens) if self._logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": news.finish,
        }

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            others = [self._entry(one, logprob) for one, logprob in token.alternatives]
            content.append(self._entry(token.id, token.logprob) | {"top_logprobs": others})
        return {"content": content, "refusal": None}

    def _entry(self, one: int, logprob: float) -> dict[str, Any]:
        written = list(self._chat.id_bytes(one))
        return {"token": self._text(one), "logprob": logprob, "bytes": written}


class CompletionAnswer(Shape):
    """Of `/v1/completions`."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def part(self, index: int, news: News) -> list[dict[str, Any]]:
        """Words and the reason for the end in one chunk."""
        if not news:
            return []
        return [self.chunk([self._whole(index, news)])]

    def _whole(self, index: int, news: News) -> dict[str, Any]:
        return {
            "index": index,
            "text": news.words,
            "logprobs": self._of(news.tokens) if self._logprobs else None,
            "finish_reason": news.finish,
        }

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._text(one): logprob for one, logprob in reversed(token.alternatives)}
                for token in tokens
            ],
            "text_offset": [token.start for token in tokens],
        }
