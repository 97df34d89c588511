"""Tic-tac-toe itself: the board, the messages about it, what a reply means, perfect play.

Standard library only and nothing of rayrl, so that any script can import it. X is always the model,
O its opponent. Cells are numbered 0 to 8, row by row.
"""

from __future__ import annotations

import re
from functools import cache

__all__ = [
    "FREE",
    "INVALID",
    "LINES",
    "STARTED",
    "SYSTEM",
    "Board",
    "best_moves",
    "format_ok",
    "other",
    "parse_move",
    "played",
    "prompt",
    "twos",
    "winner",
]

FREE = "."
"""How a free cell is written in a board's key."""

LINES = {
    "top row": (0, 1, 2),
    "middle row": (3, 4, 5),
    "bottom row": (6, 7, 8),
    "left column": (0, 3, 6),
    "middle column": (1, 4, 7),
    "right column": (2, 5, 8),
    "falling diagonal": (0, 4, 8),
    "rising diagonal": (6, 4, 2),
}
"""The eight rows, columns and diagonals that win."""

SYSTEM = (
    "You play tic-tac-toe as X against O. Three marks in a row, column or diagonal win. "
    "Free cells show their position, 0 to 8. Each turn choose one available position. "
    "You may reason first. Answer in this form: <think>reasoning</think><move>position</move>"
)
"""The default system prompt."""

STARTED = "Game started. You are X."
"""Status when X makes the first move of the game."""

INVALID = "Invalid move."
"""Status after a reply that named no position, or one that is not free."""

RULE = "---------"
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_MOVE = re.compile(r"<move>\s*([0-8])\s*</move>")
_FORMAT = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>|</?move>).)*"
    r"<move>(?:(?!</?think>|</?move>).)*</move>\s*",
    re.DOTALL,
)


def other(mark: str) -> str:
    """The opponent of `mark`."""
    return "O" if mark == "X" else "X"


def winner(key: str) -> str | None:
    """The mark that has three in a line on the board `key`, or None."""
    for a, b, c in LINES.values():
        if key[a] != FREE and key[a] == key[b] == key[c]:
            return key[a]
    return None


def twos(key: str, mark: str) -> list[tuple[str, int]]:
    """The lines that hold two of `mark` and a free cell: their names, and that cell."""
    found = []
    for name, cells in LINES.items():
        shown = [key[cell] for cell in cells]
        if shown.count(mark) == 2 and FREE in shown:
            found.append((name, cells[shown.index(FREE)]))
    return found


class Board:
    """A game in progress; `play` changes it.

    Args:
        key: nine characters, "X", "O" or "." (free), row by row.
    """

    def __init__(self, key: str = FREE * 9) -> None:
        if len(key) != 9 or set(key) - {"X", "O", FREE}:
            raise ValueError(f"a board is nine characters of 'X', 'O' and '.', not {key!r}")
        self._cells = list(key)

    def __repr__(self) -> str:
        return f"Board({self.key()!r})"

    def key(self) -> str:
        """The nine cells as one string, e.g. "X...O...."."""
        return "".join(self._cells)

    def free(self) -> list[int]:
        """Positions nobody has taken, ascending."""
        return [cell for cell, mark in enumerate(self._cells) if mark == FREE]

    def winner(self) -> str | None:
        """The mark with three in a line, or None."""
        return winner(self.key())

    @property
    def over(self) -> bool:
        """Whether somebody has won or no cell is free."""
        return self.winner() is not None or FREE not in self._cells

    def play(self, cell: int, mark: str) -> None:
        """Puts `mark` ("X" or "O") on a free `cell`; anything else is a ValueError."""
        if mark not in ("X", "O"):
            raise ValueError(f"a mark is 'X' or 'O', not {mark!r}")
        if self.over:
            raise ValueError(f"the game {self.key()!r} is over")
        if cell not in self.free():
            raise ValueError(f"position {cell} is not free on {self.key()!r}")
        self._cells[cell] = mark

    def render(self) -> str:
        """Three lines of `a | b | c` between rules; free cells show their position."""
        shown = [str(cell) if mark == FREE else mark for cell, mark in enumerate(self._cells)]
        rows = [" | ".join(shown[start : start + 3]) for start in (0, 3, 6)]
        return "\n".join([RULE, *rows, RULE])


def played(cell: int) -> str:
    """Status after a move of the opponent."""
    return f"Opponent (O) played at position {cell}."


def prompt(status: str, board: Board) -> str:
    """A user message: what happened, the board, where X may play."""
    available = ", ".join(map(str, board.free()))
    return f"{status}\n{board.render()}\nAvailable positions: {available}\nYour turn."


def parse_move(text: str) -> int | None:
    """The position in the last `<move>` tag outside of thoughts; None if there is none.

    A thought that was never closed reaches to the end: what stands in it is not an answer.
    """
    found = _MOVE.findall(_THOUGHT.sub("", text))
    return int(found[-1]) if found else None


def format_ok(text: str) -> bool:
    """Whether all of `text` is one thought, then one move: `<think>…</think>…<move>…</move>`.

    What the move says is not judged here: an occupied position is an invalid move, not bad form.
    A second thought or a second move is bad form: it leaves open which one is meant.
    """
    return _FORMAT.fullmatch(text) is not None


@cache
def _value(key: str, mark: str) -> int:
    """What the board is worth to `mark`, who is to move: won > 0, drawn 0, lost < 0.

    A game that ends with more free cells counts for more, so faster wins and slower losses are
    preferred.
    """
    if winner(key) is not None:  # the one who has just moved
        return -1 - key.count(FREE)
    if FREE not in key:
        return 0
    return max(-_value(after, other(mark)) for _, after in _moves(key, mark))


def _moves(key: str, mark: str) -> list[tuple[int, str]]:
    return [(cell, key[:cell] + mark + key[cell + 1 :]) for cell in range(9) if key[cell] == FREE]


@cache
def best_moves(key: str, mark: str) -> tuple[int, ...]:
    """All equally good moves of perfect play for `mark` on the unfinished board `key`."""
    if winner(key) is not None or FREE not in key:
        raise ValueError(f"the game {key!r} is over")
    values = {cell: -_value(after, other(mark)) for cell, after in _moves(key, mark)}
    best = max(values.values())
    return tuple(cell for cell, value in values.items() if value == best)
