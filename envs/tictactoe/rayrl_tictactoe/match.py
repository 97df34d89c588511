"""The immutable state of a game with its counts, which the exhaustive check can branch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .board import FREE, INVALID, STARTED, Board, format_ok, parse_move, played, prompt, winner

__all__ = ["INVALID_SCORE", "Match"]

INVALID_SCORE = -0.1
"""Flat: a penalty per move would punish truncated long reasoning."""


@dataclass(frozen=True, slots=True)
class Match:
    """The state of a game; `hear` and `reply` return the next one.

    Attributes:
        max_turns: maximum messages by X before the game counts as lost.
        to_move: "X" or "O". After an invalid move it is still X's turn.
        key: the board, see `Board.key`.
        status: first line of the next message to X.
        turns: number of messages by X.
        formatted: number of well-formed ones among them.
        invalid: number of those without a playable move.
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
        """Whether the game is won, drawn, or out of turns."""
        return self.turns >= self.max_turns or FREE not in self.key or winner(self.key) is not None

    @property
    def result(self) -> str:
        """Result for X of a finished game: "win", "draw" or "loss" (also if out of turns)."""
        won = winner(self.key)
        if won is None:
            return "draw" if FREE not in self.key else "loss"
        return "win" if won == "X" else "loss"

    @property
    def state(self) -> str:
        """Key of X's decision: the board and the number of invalid moves so far.

        States with equal keys must have equal value, because step-level advantages compare them.
        The board alone is not enough: each invalid move has used up a turn, and the first has cost
        the flat penalty. Both follow from the board and the count over the *whole* game, since
        turns = X's marks + invalid moves. (A count since the last change of the board would equate
        a game that has been penalized with one that has not.) The order of moves does not matter:
        the opponent's move depends on the board only.
        """
        return f"{self.key}/{self.invalid}"

    def prompt(self) -> str:
        """Return the next message to X."""
        return prompt(self.status, Board(self.key))

    def ending(self) -> str:
        """Return the text shown to a person after the game: O's last move and the board."""
        last = f"{self.status}\n" if self.to_move == "X" and self.status != INVALID else ""
        return f"{last}{Board(self.key).render()}"

    def hear(self, text: str) -> Match:
        """Return the state after X's message `text`; after an invalid move X is to move again."""
        after = replace(self, turns=self.turns + 1, formatted=self.formatted + format_ok(text))
        cell = parse_move(text)
        if cell is None or self.key[cell] != FREE:
            return replace(after, invalid=self.invalid + 1, status=INVALID)
        return replace(after, key=_put(self.key, cell, "X"), to_move="O")

    def reply(self, cell: int) -> Match:
        """Return the state after O's move on the free `cell`."""
        return replace(self, key=_put(self.key, cell, "O"), to_move="X", status=played(cell))

    def scores(self) -> dict[str, float]:
        """Return the scores of a finished game: result (1, 0.5 or 0), form, invalid penalty."""
        return {
            "win": {"win": 1.0, "draw": 0.5, "loss": 0.0}[self.result],
            "format": self.formatted / self.turns,
            "invalid": INVALID_SCORE if self.invalid else 0.0,
        }


def _put(key: str, cell: int, mark: str) -> str:
    board = Board(key)
    board.play(cell, mark)
    return board.key()
