"""Resume episodes by replaying recorded turns without calling a model.

An episode is a coroutine over its task, its seed and the replies it receives, so its turns suffice
to restore it: its environment's code runs again, receives the recorded replies in their original
order, and continues from there. The messages it sends are compared with the recorded ones; if they
differ, the environment is not deterministic and the episode starts over.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.chat.tools import tool_name
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.records import turn_from_bytes
from rayrl.types import Failure, Message, Turn, Usage, sum_usage

__all__ = ["EpisodeResume", "PartialEpisode", "ReplayMismatch", "TurnLog", "TurnRecord"]

PATIENCE_S = 5.0  # without a turn of any seat, before a seat stops waiting for its recorded order


class ReplayMismatch(Exception):
    """An environment did not repeat what it did when its turns were recorded.

    Attributes:
        matched: number of turns that matched.
        recorded: the recorded turn that did not match; None if there was none.
        messages: the messages sent instead; None if there were none.
        failure: the environment's failure, if it failed instead of continuing.
    """

    def __init__(
        self,
        what: str,
        matched: int,
        recorded: Turn | None = None,
        messages: tuple[Message, ...] | None = None,
        failure: Failure | None = None,
    ) -> None:
        super().__init__(what)
        self.matched, self.recorded = matched, recorded
        self.messages, self.failure = messages, failure


@dataclass(frozen=True, slots=True)
class PartialEpisode:
    """The progress of an episode that lost its process.

    Attributes:
        turns: turns of all seats in chronological order.
        attempt: number of the attempt that resumes it. It must exceed those of all previous
            attempts, whose requests may still be running and must not share a session with it.
    """

    turns: tuple[Turn, ...] = ()
    attempt: int = 1


TurnRecord = tuple[str, int, Turn | bytes]
"""Episode id, number of the attempt, turn (or its `encoding.turn_to_bytes`)."""


class TurnLog:
    """Turns of live episodes, stored where they survive the process that plays them.

    Pass `add` as `on_turn` of `play_groups` and `partial_episodes()` as its `recorded`. Turns may
    be added as bytes; they are decoded only when needed, which is rare.
    """

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, tuple[int, list[Turn | bytes]]]] = {}

    def add(self, episode: str, attempt: int, turn: Turn | bytes) -> None:
        """Add a new or replayed turn; it invalidates the turns of earlier attempts."""
        group = self._groups.setdefault(episode.rpartition("/")[0], {})
        known = group.get(episode)
        if known is None or attempt > known[0]:
            known = group[episode] = (attempt, [])
        if attempt == known[0]:  # not a late turn of an abandoned attempt
            known[1].append(turn)

    def partial_episodes(self, groups: Iterable[str] | None = None) -> dict[str, PartialEpisode]:
        """Return the logged episodes by id, of all groups or of those given."""
        return {
            episode: PartialEpisode(
                tuple(turn_from_bytes(t) if isinstance(t, bytes) else t for t in turns),
                attempt + 1,
            )
            for group in (self._groups if groups is None else groups)
            for episode, (attempt, turns) in self._groups.get(group, {}).items()
        }

    def records(self) -> list[TurnRecord]:
        """Return all records; adding them to an empty log reproduces this one."""
        return [
            (episode, attempt, turn)
            for group in self._groups.values()
            for episode, (attempt, turns) in group.items()
            for turn in turns
        ]

    @property
    def groups(self) -> set[str]:
        """Ids of the groups with logged turns."""
        return set(self._groups)

    def remove(self, group: str) -> None:
        """Drop a group that has ended and need not be resumed."""
        self._groups.pop(group, None)


class EpisodeResume:
    """The turns of one attempt at an episode, shared by all its seats.

    Args:
        recorded: turns to replay, of all seats in chronological order.
        on_turn: called with every new or replayed turn.

    Attributes:
        turns: turns so far.
        replayed: number of them that were replayed.
        fresh: whether there is nothing to replay.
    """

    def __init__(
        self, recorded: Sequence[Turn] = (), on_turn: Callable[[Turn], None] | None = None
    ) -> None:
        self.turns: list[Turn] = []
        self.replayed = 0
        self.fresh = not recorded
        self._on_turn = on_turn
        self._remaining = dict(enumerate(recorded))
        self._numbers: defaultdict[tuple[str, str], deque[int]] = defaultdict(deque)
        for number, turn in self._remaining.items():
            self._numbers[turn.seat, turn.conversation].append(number)
        self._progress: asyncio.Event | None = None  # created when a seat waits for it
        self._mismatch: ReplayMismatch | None = None
        self._closed = False

    @property
    def remaining(self) -> tuple[Turn, ...]:
        """Recorded turns that have not been replayed."""
        return tuple(self._remaining.values())

    @property
    def usage(self) -> Usage | None:
        """Server usage of all turns, including the remaining recorded ones."""
        return sum_usage(turn.usage for turn in (*self.turns, *self._remaining.values()))

    def add(self, turn: Turn) -> None:
        """Add a seat's turn; one that arrives after `close` is dropped."""
        if self._closed:
            return
        self.turns.append(turn)
        if self._on_turn is not None:
            self._on_turn(turn)

    def close(self) -> None:
        """End the attempt."""
        self._closed = True

    async def replay(
        self,
        conversation: Conversation,
        messages: tuple[Message, ...],
        tools: Sequence[Mapping[str, Any]],
    ) -> Turn | None:
        """Return the next recorded turn of a conversation, after those recorded before it.

        It waits for these, so that who answered first does so again; but conversations of one seat
        (sub-agents that a program runs at once, say) may ask in another order than they did.

        Args:
            conversation: whose player is called.
            messages: the new messages.
            tools: schemas of the tools offered.

        Returns:
            The turn, or None if the conversation has none left and its player must answer.

        Raises:
            ReplayMismatch: the call differs from the recorded one.
        """
        seat = conversation.seat
        numbers = self._numbers[seat, conversation.name]
        while self._mismatch is None and numbers and next(iter(self._remaining)) != numbers[0]:
            try:
                self._progress = self._progress or asyncio.Event()
                async with asyncio.timeout(PATIENCE_S):
                    await self._progress.wait()
            except TimeoutError:
                first = next(iter(self._remaining.values())).seat
                if first == seat:
                    break
                what = f"{first!r} should have been called before {seat!r}"
                raise self._fail(what, messages) from None
        if self._mismatch is not None:
            raise self._mismatch
        if not numbers:
            if any(_is_elsewhere(turn, conversation) for turn in self._remaining.values()):
                raise self._fail(f"{seat!r} was called in a different conversation", messages)
            return None
        turn = self._remaining[numbers[0]]
        names, then = (sorted(map(tool_name, offered)) for offered in (tools, turn.tools))
        offset = len(conversation.ids)
        if turn.origin != conversation.origin or (turn.prompt_ids and turn.offset != offset):
            raise self._fail(f"{seat!r} was called in a different conversation", messages, turn)
        if turn.prompt != messages:
            raise self._fail(f"{seat!r} was sent different messages", messages, turn)
        if names != then:
            what = f"{seat!r} was offered the tools {names} instead of {then}"
            raise self._fail(what, messages, turn)
        del self._remaining[numbers.popleft()]
        self.replayed += 1
        self._wake()
        return turn

    def ended_early(self, failure: Failure | None) -> ReplayMismatch:
        """Create the error for an environment that ended with recorded turns remaining."""
        how = "ended" if failure is None else f"failed ({failure.message})"
        n = len(self._remaining)
        turns = "1 turn" if n == 1 else f"{n} turns"
        return self._fail(f"the environment {how} {turns} early", None, failure=failure)

    def _fail(
        self,
        what: str,
        messages: tuple[Message, ...] | None,
        recorded: Turn | None = None,
        failure: Failure | None = None,
    ) -> ReplayMismatch:
        recorded = recorded or next(iter(self._remaining.values()))
        self._mismatch = ReplayMismatch(what, self.replayed, recorded, messages, failure)
        self._wake()  # so that the other seats raise it too
        return self._mismatch

    def _wake(self) -> None:
        if self._progress is not None:
            self._progress.set()
            self._progress = None


def _is_elsewhere(turn: Turn, conversation: Conversation) -> bool:
    """Whether `turn` was recorded before or after a restart that is not, or now is, made."""
    left, came = conversation.origin, turn.origin
    return turn.seat == conversation.seat and (
        (left is not None and left.empty and left.conversation == turn.conversation)
        or (came is not None and came.empty and came.conversation == conversation.name)
    )
