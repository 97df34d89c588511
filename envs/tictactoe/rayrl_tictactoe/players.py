"""Scripted players: each reads the board from the last user message and writes a full reply.

A `Policy` gives the probability and the thought of every move; a player samples from it. A player's
strength can therefore be computed exactly (`strength.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from rayrl import Message

from .board import FREE, Board, best_moves, twos

__all__ = [
    "POLICIES",
    "REPLIES",
    "SEES_BLOCK",
    "SEES_WIN",
    "WANDERS",
    "Choice",
    "Policy",
    "free",
    "marks",
    "optimal",
    "random_legal",
    "read_board",
    "teacher",
]

SEES_WIN = 0.95
"""Probability that the teacher notices an immediate win."""

SEES_BLOCK = 0.95
"""Probability that the teacher notices a threat it must block."""

WANDERS = 0.25
"""Probability that the teacher plays a random cell when it sees neither. A student of a teacher
that always prefers the same cells would never try others and discover that some are better."""

CENTRE = 4
CORNERS = (0, 2, 6, 8)


@dataclass(frozen=True, slots=True)
class Choice:
    """A possible move: with `probability` the player thinks `thought` and plays `cell`."""

    probability: float
    cell: int
    thought: str


Policy = Callable[[str], Sequence[Choice]]
"""Maps a board's key, X to move, to all possible choices; their probabilities sum to 1."""


def read_board(messages: Sequence[Message]) -> str:
    """Parse the board in the last user message and return its key.

    Raises:
        ValueError: there is no user message, or it contains no board.
    """
    last = next((m.content for m in reversed(messages) if m.role == "user"), "")
    rows = [line.split(" | ") for line in last.splitlines() if line.count(" | ") == 2]
    if len(rows) != 3:
        raise ValueError(f"no board in the last user message: {last!r}")
    return "".join(cell if cell in ("X", "O") else FREE for row in rows for cell in row)


def _completing(key: str, mark: str) -> dict[int, str]:
    """Free cells that give `mark` three in a line at once, each with the name of such a line."""
    found: dict[int, str] = {}
    for name, cell in twos(key, mark):
        found.setdefault(cell, name)
    return found


def _even(probability: float, cells: Collection[int], thought: str) -> list[Choice]:
    """`probability` split evenly; "{}" in the thought is the cell."""
    return [Choice(probability / len(cells), cell, thought.format(cell)) for cell in cells]


def _seen(probability: float, found: Mapping[int, str], thought: str) -> list[Choice]:
    """`probability` split evenly over cells found, the thought naming the line of each."""
    each = probability / len(found)
    return [Choice(each, cell, thought.format(f"{name}: {cell}")) for cell, name in found.items()]


WIN = "X: {}. Win."
BLOCK = "X: none; O: {}. Block."
CALM = "X: none; O: none. "
"""A player first notes a line where X has two marks and a free cell, then one where O has. Writing
this down before the move lets a model check one thing at a time. The rest names only the cell: with
a kind of cell ("corner") before it, a student would learn that corners are better on average and
stop playing other cells even where they are needed."""


def random_policy(key: str) -> Sequence[Choice]:
    """Play a random free cell."""
    return _even(1.0, Board(key).free(), "Take {}.")


def optimal_policy(key: str) -> Sequence[Choice]:
    """Play perfectly, uniformly among optimal moves."""
    moves = best_moves(key, "X")
    for mark, thought in (("X", WIN), ("O", BLOCK)):
        found = _completing(key, mark)
        if set(moves) <= set(found):
            return _seen(1.0, {move: found[move] for move in moves}, thought)
    return _even(1.0, moves, CALM + "Best {}.")


def teacher_policy(key: str) -> Sequence[Choice]:
    """Play fallibly: notice most wins and threats, no forks; prefer the centre and corners."""
    choices: list[Choice] = []
    left = 1.0
    for chance, mark, thought in ((SEES_WIN, "X", WIN), (SEES_BLOCK, "O", BLOCK)):
        if found := _completing(key, mark):
            choices += _seen(left * chance, found, thought)
            left *= 1 - chance
    free = Board(key).free()
    corners = [cell for cell in CORNERS if cell in free]
    if CENTRE not in free and not corners:
        return [*choices, *_even(left, free, CALM + "Take {}.")]
    choices += _even(left * WANDERS, free, CALM + "Take {}.")
    left *= 1 - WANDERS
    if CENTRE in free:
        return [*choices, *_even(left, [CENTRE], CALM + "Take {}.")]
    return [*choices, *_even(left, corners, CALM + "Take {}.")]


POLICIES: dict[str, Policy] = {
    "optimal": optimal_policy,
    "random": random_policy,
    "teacher": teacher_policy,
}


def _reply(policy: Policy, messages: Sequence[Message], rng: random.Random) -> str:
    choices = policy(read_board(messages))
    choice = rng.choices(choices, [c.probability for c in choices])[0]
    return f"<think>{choice.thought}</think><move>{choice.cell}</move>"


def optimal(messages: Sequence[Message], rng: random.Random) -> str:
    """Play perfectly."""
    return _reply(optimal_policy, messages, rng)


def random_legal(messages: Sequence[Message], rng: random.Random) -> str:
    """Play a random free cell."""
    return _reply(random_policy, messages, rng)


def teacher(messages: Sequence[Message], rng: random.Random) -> str:
    """Play well enough to imitate, but weakly enough to be surpassed."""
    return _reply(teacher_policy, messages, rng)


REPLIES = [f"<think></think><move>{cell}</move>" for cell in range(9)]
"""The reply that plays each cell, for policies over numbers."""


def marks(messages: Sequence[Message]) -> list[float]:
    """What a policy over numbers observes, (18,): X's cells, then O's; 1 where there is a mark."""
    key = read_board(messages)
    return [float(cell == mark) for mark in "XO" for cell in key]


def free(messages: Sequence[Message]) -> list[int]:
    """The cells that are free."""
    return Board(read_board(messages)).free()
