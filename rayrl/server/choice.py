"""One choice of an answer: ids in, and out what a client is told about them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from rayrl.chat.renderer import Chat
from rayrl.chat.tools import ParsedCall
from rayrl.server.text import CallReader, Detokenizer, StopCutter
from rayrl.types import Alternatives, Delta

__all__ = ["Choice", "News", "Token", "tool_call"]


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled id: its logprob, and those of the most probable ids there."""

    id: int
    logprob: float
    alternatives: Alternatives
    start: int  # where its text begins in the answer's


@dataclass(slots=True)
class News:
    """What is new in a choice; `finish` is None until the last: stop, length, tool_calls, abort."""

    words: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def __iadd__(self, later: News) -> Self:
        self.words += later.words
        self.calls += later.calls
        self.tokens += later.tokens
        self.finish = later.finish or self.finish
        return self

    def __bool__(self) -> bool:
        return bool(self.words or self.calls or self.tokens or self.finish)


class Choice:
    """Reads the parts of one completion.

    Args:
        chat: of the model.
        stops: strings that end the text, and are not part of it.
        calls: whether to look for tool calls.
        begun: how the answer begins already.
        once: whether the first call ends it.
        logprobs: whether tokens are told.

    Attributes:
        ids: how many were sampled, to the end of the text.
        cached: prompt ids that were not computed again.
        finish: None, then why it ended.
    """

    def __init__(
        self,
        chat: Chat,
        stops: tuple[str, ...] = (),
        *,
        calls: bool = False,
        begun: str = "",
        once: bool = False,
        logprobs: bool = False,
    ) -> None:
        self._stop_ids = chat.stop_ids
        self._characters = Detokenizer(chat.decode)
        self._cutter = StopCutter(stops)
        thinking = chat.opens_thought and not begun
        self._reader = CallReader(thinking=thinking) if calls else None
        self._once = once
        self._logprobs = logprobs
        self._tokens: list[Token] = []  # not told yet
        self._read = self._sure = 0  # characters detokenized, and told or given to the reader
        self.ids = self.cached = self._called = 0
        self.finish: str | None = None
        if self._reader is not None and begun:
            self._reader.push(begun)

    def read(self, part: Delta) -> News:
        """What the client is told after another part."""
        news = News()
        self.cached = part.cached
        alternatives = part.alternatives or ((),) * len(part.ids)
        for one, logprob, others in zip(part.ids, part.rollout_logprobs, alternatives, strict=True):
            if self.finish is not None:  # the engine was further than the client wants
                break
            self.ids += 1
            if one in self._stop_ids:
                break
            if self._logprobs:
                self._tokens.append(Token(one, logprob, others, self._read))
            self._take(self._characters.push(one), self._cutter.push, news)
        if part.finish is not None and self.finish is None:
            self._take(self._characters.end(), self._cutter.push, news)
            self._take("", lambda _: self._cutter.end(), news)
            if self.finish is None:
                self._end("stop" if self._cutter.hit else part.finish, news)
        return news

    def _take(self, text: str, cut: Callable[[str], str], news: News) -> None:
        self._read += len(text)
        sure = cut(text)
        self._sure += len(sure)
        while self._tokens and self._tokens[0].start < self._sure:
            news.tokens.append(self._tokens.pop(0))
        if self._reader is None:
            news.words += sure
        elif sure:
            self._tell(self._reader.push(sure), news)
        if self.finish is None and (self._cutter.hit or (self._once and self._called)):
            self._end("stop", news)

    def _tell(self, found: list[str | ParsedCall], news: News) -> None:
        for one in found:
            if self._once and self._called:
                return
            if isinstance(one, str):
                news.words += one
            else:
                news.calls.append(tool_call(one, self._called))
                self._called += 1

    def _end(self, finish: str, news: News) -> None:
        if self._reader is not None:
            self._tell(self._reader.end(), news)
        self.finish = "tool_calls" if self._called and finish == "stop" else finish
        news.finish = self.finish


def tool_call(call: ParsedCall, index: int) -> dict[str, Any]:
    """A call as OpenAI writes it, with its place among the calls of the answer."""
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return {
        "index": index,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
