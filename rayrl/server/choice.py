"""Convert the ids of one choice to the text, tool calls and logprobs sent to the client."""

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

__all__ = ["Choice", "ChoiceDelta", "Token", "tool_call"]


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled id, its logprob, and the most probable ids at its position with theirs."""

    id: int
    logprob: float
    alternatives: Alternatives
    start: int  # offset of its text in the answer


@dataclass(slots=True)
class ChoiceDelta:
    """New content of a choice. `finish` is None until the last: stop, length, tool_calls, abort."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def __iadd__(self, later: ChoiceDelta) -> Self:
        self.text += later.text
        self.calls += later.calls
        self.tokens += later.tokens
        self.finish = later.finish or self.finish
        return self

    def __bool__(self) -> bool:
        return bool(self.text or self.calls or self.tokens or self.finish)


class Choice:
    """Processes the pieces of one completion.

    Args:
        chat: chat renderer of the model.
        stops: strings that end the text and are not part of it.
        calls: whether to parse tool calls.
        prefix: beginning of the answer that is already in the prompt.
        single_call: whether the first call ends the answer.
        logprobs: whether to return tokens with logprobs.

    Attributes:
        ids: number of ids sampled up to the end of the text.
        cached: number of prompt ids that were not recomputed.
        finish: None, then the finish reason.
    """

    def __init__(
        self,
        chat: Chat,
        stops: tuple[str, ...] = (),
        *,
        calls: bool = False,
        prefix: str = "",
        single_call: bool = False,
        logprobs: bool = False,
    ) -> None:
        self._stop_ids = chat.stop_ids
        self._detokenizer = Detokenizer(chat.decode)
        self._cutter = StopCutter(stops)
        thinking = chat.opens_thought and not prefix
        self._reader = CallReader(thinking=thinking) if calls else None
        self._single_call = single_call
        self._logprobs = logprobs
        self._tokens: list[Token] = []  # not sent yet
        self._decoded = self._certain = 0  # characters detokenized, and those past the stop cutter
        self.ids = self.cached = self._calls = 0
        self.finish: str | None = None
        if self._reader is not None and prefix:
            self._reader.push(prefix)

    def read(self, part: Delta) -> ChoiceDelta:
        """Process a piece; return the new content."""
        delta = ChoiceDelta()
        self.cached = part.cached
        alternatives = part.alternatives or ((),) * len(part.ids)
        sampled = zip(part.ids, part.rollout_logprobs, alternatives, strict=True)
        for token, logprob, others in sampled:
            if self.finish is not None:  # the engine generated more than the client wants
                break
            self.ids += 1
            if token in self._stop_ids:
                break
            if self._logprobs:
                self._tokens.append(Token(token, logprob, others, self._decoded))
            self._add(self._detokenizer.push(token), self._cutter.push, delta)
        if part.finish is not None and self.finish is None:
            self._add(self._detokenizer.end(), self._cutter.push, delta)
            self._add("", lambda _: self._cutter.end(), delta)
            if self.finish is None:
                self._end("stop" if self._cutter.hit else part.finish, delta)
        return delta

    def _add(self, text: str, cut: Callable[[str], str], delta: ChoiceDelta) -> None:
        self._decoded += len(text)
        certain = cut(text)
        self._certain += len(certain)
        while self._tokens and self._tokens[0].start < self._certain:
            delta.tokens.append(self._tokens.pop(0))
        if self._reader is None:
            delta.text += certain
        elif certain:
            self._add_parts(self._reader.push(certain), delta)
        if self.finish is None and (self._cutter.hit or (self._single_call and self._calls)):
            self._end("stop", delta)

    def _add_parts(self, parts: list[str | ParsedCall], delta: ChoiceDelta) -> None:
        for part in parts:
            if self._single_call and self._calls:
                return
            if isinstance(part, str):
                delta.text += part
            else:
                delta.calls.append(tool_call(part, self._calls))
                self._calls += 1

    def _end(self, finish: str, delta: ChoiceDelta) -> None:
        if self._reader is not None:
            self._add_parts(self._reader.end(), delta)
        self.finish = "tool_calls" if self._calls and finish == "stop" else finish
        delta.finish = self.finish


def tool_call(call: ParsedCall, index: int) -> dict[str, Any]:
    """Convert a call to OpenAI's format; `index` is its position in the answer."""
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return {
        "index": index,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
