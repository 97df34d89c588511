"""The tree of a seat's turns: which turns each conversation consists of, and what follows a turn.

A conversation that branches shares the turns before the branch; one that restarts follows others
without sharing them. Functions here take all turns of one seat in chronological order and answer
with their indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rayrl.types import Turn

__all__ = ["beginning", "seat_name", "transcripts", "turns_after"]


def seat_name(turn: Turn) -> str:
    """The name of a turn's seat and conversation, for people."""
    return f"{turn.seat}{turn.conversation}"


def beginning(turn: Turn) -> str:
    """Where the conversation of a turn began, for people."""
    origin = turn.origin
    if origin is None:
        return f"{seat_name(turn)} is a conversation of its own"
    how = "begins anew" if origin.empty else "goes on"
    return f"{seat_name(turn)} {how} after turn {origin.turns} of {turn.seat}{origin.conversation}"


class _Path(NamedTuple):
    """The turns up to a conversation's last in time; its text is that of those from `start` on."""

    turns: list[int]
    start: int


def transcripts(turns: Sequence[Turn]) -> list[list[int]]:
    """The conversations from beginning to end, each as the indices of its turns.

    Turns before a branch are in the transcripts of all its branches. A conversation of which a
    branch shares all turns has no transcript of its own: it is the beginning of the branch's.

    Raises:
        ValueError: a turn's `origin` is not in `turns`.
    """
    paths = _paths(turns)
    origins = [turns[path.turns[-1]].origin for path in paths.values()]
    whole = {
        origin.conversation
        for origin in origins
        if origin is not None
        and not origin.empty
        and origin.conversation in paths
        and origin.turns == len(paths[origin.conversation].turns)
    }
    return [path.turns[path.start :] for name, path in paths.items() if name not in whole]


def turns_after(turns: Sequence[Turn]) -> list[int]:
    """For each turn, the number of turns that followed it on the longest way to a last one.

    Raises:
        ValueError: a turn's `origin` is not in `turns`.
    """
    after = [0] * len(turns)
    for path in _paths(turns).values():
        for left, k in enumerate(reversed(path.turns)):
            after[k] = max(after[k], left)
    return after


def _paths(turns: Sequence[Turn]) -> dict[str, _Path]:
    own: dict[str, list[int]] = {}
    for k, turn in enumerate(turns):
        own.setdefault(turn.conversation, []).append(k)
    paths: dict[str, _Path] = {}
    for name, indices in own.items():  # one that another began after has turns before it
        origin = turns[indices[0]].origin
        if origin is None:
            paths[name] = _Path(indices, 0)
            continue
        before = paths.get(origin.conversation, _Path([], 0))
        if len(before.turns) < origin.turns:
            raise ValueError(
                f"conversation {name!r} began after {origin.turns} turns of "
                f"{origin.conversation!r}, of which {len(before.turns)} are there"
            )
        start = origin.turns if origin.empty else before.start
        paths[name] = _Path([*before.turns[: origin.turns], *indices], start)
    return paths
