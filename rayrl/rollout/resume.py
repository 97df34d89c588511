"""Episodes that are brought back: turns recorded earlier, played again without asking a model.

An episode is a coroutine over its task, its seed and the replies it hears. So its turns are enough
to bring it back: its environment's code runs anew, hears the recorded replies in the order in which
they came, and goes on from there. What it says is compared with what it said when they were
recorded; where that differs, the environment is not deterministic, and the episode starts over.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.chat.tools import tool_name
from rayrl.rollout.encoding import turn_from_bytes
from rayrl.types import Failure, Message, Turn, Usage, sum_usage

__all__ = ["Diverged", "EpisodeResume", "PartialEpisode", "TurnLog", "TurnRecord"]

PATIENCE_S = 5.0  # without any turn, until what is awaited in order counts as never said


class Diverged(Exception):
    """An environment did not do again what it did when its turns were recorded.

    Attributes:
        number: how many turns were the same.
        recorded: the turn that should have come next; None if there was none.
        said: the messages that came instead; None if there were none.
        failure: what the environment failed with instead of going on, if it did.
    """

    def __init__(
        self,
        what: str,
        number: int,
        recorded: Turn | None = None,
        said: tuple[Message, ...] | None = None,
        failure: Failure | None = None,
    ) -> None:
        super().__init__(what)
        self.number, self.recorded, self.said, self.failure = number, recorded, said, failure


@dataclass(frozen=True, slots=True)
class PartialEpisode:
    """How far an episode came before it lost its process.

    Attributes:
        turns: all seats', in the order they happened.
        attempt: number of the attempt that goes on. It must be above those of all before it, as
            their requests may still be answered and must not share a session with it.
    """

    turns: tuple[Turn, ...] = ()
    attempt: int = 1


TurnRecord = tuple[str, int, Turn | bytes]
"""Episode, number of the attempt, turn (or what `encoding.bytes_of` makes of it)."""


class TurnLog:
    """The turns of live episodes, kept where their process cannot take them along.

    `add` is for the `on_turn` of `play_groups`; `begun` gives what its `recorded` wants. Turns may
    come as bytes, and stay so until they are asked for, which is seldom.
    """

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, tuple[int, list[Turn | bytes]]]] = {}

    def add(self, episode: str, attempt: int, turn: Turn | bytes) -> None:
        """A turn was made or played again; those of earlier attempts are void from now on."""
        group = self._groups.setdefault(episode.rpartition("/")[0], {})
        known = group.get(episode)
        if known is None or attempt > known[0]:
            known = group[episode] = (attempt, [])
        if attempt == known[0]:  # and not what came late of an attempt that was given up
            known[1].append(turn)

    def begun(self, groups: Iterable[str] | None = None) -> dict[str, PartialEpisode]:
        """What there is of every episode, or of those of some groups, by its id."""
        wanted = self._groups if groups is None else groups
        return {
            episode: PartialEpisode(tuple(map(_decoded, turns)), attempt + 1)
            for group in wanted
            for episode, (attempt, turns) in self._groups.get(group, {}).items()
        }

    def told(self) -> list[TurnRecord]:
        """What has to be added to another log, so that it is as this one."""
        return [
            (episode, attempt, turn)
            for group in self._groups.values()
            for episode, (attempt, turns) in group.items()
            for turn in turns
        ]

    @property
    def groups(self) -> set[str]:
        """Those of which there is something."""
        return set(self._groups)

    def forget(self, group: str) -> None:
        """A group has ended: its episodes need not be brought back."""
        self._groups.pop(group, None)


def _decoded(turn: Turn | bytes) -> Turn:
    return turn_from_bytes(turn) if isinstance(turn, bytes) else turn


class EpisodeResume:
    """The turns of one attempt at an episode; all its seats share it.

    Args:
        recorded: turns to begin with, of all seats in the order they happened.
        on_turn: is told every turn, made or played again.

    Attributes:
        turns: those so far.
        replayed: how many of them were recorded.
        fresh: whether nothing was recorded: players need only be asked.
    """

    def __init__(
        self, recorded: Sequence[Turn] = (), on_turn: Callable[[Turn], None] | None = None
    ) -> None:
        self.turns: list[Turn] = []
        self.replayed = 0
        self.fresh = not recorded
        self._on_turn = on_turn
        self._left = deque(recorded)
        self._of_seat = Counter([turn.seat for turn in recorded])
        self._moved: asyncio.Event | None = None  # made where somebody waits for it
        self._diverged: Diverged | None = None
        self._closed = False

    @property
    def left(self) -> tuple[Turn, ...]:
        """Recorded turns that were not played again."""
        return tuple(self._left)

    @property
    def usage(self) -> Usage | None:
        """What all its turns cost at a server, those that are left included."""
        return sum_usage(turn.usage for turn in (*self.turns, *self._left))

    def add(self, turn: Turn) -> None:
        """A seat has its answer; one that comes after the end is nobody's."""
        if self._closed:
            return
        self.turns.append(turn)
        if self._on_turn is not None:
            self._on_turn(turn)

    def close(self) -> None:
        """The attempt is over."""
        self._closed = True

    async def again(
        self,
        seat: str,
        said: tuple[Message, ...],
        tools: Sequence[Mapping[str, Any]],
        offset: int,
    ) -> Turn | None:
        """The recorded turn of a seat, once those before it were played again.

        Args:
            seat: who is asked.
            said: the new messages.
            tools: schemas of the tools that are offered.
            offset: ids of the seat's conversation so far.

        Returns:
            None where nothing is left of the seat's: its player is to answer.

        Raises:
            Diverged: what is said is not what was recorded.
        """
        while self._diverged is None and self._of_seat[seat] and self._left[0].seat != seat:
            try:
                self._moved = self._moved or asyncio.Event()
                async with asyncio.timeout(PATIENCE_S):
                    await self._moved.wait()
            except TimeoutError:
                first = self._left[0].seat
                raise self._differs(f"{first!r} was to be asked before {seat!r}", said) from None
        if self._diverged is not None:
            raise self._diverged
        if not self._of_seat[seat]:
            return None
        turn = self._left[0]
        names, then = (sorted(map(tool_name, offered)) for offered in (tools, turn.tools))
        if turn.prompt != said:
            raise self._differs(f"{seat!r} was told something else", said)
        if names != then:
            raise self._differs(f"{seat!r} was offered the tools {names} instead of {then}", said)
        if turn.prompt_ids and turn.offset != offset:
            raise self._differs(f"{seat!r} was told it in another conversation", said)
        self._left.popleft()
        self._of_seat[seat] -= 1
        self.replayed += 1
        self._wake()
        return turn

    def cut_short(self, failure: Failure | None) -> Diverged:
        """What it means that the environment ended with recorded turns left."""
        how = "ended" if failure is None else f"failed ({failure.message})"
        n = len(self._left)
        turns = "a turn" if n == 1 else f"{n} turns"
        return self._differs(f"the environment {how} {turns} earlier", None, failure)

    def _differs(
        self, what: str, said: tuple[Message, ...] | None, failure: Failure | None = None
    ) -> Diverged:
        self._diverged = Diverged(what, self.replayed, self._left[0], said, failure)
        self._wake()  # nobody else need go on either
        return self._diverged

    def _wake(self) -> None:
        if self._moved is not None:
            self._moved.set()
            self._moved = None
