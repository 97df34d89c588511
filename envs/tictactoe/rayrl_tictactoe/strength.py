"""How strong the scripted players are, exactly: `python -m rayrl_tictactoe.strength`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .board import FREE, Board, best_moves, other, winner
from .players import POLICIES, Policy

__all__ = ["Rates", "strength"]


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of games won, drawn and lost by X; they sum to 1."""

    win: float
    draw: float
    loss: float


def strength(policy: Policy, random_move_prob: float) -> Rates:
    """What X gets by `policy` against an opponent of this randomness, starting half of the games.

    Exact: sums over all games. Leaves out the turn limit, which a player that never makes an
    invalid move cannot reach.
    """

    @cache
    def rates(key: str, mark: str) -> tuple[float, float, float]:
        if won := winner(key):
            return (1.0, 0.0, 0.0) if won == "X" else (0.0, 0.0, 1.0)
        free = Board(key).free()
        if not free:
            return 0.0, 1.0, 0.0
        if mark == "X":
            weighted = [(choice.probability, choice.cell) for choice in policy(key)]
        else:
            best = best_moves(key, "O")
            weighted = [(random_move_prob / len(free), cell) for cell in free]
            weighted += [((1 - random_move_prob) / len(best), cell) for cell in best]
        parts = [
            (p, rates(key[:cell] + mark + key[cell + 1 :], other(mark))) for p, cell in weighted
        ]
        win, draw, loss = (sum(p * part[i] for p, part in parts) for i in range(3))
        return win, draw, loss

    first, second = rates(FREE * 9, "X"), rates(FREE * 9, "O")
    return Rates(*((a + b) / 2 for a, b in zip(first, second, strict=True)))


def main() -> None:
    """Prints a table of every scripted player against opponents of several strengths."""
    print("player     random_move_prob   win %  draw %  loss %")
    for name, policy in POLICIES.items():
        for prob in (0.0, 0.25, 0.5, 0.75, 1.0):
            r = strength(policy, prob)
            shares = " ".join(f"{100 * share:7.1f}" for share in (r.win, r.draw, r.loss))
            print(f"{name:<10} {prob:>16.2f} {shares}")


if __name__ == "__main__":
    main()
