"""The environment: tasks, the opponent's seeding, whole games, the exhaustive check."""

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from rayrl_tictactoe.board import FREE, SYSTEM, Board, best_moves
from rayrl_tictactoe.env import Game, games, opponent_move, tictactoe, unbeatable
from rayrl_tictactoe.players import read_board

from rayrl import Agent, ConfigError, Message, Reply
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import play_group

ARGS = {"max_turns": 8, "system_prompt": SYSTEM}
PlayerFunction = Callable[[Sequence[Message], random.Random], str]


class Fake:
    """An agent whose replies come from a list or a player; remembers what it was asked."""

    def __init__(self, replies: list[str] | PlayerFunction, seed: int = 0) -> None:
        self.replies = iter(replies) if isinstance(replies, list) else replies
        self.rng = random.Random(seed)
        self.asked: list[tuple[Message, ...]] = []
        self.states: list[str | None] = []

    async def __call__(self, new: Sequence[Message], *, state: str | None = None) -> Reply:
        self.asked.append(tuple(new))
        self.states.append(state)
        if callable(self.replies):
            return Reply(self.replies(new, self.rng))
        return Reply(next(self.replies))


def game(**changes: object) -> Game:
    return replace(games(seed=1, u=0.0), first="X", **changes)  # type: ignore[arg-type]


def say(cell: int) -> str:
    return f"<think>ok</think><move>{cell}</move>"


# --- tasks -----------------------------------------------------------------------------------


def test_randomness_is_u_of_the_way_through_the_range() -> None:
    assert games(seed=0, u=0.0, random_min=0.2, random_max=0.7).random_move_prob == 0.2
    assert games(seed=0, u=0.5, random_min=0.2, random_max=0.7).random_move_prob == pytest.approx(
        0.45
    )
    assert games(seed=0, u=0.5, random_min=1.0).random_move_prob == 1.0


def test_a_batch_covers_the_range_evenly() -> None:
    env = tictactoe.configure({"random_min": 0.2, "random_max": 0.7})
    probs = [task.random_move_prob for task in env.tasks(seed=3, n=10)]  # type: ignore[attr-defined]
    assert probs == sorted(probs)
    for k, prob in enumerate(probs):  # one in each tenth
        assert 0.2 + 0.05 * k <= prob < 0.2 + 0.05 * (k + 1)


def test_half_of_the_games_are_started_by_each_side() -> None:
    firsts = [games(seed=seed, u=0.5).first for seed in range(2000)]
    assert set(firsts) == {"X", "O"}
    assert firsts.count("X") == pytest.approx(1000, abs=90)  # four standard deviations
    assert games(seed=7, u=0.1).first == games(seed=7, u=0.9).first


@pytest.mark.parametrize(
    "args",
    [{"random_min": 0.7, "random_max": 0.2}, {"random_max": 1.5}, {"random_min": -0.1}],
)
def test_an_impossible_range_names_both_values_and_the_remedy(args: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"random_min=.*random_max=.*choose 0 <="):
        games(seed=0, u=0.0, **args)


def test_no_turns_is_an_error() -> None:
    with pytest.raises(ConfigError, match="max_turns=0"):
        games(seed=0, u=0.0, max_turns=0)


def test_settings_and_weights_are_config() -> None:
    env = tictactoe.configure({"max_turns": 7, "system_prompt": "Play!"}, {"format": 0.1})
    task = env.tasks(seed=0, n=1)[0]
    assert isinstance(task, Game)
    assert (task.max_turns, task.system_prompt) == (7, "Play!")
    assert env.rewards == {"win": 1.0, "format": 0.1, "invalid": 1.0}
    with pytest.raises(ConfigError, match="max_turns"):
        tictactoe.configure({"max_turn": 7})


# --- the opponent ------------------------------------------------------------------------------


def test_the_opponent_repeats_its_move_within_a_task() -> None:
    for prob in (0.0, 0.5, 1.0):
        task = game(random_move_prob=prob)
        for key in (FREE * 9, "X........", "X...O...X"):
            assert len({opponent_move(task, key) for _ in range(20)}) == 1


