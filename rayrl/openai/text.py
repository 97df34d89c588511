"""Text out of ids as they come: whole characters, no stop strings, calls apart from words.

Each class reads pieces in order (`push`) and gives back what is certain so far; `end` gives the
rest. How the input was cut into pieces makes no difference to what comes out in all, so a stream
says exactly what an answer in one piece says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rayrl.tools import ParsedCall, parse_calls

__all__ = ["CALL_END", "CallReader", "Detokenizer", "StopCutter"]

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
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
    """Words and calls of an answer. A call that cannot be read stays among the words.

    White space around calls is dropped.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._space = ""  # white space that a call or the end may follow
        self.calls = 0

    def push(self, text: str) -> list[str | ParsedCall]:
        """Words and calls, in order."""
        found: list[str | ParsedCall] = []
        self._held += text
        while self._held:
            mark = CALL_END if self._inside else CALL_BEGIN
            before, seen, after = self._held.partition(mark)
            if not seen:
                break
            self._held = after
            if self._inside:
                found += self._call(before, CALL_END)
            else:
                found += self._words(before)
            self._inside = not self._inside
        if not self._inside:
            keep = _begun(self._held, CALL_BEGIN)
            words = self._held[: len(self._held) - keep]
            self._held = self._held[len(words) :]
            found += self._words(words)
        return found

    def end(self) -> list[str | ParsedCall]:
        """What was waiting; a call that was cut off is read if it can be."""
        held, self._held = self._held, ""
        found = self._call(held, "") if self._inside else self._words(held)
        self._inside = False
        if self._space and not self.calls:
            found.append(self._space)
            self._space = ""
        return found

    def _call(self, block: str, end: str) -> list[str | ParsedCall]:
        text = f"{CALL_BEGIN}{block}{end}"
        (call,) = parse_calls(text)
        if call.error:
            return self._words(text)
        self.calls += 1
        return [call]

    def _words(self, text: str) -> list[str | ParsedCall]:
        text = self._space + text
        words = text.rstrip()
        self._space = text[len(words) :]
        return [words] if words else []


def _begun(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
