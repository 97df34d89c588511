"""Text out of ids as they come: whole characters, no stop strings, calls apart from words.

Each class reads pieces in order (`push`) and gives back what is certain so far; `end` gives the
rest. How the input was cut into pieces makes no difference to what comes out in all, so a stream
says exactly what an answer in one piece says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rayrl.chat.tools import CALL_MARKS, THOUGHT_MARKS, ParsedCall, read_call

__all__ = ["CallReader", "Detokenizer", "StopCutter"]

CALL_BEGIN, CALL_END = CALL_MARKS
_AWAITS = {CALL_BEGIN: CALL_END, THOUGHT_MARKS[0]: THOUGHT_MARKS[1]}  # what ends what
_UNKNOWN = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
_PATIENCE = 32  # ids without a whole character after which they are taken for garbage


class Detokenizer:
    """Ids into text; an id that ends inside a character waits for the next ones."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last ones that made text, for the context, then the new
        self._told = 0  # how many of them made text

    def push(self, one: int) -> str:
        """What is certain with this id; may be empty."""
        self._ids.append(one)
        waiting = len(self._ids) - self._told
        before, now = self._texts()
        if len(now) <= len(before) or (now.endswith(_UNKNOWN) and waiting < _PATIENCE):
            return ""
        self._ids, self._told = self._ids[self._told :], waiting
        return now[len(before) :]

    def end(self) -> str:
        """What was waiting: bytes that never became a character."""
        before, now = self._texts()
        self._told = len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[: self._told]), self._decode(self._ids)


class StopCutter:
    """Text up to the first of some strings. `hit` says whether one came."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """What cannot be part of a stop string."""
        if self.hit:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]]  # the one that was whole first
        keep = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What only looked like the beginning of one."""
        held, self._held = self._held, ""
        return held


class CallReader:
    """Words and calls of an answer; thoughts, and calls that cannot be read, are words.

    White space around calls is dropped.

    Args:
        thinking: whether the answer begins within a thought that the prompt has opened.
    """

    def __init__(self, *, thinking: bool = False) -> None:
        self._held = ""
        self._awaits = THOUGHT_MARKS[1] if thinking else ""  # mark that ends what we are in
        self._space: list[str] = []  # white space that a call or the end may follow
        self.calls = 0

    def push(self, text: str) -> list[str | ParsedCall]:
        """Words and calls, in order."""
        self._held += text
        return self._read(whole=False)

    def end(self) -> list[str | ParsedCall]:
        """What was waiting; a call that was cut off is read if it can be."""
        found = self._read(whole=True)
        if any(self._space) and not self.calls:
            found.append("".join(self._space))
            self._space = []
        return found

    def _read(self, *, whole: bool) -> list[str | ParsedCall]:
        """What can be told of what is held; if that is the whole rest, all of it."""
        found: list[str | ParsedCall] = []
        text, at = self._held, 0
        while at < len(text):
            if self._awaits == CALL_END:
                if not whole and text.find(CALL_END, at) < 0:
                    break
                call, end, closed = read_call(text, at, in_part=not whole)
                if not whole and not closed:  # the mark is in a string of its arguments
                    break
                found += self._call(call, text[at:end])
                at, self._awaits = end, ""
                continue
            marks = [self._awaits] if self._awaits else list(_AWAITS)
            mark = re.compile("|".join(marks)).search(text, at)
            if mark is None:
                sure = len(text) if whole else len(text) - max(_begun(text, m) for m in marks)
                found += self._words(text[at:sure])
                at = sure
                break
            found += self._words(text[at : mark.start() if mark[0] == CALL_BEGIN else mark.end()])
            at, self._awaits = mark.end(), _AWAITS.get(mark[0], "")
        self._held = text[at:]
        return found

    def _call(self, call: ParsedCall, block: str) -> list[str | ParsedCall]:
        if call.error:
            return self._words(CALL_BEGIN + block)
        self.calls += 1
        return [call]

    def _words(self, text: str) -> list[str | ParsedCall]:
        words = text.rstrip()
        if not words:
            self._space.append(text)
            return []
        told = "".join([*self._space, words])
        self._space = [text[len(words) :]]
        return [told]


def _begun(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