def test_other_tasks_and_boards_get_other_draws() -> None:
    task = game(random_move_prob=1.0)
    moves = [opponent_move(replace(task, seed=seed), "X........") for seed in range(400)]
    assert set(moves) == set(range(1, 9))
    same_free = ["XO.......", "OX......."]
    pairs = {
        tuple(opponent_move(replace(task, seed=s), key) for key in same_free) for s in range(99)
    }
    assert any(a != b for a, b in pairs)


def test_the_perfect_opponent_uses_all_of_its_best_moves_and_no_other() -> None:
    task = game(random_move_prob=0.0)
    moves = [opponent_move(replace(task, seed=seed), "....X....") for seed in range(400)]
    assert {cell: moves.count(cell) for cell in set(moves)} == {
        cell: pytest.approx(100, abs=36) for cell in best_moves("....X....", "O")
    }


def test_random_move_prob_is_how_often_it_plays_any_cell() -> None:
    # Only cell 4 holds against a corner; a random move finds it once in eight.
    task = game(random_move_prob=0.4)
    moves = [opponent_move(replace(task, seed=seed), "X........") for seed in range(4000)]
    assert moves.count(4) / 4000 == pytest.approx(0.6 + 0.4 / 8, abs=0.03)


# --- games -------------------------------------------------------------------------------------


async def test_only_the_first_call_has_the_system_prompt() -> None:
    agent = Fake(tictactoe.players["optimal"])
    task = game(random_move_prob=0.0, system_prompt="Rules.")
    scores = await tictactoe(task, agent)
    assert scores == {"win": 0.5, "format": 1.0, "invalid": 0.0}
    assert [m.role for m in agent.asked[0]] == ["system", "user"]
    assert agent.asked[0][0].content == "Rules."
    assert agent.asked[0][1].content.startswith("Game started. You are X.\n---------\n0 | 1 | 2\n")
    assert len(agent.asked) == 5
    for new in agent.asked[1:]:
        assert [m.role for m in new] == ["user"]
        assert new[0].content.startswith("Opponent (O) played at position ")


async def test_the_opponent_may_start() -> None:
    agent = Fake(tictactoe.players["optimal"])
    await tictactoe(replace(game(random_move_prob=1.0), first="O"), agent)
    assert agent.asked[0][1].content.startswith("Opponent (O) played at position ")
    state = agent.states[0]
    assert state is not None
    assert sorted(state) == sorted("O......../0")


async def test_episodes_of_a_group_that_play_alike_have_the_same_game() -> None:
    task = game(random_move_prob=0.5)
    one, two = (Fake(tictactoe.players["optimal"], seed=5) for _ in range(2))
    assert await tictactoe(task, one) == await tictactoe(task, two)
    assert one.asked == two.asked


async def test_scores_of_a_scripted_game_with_invalid_moves() -> None:
    task = game(random_move_prob=0.0)
    reply = opponent_move(task, "X........")
    assert reply == 4  # the only move that holds
    agent = Fake([say(0), say(4), "centre!", *[say(0)] * 5])
    scores = await tictactoe(task, agent)
    assert scores == {"win": 0.0, "format": 7 / 8, "invalid": -0.1}
    assert len(agent.asked) == 8
    assert agent.states == ["........./0"] + [f"X...O..../{n}" for n in range(7)]
    assert all(new[-1].content.startswith("Invalid move.") for new in agent.asked[2:])
    assert tictactoe.reward(tictactoe.scores(scores)["agent"]) == pytest.approx(0.2 * 7 / 8 - 0.1)


async def test_training_may_give_fewer_turns() -> None:
    agent = Fake(["no"] * 7)
    assert await tictactoe(game(max_turns=7), agent) == {"win": 0.0, "format": 0.0, "invalid": -0.1}


# --- the check -----------------------------------------------------------------------------------


def lowest_best(messages: Sequence[Message], rng: random.Random) -> str:
    """A perfect player that is a function of the board."""
    return say(best_moves(read_board(messages), "X")[0])


