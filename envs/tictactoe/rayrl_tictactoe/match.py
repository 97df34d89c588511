"""A game under way, with what is counted about it: pure, so that the check can fork it freely."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .board import FREE, INVALID, STARTED, Board, format_ok, parse_move, played, prompt, winner

__all__ = ["INVALID_SCORE", "Match"]

INVALID_SCORE = -0.1
"""Flat: a penalty a move would punish long reasoning that got truncated."""


@dataclass(frozen=True, slots=True)
class Match:
    """One moment of a game; `hear` and `reply` give the next one.

    Attributes:
        max_turns: messages X may write before the game counts as lost.
        to_move: "X" or "O". An invalid move leaves it X's turn.
        key: the board, see `Board.key`.
        status: first line of the next message to X.
        turns: messages X has written.
        formatted: how many of them were well formed.
        invalid: how many of them held no playable move.
    """

    max_turns: int
    to_move: str = "X"
    key: str = FREE * 9
    status: str = STARTED
    turns: int = 0
    formatted: int = 0
    invalid: int = 0

    @property
    def over(self) -> bool:
        """Won, drawn, or out of turns."""
        return self.turns >= self.max_turns or FREE not in self.key or winner(self.key) is not None

    @property
    def result(self) -> str:
        """Of a game that is over, for X: "win", "draw" or "loss". An unfinished board is a loss."""
        won = winner(self.key)
        if won is None:
            return "draw" if FREE not in self.key else "loss"
        return "win" if won == "X" else "loss"

    @property
    def state(self) -> str:
        """Names the decision X has before it: the board and the invalid moves so far.

        Equal keys must be worth the same, or step-level advantages would compare unlike things. The
        board alone is not enough: each invalid move has used up a turn, and the first one has cost
        its flat penalty, which no later move can win back. Both follow from the board and the count
        over the *whole* game, since turns = X's marks + invalid moves. (A count since the board
        last changed would call a game with an old penalty equal to a clean one.) Whose order of
        moves led here does not matter: the opponent's reply depends on the board only.
        """
        return f"{self.key}/{self.invalid}"

    def prompt(self) -> str:
        """The next message to X."""
        return prompt(self.status, Board(self.key))

    def ending(self) -> str:
        """What a person sees when the game is over: how O moved last, and the board."""
        last = f"{self.status}\n" if self.to_move == "X" and self.status != INVALID else ""
        return f"{last}{Board(self.key).render()}"

    def hear(self, text: str) -> Match:
        """After X's message `text`: the move is made, or refused and X is asked again."""
        heard = replace(self, turns=self.turns + 1, formatted=self.formatted + format_ok(text))
        cell = parse_move(text)
        if cell is None or self.key[cell] != FREE:
            return replace(heard, invalid=self.invalid + 1, status=INVALID)
        return replace(heard, key=_put(self.key, cell, "X"), to_move="O")

    def reply(self, cell: int) -> Match:
        """After O's move on the free `cell`."""
        return replace(self, key=_put(self.key, cell, "O"), to_move="X", status=played(cell))

    def scores(self) -> dict[str, float]:
        """Of a game that is over: win 1 / draw 0.5 / loss 0, share well formed, flat penalty."""
        return {
            "win": {"win": 1.0, "draw": 0.5, "loss": 0.0}[self.result],
            "format": self.formatted / self.turns,
            "invalid": INVALID_SCORE if self.invalid else 0.0,
        }


def _put(key: str, cell: int, mark: str) -> str:
    board = Board(key)
    board.play(cell, mark)
    return board.key()
