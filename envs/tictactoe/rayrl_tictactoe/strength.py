"""Compute the exact strength of the scripted players: `python -m rayrl_tictactoe.strength`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .board import FREE, Board, best_moves, other, winner
from .players import POLICIES, Policy

__all__ = ["Rates", "most_wins", "strength"]


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of games won, drawn and lost by X; they sum to 1."""

    win: float
    draw: float
    loss: float


def strength(policy: Policy, random_move_prob: float) -> Rates:
    """Compute X's rates with `policy` against an opponent of given randomness.

    X starts half of the games. The result is exact, summed over all games; it ignores the turn
    limit, which a player without invalid moves cannot reach.
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
        parts = [(p, rates(_put(key, cell, mark), other(mark))) for p, cell in weighted]
        win, draw, loss = (sum(p * part[i] for p, part in parts) for i in range(3))
        return win, draw, loss

    first, second = rates(FREE * 9, "X"), rates(FREE * 9, "O")
    return Rates(*((a + b) / 2 for a, b in zip(first, second, strict=True)))


def most_wins(never_lose: bool) -> float:
    """Return the largest share of games X can win against a random opponent, starting half of them.

    Args:
        never_lose: consider only players that cannot lose to any opponent.
    """

    @cache
    def wins(key: str, mark: str) -> float:
        if won := winner(key):
            return float(won == "X")
        free = Board(key).free()
        if not free:
            return 0.0
        if mark == "X" and never_lose:
            free = [cell for cell in free if not _can_lose(_put(key, cell, "X"), "O")]
        after = [wins(_put(key, cell, mark), other(mark)) for cell in free]
        return max(after, default=0.0) if mark == "X" else sum(after) / len(after)

    return (wins(FREE * 9, "X") + wins(FREE * 9, "O")) / 2


def _put(key: str, cell: int, mark: str) -> str:
    return key[:cell] + mark + key[cell + 1 :]


@cache
def _can_lose(key: str, mark: str) -> bool:
    """Whether O can win against X's best play, with `mark` to move."""
    if winner(key) or FREE not in key:
        return winner(key) == "O"
    children = [_can_lose(_put(key, cell, mark), other(mark)) for cell in Board(key).free()]
    return any(children) if mark == "O" else all(children)


def main() -> None:
    """Print every scripted player's rates against several opponents, and the best possible ones."""
    print("player     random_move_prob   win %  draw %  loss %")
    for name, policy in POLICIES.items():
        for prob in (0.0, 0.25, 0.5, 0.75, 1.0):
            r = strength(policy, prob)
            shares = " ".join(f"{100 * share:7.1f}" for share in (r.win, r.draw, r.loss))
            print(f"{name:<10} {prob:>16.2f} {shares}")
    print(f"most wins against random: {100 * most_wins(never_lose=False):.1f}% of games,")
    print(f"by a player that cannot lose: {100 * most_wins(never_lose=True):.1f}%")


if __name__ == "__main__":
    main()
