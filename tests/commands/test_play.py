from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from rayrl import load_env
from rayrl.cli import compose
from rayrl.commands import env_check
from rayrl.commands.play import outcome, play, run, seats_for
from rayrl.config import Config, from_dict
from rayrl.errors import ConfigError
from rayrl.rollout.players import player_function
from rayrl.types import Episode, Task


def config(env: str = "tictactoe", seat: str = "", seats: dict[str, str] | None = None) -> Config:
    return from_dict(
        {
            "env": {"name": env, "seats": seats or {}, "args": {"random_min": 1.0}},
            "play": {"seat": seat, "episodes": 2},
        }
    )


def console() -> Console:
    return Console(width=100, file=io.StringIO(), color_system=None)


def typed(*lines: str) -> Iterator[str]:
    while True:
        yield from lines


def shown(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


async def test_watching_shows_both_sides_and_the_scores() -> None:
    screen = console()
    played = await play(config(seats={"agent": "player:teacher"}), screen)
    assert len(played) == 2
    assert played[0].task != played[1].task
    text = shown(screen)
    assert "Your turn." in text
    assert "agent ▸ <think>" in text
    assert "reward" in text
    assert text.count("episode ") == 2
    assert text.count("task: first ") == 2
    assert text.count("You play tic-tac-toe") == 2  # once an episode, not again with its task


async def test_a_person_types_a_move_and_it_is_put_into_its_form() -> None:
    lines = typed(*[f" {cell} " for cell in range(9)])
    screen = console()
    played = await play(config(seat="agent"), screen, read=lambda prompt: next(lines))
    assert [e.failure for e in played] == [None, None]
    assert played[0].turns[0].text == "<think></think><move>0</move>"
    assert played[0].scores["agent"]["format"] == 1.0
    assert "Your turn." in shown(screen)


NUMBERS = """
import rayrl
from rayrl import Task, group_reward

def first(episodes):
    return [2.0] * len(episodes)

@rayrl.env(tasks=[Task()], rewards={"reward": 0.5, "first": group_reward(first, weight=3.0)})
async def number(task, agent):
    return {"reward": float(await agent("A number?"))}
"""


def test_a_groups_rewards_and_a_score_called_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the end of the input, which ends the command."""
    (tmp_path / "numbers.py").write_text(NUMBERS)
    monkeypatch.setattr("sys.stdin", io.StringIO("4\n"))
    settings = [f"env.name={tmp_path}/numbers.py", "play.seat=agent", "play.episodes=2"]
    run(compose(settings))
    out = capsys.readouterr().out
    assert "score/reward 4  first 2  reward 8" in out
    assert out.endswith("The input has ended.\n")
    with pytest.raises(ConfigError, match=r"eval\.player=teacher: .* 'number' has no players"):
        player_function(load_env(f"{tmp_path}/numbers.py"), "eval.player", "teacher")
    env_check.run(compose(settings[:1]))
    assert "rewards {'reward': 0.5, 'first': 3.0}" in capsys.readouterr().out


async def test_another_environment_hears_what_was_typed() -> None:
    words = [task.word for task in load_env("copyword").tasks(0, 1)]  # type: ignore[attr-defined]
    cfg = compose(["env.name=copyword", "play.seat=agent"])
    played = await play(cfg, console(), read=lambda prompt: words[0])
    assert played[0].turns[0].text == words[0]
    played = await play(
        compose(["env.name=copyword", "play.seat=agent", "play.form='<{}>'"]),
        console(),
        read=lambda prompt: words[0],
    )
    assert played[0].turns[0].text == f"<{words[0]}>"


async def test_a_person_sees_only_their_own_side() -> None:
    lines = typed(*"012345678")
    screen = console()
    cfg = config("tictactoe_versus", seat="o", seats={"x": "player:teacher"})
    played = await play(cfg, screen, read=lambda prompt: next(lines))
    assert {turn.seat for turn in played[0].turns} == {"x", "o"}
    text = shown(screen)
    assert "Opponent (O) played" in text
    assert "<think>" not in text.replace("<think>reasoning</think>", "")  # its thoughts are its own


def test_who_plays_the_other_seats() -> None:
    env = load_env("tictactoe_versus")
    assert seats_for(env, config("tictactoe_versus")) == {"x": "policy", "o": "policy"}
    assert seats_for(env, config("tictactoe_versus", seat="o")) == {"x": "policy"}
    with pytest.raises(ConfigError, match=r"play.seat=xx: .*Did you mean 'x'\? It has: x, o"):
        seats_for(env, config("tictactoe_versus", seat="xx"))


async def test_the_last_board_and_who_won_are_shown() -> None:
    lines = typed(*"012345678")
    screen = console()
    cfg = config("tictactoe_versus", seat="o", seats={"x": "player:optimal"})
    played = await play(cfg, screen, read=lambda prompt: next(lines))
    words = {1.0: "you won.", 0.5: "a draw.", 0.0: "you lost."}
    env = load_env("tictactoe_versus")
    assert env.ending_function is not None
    for episode in played:
        board = env.ending_function(episode, "o")
        assert f"{board}\n{words[episode.scores['o']['win']]}\n" in shown(screen)
        lost = episode.scores["o"]["win"] == 0
        assert not lost or board.count("O") >= 3  # the rival is O to each seat


async def test_the_last_board_is_that_of_the_game() -> None:
    cfg = config(seats={"agent": "player:optimal"})
    env = load_env("tictactoe").configure(cfg.env.args)
    assert env.ending_function is not None
    for episode in await play(cfg, console()):
        board = env.ending_function(episode, "agent")
        last = episode.turns[-1]
        before = last.prompt[-1].content
        assert board.count("X") >= before.count("X", before.index("\n"))
        if episode.scores["agent"]["win"] == 1:  # its own move ended the game
            assert last.text.split("<move>")[1][0] not in board.split()


async def test_who_watches_is_told_who_won() -> None:
    screen = console()
    played = await play(config(seats={"agent": "player:random"}), screen)
    text = shown(screen)
    names = {1.0: "agent won.", 0.5: "a draw.", 0.0: "agent lost."}
    for episode in played:
        assert names[episode.scores["agent"]["win"]] in text


def ended(**scores: dict[str, float]) -> Episode:
    rewards = dict.fromkeys(scores, 0.0)
    return Episode("e", "env", Task(seed=0), 0, (), scores, rewards)


@pytest.mark.parametrize(
    ("scores", "reported", "mine", "said"),
    [
        ({"x": {"win": 1.0}, "o": {"win": 0.0}}, {}, "o", ["you lost."]),
        ({"x": {"win": 1.0}, "o": {"win": 0.0}}, {}, "", ["x won.", "o lost."]),
        ({"x": {"win": 0.5}, "o": {"win": 0.5}}, {}, "x", ["a draw."]),
        ({"x": {"win": 3}, "y": {"win": 3}, "z": {"win": 1}}, {}, "y", ["you won."]),
        ({"agent": {"win": 0.0}}, {}, "agent", ["you lost."]),
        ({"agent": {"win": 1.0}}, {}, "", ["agent won."]),
        ({"agent": {"win": 0.3}}, {}, "agent", []),
        ({"agent": {"win": 0.0}}, {"win/draw/loss": "draw"}, "agent", ["a draw."]),
        ({"agent": {"x": 0.0}}, {"solved/lost": "solved"}, "agent", ["you: solved."]),
        ({"agent": {"right": 1.0}}, {"right %": True}, "agent", []),
        ({"a": {"right": 1.0}, "b": {"right": 0.0}}, {}, "a", []),
    ],
)
def test_who_won(
    scores: dict[str, dict[str, float]], reported: dict[str, str], mine: str, said: list[str]
) -> None:
    env = load_env("copyword").configure()
    env.statistics_function = (lambda episode: reported) if reported else None
    assert outcome(env, ended(**scores), mine) == said


async def test_a_failure_is_shown() -> None:
    def broken(prompt: str) -> str:
        raise OSError("no terminal")

    screen = console()
    played = await play(config(seat="agent"), screen, read=broken)
    assert played[0].failure is not None
    assert "no terminal" in shown(screen)
