"""TextArena's games: seats, what each hears, scores, and games that cannot be played here."""

from __future__ import annotations

import asyncio

import pytest
from textarena.envs.registration import ENV_REGISTRY

from rayrl.environment.environment import Environment
from rayrl.environment.registry import environment_of, load_env
from rayrl.errors import ConfigError
from rayrl.rollout.check import check_env
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode

GAMES = {
    "2048-v0-easy": 1,
    "Sudoku-v0-easy": 1,
    "TowerOfHanoi-v0": 1,
    "Breakthrough-v0-tiny": 2,
    "ConnectFour-v0": 2,
    "KuhnPoker-v0": 2,
    "Nim-v0": 2,
    "ThreePlayerTicTacToe-v0": 3,
    "SecretMafia-v0": 6,
}


def play(env: Environment, *moves: str, number: int = 0) -> Episode:
    """Each seat replies with its next move from the list, in the order in which they are asked."""
    left = iter(moves)
    player = ScriptedPlayer(lambda messages, rng: next(left))
    if not moves:
        player = ScriptedPlayer(env.players["random"])
    (task,) = env.tasks(number, 1)
    players = dict.fromkeys(env.seats, player)
    episode = asyncio.run(play_episode(env, task, players, id="e", seed=number))
    assert episode.failure is None, episode.failure
    return episode


@pytest.mark.parametrize(("game", "seats"), GAMES.items())
def test_games_are_played_to_their_end_and_are_the_same_again(game: str, seats: int) -> None:
    env = load_env(f"textarena:{game}").configure({"max_turns": 60})
    assert len(env.seats) == seats
    for number in range(3):
        first, again = play(env, number=number), play(environment_of(env.spec), number=number)
        assert (first.turns, first.scores) == (again.turns, again.scores)
        assert set(first.scores) == set(env.seats)


def test_a_game_of_tic_tac_toe() -> None:
    env = load_env("textarena:TicTacToe-v0")
    assert env.seats == ("player0", "player1")
    won = play(env, "[0]", "[3]", "1", "[4]", "I take [2]!")
    assert won.scores == {
        "player0": {"reward": 1.0, "legal": 1.0},
        "player1": {"reward": -1.0, "legal": 1.0},
    }
    assert won.rewards == {"player0": 1.1, "player1": -0.9}
    first, second, third, *_ = won.turns
    assert "You are Player 0" in first.prompt[0].content
    assert "You are Player 1" in second.prompt[0].content
    assert "[3]" in third.prompt[0].content, "what the other said"
    assert "You are Player" not in third.prompt[0].content, "only what is new"


def test_illegal_moves_lose() -> None:
    lost = play(load_env("textarena:TicTacToe-v0"), "[0]", *["[0]"] * 9)
    assert lost.scores["player1"]["legal"] == 0.0
    assert lost.scores["player1"]["reward"] == -1.0


def test_a_game_that_is_broken_off() -> None:
    env = load_env("textarena:TicTacToe-v0").configure({"max_turns": 2})
    episode = play(env, "[0]", "[1]")
    assert [scores["reward"] for scores in episode.scores.values()] == [0.0, 0.0]


def test_checks() -> None:
    for game in ("KuhnPoker-v0", "2048-v0-easy"):
        assert check_env(load_env(f"textarena:{game}"), {"max_turns": 40}) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("TicTacTo-v0", "there is no such game. Did you mean 'TicTacToe-v0'"),
        ("TicTacToe-v0@3", "cannot be played with 3 seats here: .*received 3"),
        ("TicTacToe-v0@many", "give 1 to 15 seats, as TicTacToe-v0@2"),
        ("Debate-v0", "cannot be played here: .*API key"),
        ("Wordle-v0", "Some games need data that is downloaded first"),
    ],
)
def test_what_cannot_be_played_says_why(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nltk.data.path", [])  # its word lists, wherever this runs
    monkeypatch.setattr("nltk.download", lambda *_, **__: False)
    with pytest.raises(ConfigError, match=what) as refused:
        load_env(f"textarena:{name}")
    assert len(str(refused.value)) < 600


def test_every_other_game_begins_or_says_why() -> None:
    games = sorted(game.removesuffix("-raw") for game in ENV_REGISTRY if game.endswith("-raw"))
    refused = {}
    for game in games[::9]:
        try:
            load_env(f"textarena:{game}")
        except ConfigError as error:
            refused[game] = str(error)
    assert len(refused) < len(games[::9]) / 2
    for game, why in refused.items():
        assert f"env.name=textarena:{game}: it cannot be played here" in why
