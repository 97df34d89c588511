"""Convert the ids of one choice to the text, tool calls and logprobs sent to the client.

Ids become whole characters (`Detokenizer`), which end before a stop string (`StopCutter`) and split
into text and calls (`CallReader`). Each of these takes pieces in order (`push`) and returns what is
certain so far; `end` returns the rest. The total output does not depend on how the input is split,
so a streamed answer equals an answer in one piece.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from rayrl.chat.renderer import Chat
from rayrl.chat.tools import CALL_MARKS, THOUGHT_MARKS, ParsedCall, read_call
from rayrl.types import Alternatives, Delta

__all__ = ["CallReader", "Choice", "ChoiceDelta", "Detokenizer", "StopCutter", "Token", "tool_call"]

CALL_BEGIN, CALL_END = CALL_MARKS
_CLOSING = {CALL_BEGIN: CALL_END, THOUGHT_MARKS[0]: THOUGHT_MARKS[1]}  # by opening mark
_UNKNOWN = "\ufffd"  # decoders write it for bytes that are not a character (yet)
_MAX_PENDING = 32  # ids without a whole character, before they count as invalid


class Detokenizer:
    """Decodes ids to text; an id that ends inside a character is held until it is complete."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last ids that produced text, as context, then pending ones
        self._context = 0  # number of context ids

    def push(self, token: int) -> str:
        """Return the text that is certain with this id; may be empty."""
        self._ids.append(token)
        pending = len(self._ids) - self._context
        before, now = self._texts()
        if len(now) <= len(before) or (now.endswith(_UNKNOWN) and pending < _MAX_PENDING):
            return ""
        self._ids, self._context = self._ids[self._context :], pending
        return now[len(before) :]

    def end(self) -> str:
        """Return the rest: bytes that never became a character."""
        rest, self._context = self.pending, len(self._ids)
        return rest

    @property
    def pending(self) -> str:
        """What `end` would return."""
        before, now = self._texts()
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[: self._context]), self._decode(self._ids)


class StopCutter:
    """Cuts text at the first stop string. `hit` is whether one occurred."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Return the text that cannot be part of a stop string."""
        if self.hit:
            return ""
        text = self._pending + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self.hit, self._pending = True, ""
            return text[: min(hits)[1]]  # the one that was completed first
        pending = max((_partial_match(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - pending :]
        return text[: len(text) - pending]

    def end(self) -> str:
        """Return pending text that only looked like the start of a stop string."""
        pending, self._pending = self._pending, ""
        return pending


class CallReader:
    """Splits an answer into text and tool calls; thoughts and malformed calls are text.

    White space around calls is dropped.

    Args:
        thinking: whether the answer begins inside a thought that the prompt has opened.
    """

    def __init__(self, *, thinking: bool = False) -> None:
        self._pending = ""
        self._closing = THOUGHT_MARKS[1] if thinking else ""  # mark that ends the current block
        self._space: list[str] = []  # white space that a call or the end may follow
        self.calls = 0

    def push(self, text: str) -> list[str | ParsedCall]:
        """Return the text and calls that are certain, in order."""
        self._pending += text
        return self._read(final=False)

    def end(self) -> list[str | ParsedCall]:
        """Return the rest; a truncated call is parsed if possible."""
        parts = self._read(final=True)
        if any(self._space) and not self.calls:
            parts.append("".join(self._space))
            self._space = []
        return parts

    def _read(self, *, final: bool) -> list[str | ParsedCall]:
        """Consume what is certain of the pending text; all of it if it is final."""
        parts: list[str | ParsedCall] = []
        text, at = self._pending, 0
        while at < len(text):
            if self._closing == CALL_END:
                if not final and text.find(CALL_END, at) < 0:
                    break
                call, end, closed = read_call(text, at, in_part=not final)
                if not final and not closed:  # the mark is inside a string of its arguments
                    break
                if call.error:
                    parts += self._text(CALL_BEGIN + text[at:end])
                else:
                    self.calls += 1
                    parts.append(call)
                at, self._closing = end, ""
                continue
            marks = [self._closing] if self._closing else list(_CLOSING)
            mark = re.compile("|".join(marks)).search(text, at)
            if mark is None:
                pending = 0 if final else max(_partial_match(text, m) for m in marks)
                certain = len(text) - pending
                parts += self._text(text[at:certain])
                at = certain
                break
            parts += self._text(text[at : mark.start() if mark[0] == CALL_BEGIN else mark.end()])
            at, self._closing = mark.end(), _CLOSING.get(mark[0], "")
        self._pending = text[at:]
        return parts

    def _text(self, text: str) -> list[str]:
        stripped = text.rstrip()
        if not stripped:
            self._space.append(text)
            return []
        part = "".join([*self._space, stripped])
        self._space = [text[len(stripped) :]]
        return [part]


def _partial_match(text: str, mark: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled id, its logprob, and the most probable ids at its position with theirs."""

    id: int
    logprob: float
    alternatives: Alternatives
    start: int  # offset of its text in the answer


class HeldTokens:
    """Holds sampled tokens until their text is certain to be part of the answer."""

    def __init__(self) -> None:
        self._tokens: list[Token] = []
        self._decoded = self._certain = 0  # characters detokenized, and those past the stop cutter

    def add(self, token: int, logprob: float, alternatives: Alternatives, after: int) -> None:
        """Hold a token whose text begins `after` characters of what comes next."""
        self._tokens.append(Token(token, logprob, alternatives, self._decoded + after))

    def release(self, decoded: str, certain: str) -> Iterator[Token]:
        """Take note of new text, and of what is certain now; yield the tokens that begin there."""
        self._decoded += len(decoded)
        self._certain += len(certain)
        while self._tokens and self._tokens[0].start < self._certain:
            yield self._tokens.pop(0)


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
        self._held = HeldTokens() if logprobs else None
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
            pending = "" if self._held is None else self._detokenizer.pending
            text = self._detokenizer.push(token)
            if self._held is not None:
                # what the ids before it came to, unless they and this one are one character
                after = len(pending) if len(text) > len(pending) and text.startswith(pending) else 0
                self._held.add(token, logprob, others, after)
            self._add(text, self._cutter.push, delta)
        if part.finish is not None and self.finish is None:
            self._add(self._detokenizer.end(), self._cutter.push, delta)
            self._add("", lambda _: self._cutter.end(), delta)
            if self.finish is None:
                self._end("stop" if self._cutter.hit else part.finish, delta)
        return delta

    def _add(self, text: str, cut: Callable[[str], str], delta: ChoiceDelta) -> None:
        certain = cut(text)
        if self._held is not None:
            delta.tokens += self._held.release(text, certain)
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
