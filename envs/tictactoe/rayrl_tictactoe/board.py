"""The game of tic-tac-toe: board, messages, parsing of replies, perfect play.

Standard library only and independent of rayrl, so any script can import it. X is always the model,
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
"""A free cell in a board's key."""

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
"""Status after a reply with no position or one that is not free."""

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
    """Return the mark with three in a line on the board `key`, or None."""
    for a, b, c in LINES.values():
        if key[a] != FREE and key[a] == key[b] == key[c]:
            return key[a]
    return None


def twos(key: str, mark: str) -> list[tuple[str, int]]:
    """Return the lines with two of `mark` and a free cell: name and free cell of each."""
    found = []
    for name, cells in LINES.items():
        marks = [key[cell] for cell in cells]
        if marks.count(mark) == 2 and FREE in marks:
            found.append((name, cells[marks.index(FREE)]))
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
        """Return the nine cells as a string, e.g. "X...O...."."""
        return "".join(self._cells)

    def free(self) -> list[int]:
        """Return the free positions, ascending."""
        return [cell for cell, mark in enumerate(self._cells) if mark == FREE]

    def winner(self) -> str | None:
        """Return the mark with three in a line, or None."""
        return winner(self.key())

    @property
    def over(self) -> bool:
        """Whether a player has won or no cell is free."""
        return self.winner() is not None or FREE not in self._cells

    def play(self, cell: int, mark: str) -> None:
        """Put `mark` ("X" or "O") on a free `cell`.

        Raises:
            ValueError: another mark, a cell that is not free, or the game is over.
        """
        if mark not in ("X", "O"):
            raise ValueError(f"a mark is 'X' or 'O', not {mark!r}")
        if self.over:
            raise ValueError(f"the game {self.key()!r} is over")
        if cell not in self.free():
            raise ValueError(f"position {cell} is not free on {self.key()!r}")
        self._cells[cell] = mark

    def render(self) -> str:
        """Render three lines of `a | b | c` between rules; free cells show their position."""
        cells = [str(cell) if mark == FREE else mark for cell, mark in enumerate(self._cells)]
        rows = [" | ".join(cells[start : start + 3]) for start in (0, 3, 6)]
        return "\n".join([RULE, *rows, RULE])


def played(cell: int) -> str:
    """Return the status after a move of the opponent."""
    return f"Opponent (O) played at position {cell}."


def prompt(status: str, board: Board) -> str:
    """Return a user message with the status, the board and the available positions."""
    available = ", ".join(map(str, board.free()))
    return f"{status}\n{board.render()}\nAvailable positions: {available}\nYour turn."


def parse_move(text: str) -> int | None:
    """Return the position in the last `<move>` tag outside of thoughts; None if there is none.

    An unclosed thought extends to the end of the text.
    """
    found = _MOVE.findall(_THOUGHT.sub("", text))
    return int(found[-1]) if found else None


def format_ok(text: str) -> bool:
    """Whether `text` is exactly one thought, then one move: `<think>…</think>…<move>…</move>`.

    The content of the move is not checked: an occupied position is an invalid move, not bad form.
    A second thought or move is bad form because it is ambiguous.
    """
    return _FORMAT.fullmatch(text) is not None


@cache
def _value(key: str, mark: str) -> int:
    """Return the value of the board for `mark`, which is to move: win > 0, draw 0, loss < 0.

    A game that ends with more free cells counts for more, so faster wins and slower losses are
    preferred.
    """
    if winner(key) is not None:  # the player that has just moved
        return -1 - key.count(FREE)
    if FREE not in key:
        return 0
    return max(-_value(after, other(mark)) for _, after in _moves(key, mark))


def _moves(key: str, mark: str) -> list[tuple[int, str]]:
    return [(cell, key[:cell] + mark + key[cell + 1 :]) for cell in range(9) if key[cell] == FREE]


@cache
def best_moves(key: str, mark: str) -> tuple[int, ...]:
    """Return all optimal moves of `mark` on the unfinished board `key`."""
    if winner(key) is not None or FREE not in key:
        raise ValueError(f"the game {key!r} is over")
    values = {cell: -_value(after, other(mark)) for cell, after in _moves(key, mark)}
    best = max(values.values())
    return tuple(cell for cell, value in values.items() if value == best)
