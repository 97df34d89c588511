"""Two players at one board."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rayrl_tictactoe import players
from rayrl_tictactoe.env import Game, games, tictactoe
from rayrl_tictactoe.versus import versus

from rayrl import Episode, Message, Reply


class Fake:
    """An agent that answers from a list and remembers what it was asked."""

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies = iter(replies)
        self.asked: list[tuple[Message, ...]] = []

    async def __call__(self, new: Sequence[Message], *, state: str | None = None) -> Reply:
        self.asked.append(tuple(new))
        return Reply(next(self.replies))


class Optimal(Fake):
    def __init__(self, seed: int) -> None:
        super().__init__([])
        self.rng = random.Random(seed)

    async def __call__(self, new: Sequence[Message], *, state: str | None = None) -> Reply:
        return Reply(players.optimal(new, self.rng))


def game(first: str = "X", max_turns: int = 8) -> Game:
    return replace(games(seed=1, u=0.0), first=first, max_turns=max_turns)


def say(*cells: int) -> list[str]:
    return [f"<think>ok</think><move>{cell}</move>" for cell in cells]


async def test_x_wins_and_each_seat_sees_itself_as_x() -> None:
    x, o = Fake(say(0, 1, 2)), Fake(say(3, 4))
    scores = await versus(game(), x, o)
    assert scores == {
        "x": {"win": 1.0, "format": 1.0, "invalid": 0.0},
        "o": {"win": 0.0, "format": 1.0, "invalid": 0.0},
    }
    assert [m.role for m in x.asked[0]] == ["system", "user"]
    assert "X | 1 | 2\nO | 4 | 5" in x.asked[1][0].content
    assert "Opponent (O) played at position 3." in x.asked[1][0].content
    assert "O | 1 | 2\n3 | 4 | 5" in o.asked[0][1].content
    assert "O | O | 2\nX | 4 | 5" in o.asked[1][0].content


async def test_o_may_start() -> None:
    x, o = Fake(say(3, 4)), Fake(say(0, 1, 2))
    scores = await versus(game("O"), x, o)
    assert (scores["x"]["win"], scores["o"]["win"]) == (0.0, 1.0)  # type: ignore[index]
    assert o.asked[0][1].content.startswith("Game started.")


async def test_an_invalid_move_is_asked_again_and_counted_once() -> None:
    x, o = Fake([*say(0), "what?", *say(3, 1, 2)]), Fake(say(3, 4))
    scores = await versus(game(), x, o)
    assert scores["x"] == {"win": 1.0, "format": 4 / 5, "invalid": -0.1}
    assert scores["o"]["invalid"] == 0.0  # type: ignore[index]
    assert x.asked[2][0].content.startswith("Invalid move.")


async def test_running_out_of_turns_loses() -> None:
    scores = await versus(game(max_turns=2), Fake(["?", "?"]), Fake([]))
    assert scores["x"] == {"win": 0.0, "format": 0.0, "invalid": -0.1}
    assert scores["o"] == {"win": 1.0, "format": 1.0, "invalid": 0.0}


@pytest.mark.parametrize("seed", range(6))
async def test_two_perfect_players_draw(seed: int) -> None:
    scores = await versus(game("XO"[seed % 2]), Optimal(seed), Optimal(seed + 100))
    assert (scores["x"]["win"], scores["o"]["win"]) == (0.5, 0.5)  # type: ignore[index]


def test_statistics() -> None:
    scores = {"win": 0.5, "format": 0.75, "invalid": -0.1}
    expected = {"win/draw/loss": "draw", "format %": 0.75, "invalid %": True}
    one = Episode("e", "tictactoe", game(), 0, (), {"agent": scores}, {"agent": 0.5})
    assert tictactoe.statistics_function is not None
    assert tictactoe.statistics_function(one) == expected
    both = replace(one, scores={"x": scores, "o": {"win": 0.5, "format": 1.0, "invalid": 0.0}})
    assert versus.statistics_function is not None
    assert versus.statistics_function(both) == expected