def scripted(function: PlayerFunction) -> Callable[[], Agent]:
    """Makes agents that answer by `function`, each with its own seed."""
    player, numbers = ScriptedPlayer(function), itertools.count()
    return lambda: Agent(player, episode=str(number := next(numbers)), seed=number)


def lowest(messages: Sequence[Message], rng: random.Random) -> str:
    """Always the lowest free cell."""
    free = messages[-1].content.split("Available positions: ")[1]
    return say(int(free[0]))


async def test_a_perfect_player_loses_no_line() -> None:
    counts = await unbeatable(scripted(lowest_best), ARGS)
    # Every line counted once is checked below; these are the README's numbers.
    assert counts == {"lines": 642, "losing": 0, "draws": 185, "wins": 457, "invalid": 0}


async def test_a_random_player_loses_lines() -> None:
    counts = await unbeatable(scripted(tictactoe.players["random"]), ARGS)
    assert counts["losing"] > 0
    assert counts["lines"] == counts["wins"] + counts["draws"] + counts["losing"]


def count_by_hand(key: str, mark: str) -> list[int]:
    """Wins, draws, losses of `lowest` against every reply, by plain recursion."""
    board = Board(key)
    if board.over:
        return [board.winner() == "X", board.winner() is None, board.winner() == "O"]
    cells = board.free()[:1] if mark == "X" else board.free()
    after = "O" if mark == "X" else "X"
    parts = [count_by_hand(key[:cell] + mark + key[cell + 1 :], after) for cell in cells]
    return [sum(column) for column in zip(*parts, strict=True)]


async def test_every_line_is_counted_once() -> None:
    first, second = count_by_hand(FREE * 9, "X"), count_by_hand(FREE * 9, "O")
    wins, draws, losses = (a + b for a, b in zip(first, second, strict=True))
    counts = await unbeatable(scripted(lowest), ARGS)
    assert counts == {
        "lines": wins + draws + losses,
        "losing": losses,
        "draws": draws,
        "wins": wins,
        "invalid": 0,
    }
    assert losses == 487  # of 822: the README's numbers
    assert wins + draws + losses == 822


async def test_a_player_that_never_answers_loses_each_opening_at_the_turn_limit() -> None:
    talks: list[Sequence[Message]] = []

    def mute(messages: Sequence[Message], rng: random.Random) -> str:
        talks.append(messages)
        return "no"

    counts = await unbeatable(scripted(mute), {**ARGS, "max_turns": 3, "system_prompt": "Rules."})
    # One opening when X starts, nine when O does; each is asked three times.
    assert counts == {"lines": 10, "losing": 10, "draws": 0, "wins": 0, "invalid": 10}
    assert len(talks) == 30
    assert [m.role for m in talks[-1]] == ["system", *["user", "assistant"] * 2, "user"]
    assert talks[-1][0].content == "Rules."


async def test_each_conversation_is_continued_once_and_each_depth_concurrently() -> None:
    live = most = 0
    asked: list[tuple[str, ...]] = []

    async def slow(messages: Sequence[Message], rng: random.Random) -> str:
        nonlocal live, most
        asked.append(tuple(m.content for m in messages))
        live += 1
        most = max(most, live)
        await asyncio.sleep(0)
        live -= 1
        return lowest(messages, rng)

    counts = await unbeatable(scripted(slow), ARGS)
    assert counts["lines"] == 822
    assert most > 200
    assert len(set(asked)) == len(asked)


# --- in rayrl's own loop --------------------------------------------------------------------


async def test_the_teacher_plays_a_whole_group() -> None:
    env = tictactoe.configure({"random_max": 0.0})
    player = ScriptedPlayer(env.players["teacher"])
    task = env.tasks(seed=0, n=1)[0]
    group = await play_group(env, task, {"agent": player}, id="g", size=8, seed=0)
    assert group.complete
    for episode in group.episodes:
        scores = episode.scores["agent"]
        assert scores["win"] in (0.0, 0.5)
        assert scores["format"] == 1.0
        assert episode.rewards["agent"] == pytest.approx(scores["win"] + 0.2)
        assert episode.turns[0].state.endswith("/0")
