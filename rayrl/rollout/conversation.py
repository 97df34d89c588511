"""A conversation between one seat and its player, and how another goes on from it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from rayrl.types import Message, Origin, Task

__all__ = ["Conversation", "ConversationNames", "Point", "Throttling"]


class Point(NamedTuple):
    """A point in a conversation: after so many turns, those before it began included."""

    session: str
    turns: int


class _Mark(NamedTuple):
    """How much of a conversation there was after a turn."""

    messages: int
    ids: int
    finished: bool
    tools: frozenset[str]
    calls: int


class Throttling:
    """Counts the seconds in which a player delays requests to respect a rate limit.

    They do not count towards deadlines. Requests that are delayed at the same time count once.
    """

    __slots__ = ("_until", "seconds")

    def __init__(self) -> None:
        self.seconds = self._until = 0.0

    def add(self, seconds: float) -> None:
        """A request is delayed from now on."""
        now = time.monotonic()
        self.seconds += max(0.0, now + seconds - max(now, self._until))
        self._until = max(self._until, now + seconds)


class ConversationNames:
    """Names of the conversations that an agent begins after its first.

    Args:
        path: what their sessions begin with, before their names.
        prefix: what their names begin with: the name of the agent's first.
    """

    __slots__ = ("_counts", "path", "prefix")

    def __init__(self, path: str, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self._counts: Counter[str] | None = None  # most agents never begin another

    def next(self, name: str = "") -> str:
        """Return the next name: a number, or `name`, with a number if it was there before."""
        number = self._count(name)
        if name:
            return f"{self.prefix}/{name}" if number == 1 else f"{self.prefix}/{name}-{number}"
        return f"{self.prefix}/{number}"

    def next_fork(self, session: str) -> str:
        """Return the session of the agent's next fork, while its own is `session`."""
        # which holds the parent's, so that forks of forks have distinct sessions too
        return f"{session}+{self._count('+')}"

    def _count(self, name: str) -> int:
        self._counts = self._counts or Counter()
        self._counts[name] += 1
        return self._counts[name]


class Conversation:
    """The conversation between one seat and its player. Players may store their state here.

    Attributes:
        session: name of the conversation, unique in a run.
        name: its name in the seat, as in `Turn.conversation`.
        origin: where it began; None for the seat's first.
        seat: the seat that answers.
        task: what the episode started from, for scripts that know its answer; models never see it.
            None outside of an episode.
        messages: all messages so far, replies included.
        ids: the conversation's token ids, for players that have tokens.
        finished: whether the last completion ended with the end-of-turn id.
        tools: names of the tools the model has been shown.
        turns: number of turns so far, those before it began included.
        calls: number of tool calls in it so far.
        marks: by number of turns, how to go on from there.
        throttling: where the player counts its delays.
    """

    __slots__ = (
        "calls",
        "finished",
        "ids",
        "marks",
        "messages",
        "name",
        "origin",
        "seat",
        "session",
        "task",
        "throttling",
        "tools",
        "turns",
    )

    def __init__(
        self,
        session: str,
        seat: str,
        task: Task | None = None,
        throttling: Throttling | None = None,
        *,
        name: str = "",
        origin: Origin | None = None,
    ) -> None:
        self.session = session
        self.name = name
        self.origin = origin
        self.seat = seat
        self.task = task
        self.messages: list[Message] = []
        self.ids: list[int] = []
        self.finished = True
        self.tools: frozenset[str] = frozenset()
        self.turns = self.calls = 0
        self.throttling = throttling or Throttling()
        self.marks: dict[int, _Mark] = {}
        self.mark()

    def mark(self) -> None:
        """Keep what is needed to go on from here later."""
        self.marks[self.turns] = _Mark(
            len(self.messages), len(self.ids), self.finished, self.tools, self.calls
        )

    def follow(self, session: str, name: str, turns: int, *, empty: bool = False) -> Conversation:
        """Create one that goes on from when there were `turns`, or begins `empty` after them."""
        origin: Origin | None = Origin(self.name, turns, empty)
        if turns == (self.origin.turns if self.origin else 0):  # nothing is recorded of this one
            origin = self.origin and replace(self.origin, empty=empty or self.origin.empty)
        new = Conversation(session, self.seat, self.task, self.throttling, name=name, origin=origin)
        new.turns = turns
        if not empty:
            mark = self.marks[turns]
            new.messages, new.ids = self.messages[: mark.messages], self.ids[: mark.ids]
            new.finished, new.tools, new.calls = mark.finished, mark.tools, mark.calls
        new.marks.clear()
        new.mark()
        return new
