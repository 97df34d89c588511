from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rayrl import load_env
from rayrl.chat.renderer import Chat
from rayrl.cluster.open import make_environment
from rayrl.commands import replay, synth
from rayrl.commands.sft import load_rows
from rayrl.commands.synth import Lengths, kept, samples, statistics_of, summary
from rayrl.config import Config, ReplayConfig, SftConfig, from_dict, to_dict
from rayrl.config.mix import components
from rayrl.errors import ConfigError, RunFailed
from rayrl.rollout.episode_io import read_episodes
from rayrl.types import Episode, Failure, Task, Turn, user
from rayrl.weights.model_dir import model_dir
from tests.here import killing
from tests.rollout.test_endpoint import said, serving


def episode(name: str, win: float, *replies: str, format: float = 1.0) -> Episode:  # noqa: A002
    turns = tuple(Turn("agent", (user("go"),), text, "stop") for text in replies)
    scores = {"agent": {"win": win, "format": format}}
    return Episode(name, "game", Task(), 0, turns, scores, {"agent": win})


FAILED = Episode("f", "game", Task(), 0, (), failure=Failure("env", "broke"))


def test_kept_are_those_at_or_above_every_least_score() -> None:
    played = [episode("a", 1), episode("b", 0.5), episode("c", 1, format=0.5), FAILED]
    least = {"win": 1.0, "format": 1.0}
    assert [e.id for e in kept(played, least)] == ["a"]
    assert [e.id for e in kept(played, {"win": 0.5})] == ["a", "b", "c"]
    assert [e.id for e in kept(played, {})] == ["a", "b", "c"]


def test_with_several_seats_a_score_counts_for_each_or_for_one() -> None:
    both = replace(episode("a", 1), scores={"x": {"win": 1.0}, "o": {"win": 0.0}})
    assert kept([both], {"win": 1.0}) == []
    assert kept([both], {"x.win": 1.0}) == [both]


def test_an_episode_without_a_score_that_others_have_is_not_kept() -> None:
    used = replace(episode("b", 1), scores={"agent": {"win": 1.0, "tool_calls": 2.0}})
    assert kept([episode("a", 1), used], {"tool_calls": 1}) == [used]


def test_an_unknown_score_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"synth.keep.wins=1.*Did you mean 'win'"):
        kept([episode("a", 1)], {"wins": 1})


def test_statistics_see_tics_through_numbers() -> None:
    found = statistics_of(
        [episode("a", 1, "I take 4.", "I take 12."), episode("b", 1, "I take 0.", "Hm.")]
    )
    assert found.common == (("I take #.", 3), ("Hm.", 1))
    assert (found.distinct, found.replies) == (2, 4)
    assert found.turns == Lengths(2, 2, 2)
    assert found.characters == Lengths(9, 9, 10)  # 3, 9, 9, 10


def test_samples_come_from_the_whole_range() -> None:
    played = [episode(str(i), 1) for i in range(10)]
    assert [e.id for e in samples(played, 2)] == ["2", "7"]
    assert [e.id for e in samples(played, 100)] == [str(i) for i in range(10)]
    assert samples([], 3) == []


def test_the_summary_shows_both_sets_and_no_markup_of_the_model() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    played = [episode("a", 1, "[bold]hi[/bold]"), episode("b", 0, "no"), FAILED]
    console.print(summary(played, played[:1], load_env("copyword")))
    text = console.export_text()
    assert "3 episodes played, 1 failed, 1 kept (33.3%)" in text
    assert "[bold]hi[/bold]" in text
    assert "0.500" in text  # mean win of those played


def config(folder: Path, **of_synth: object) -> Config:
    return from_dict(
        {
            "run": {"dir": str(folder)},
            "env": {"name": "tictactoe"},
            "synth": {"episodes": 20, "show": 1, **of_synth},
        }
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Play in this process, as env workers would; counts how often."""
    from contextlib import asynccontextmanager

    from rayrl.cluster.rollouts import CollectedGroups
    from rayrl.rollout.players import ScriptedPlayer
    from rayrl.rollout.rollout import play_groups

    opened = []

    class Here:
        def __init__(self, cfg: Config, seats: dict[str, dict[str, str]]) -> None:
            self.env = load_env(cfg.env.name).configure(cfg.env.args, cfg.env.rewards)
            names = {seat: who.removeprefix("player:") for seat, who in seats[""].items()}
            self.players = {s: ScriptedPlayer(self.env.players[n]) for s, n in names.items()}

        async def collect(self, plans, on_group, known):  # type: ignore[no-untyped-def]
            groups = dict(known)
            missing = [plan for plan in plans if plan.id not in known]
            async for group in play_groups(self.env, missing, self.players, concurrency=8):
                groups[group.id] = group
                on_group(group)
            return CollectedGroups(tuple(groups[plan.id] for plan in plans))

    @asynccontextmanager
    async def open_here(cfg, *, seats, setting):  # type: ignore[no-untyped-def]
        opened.append(1)
        yield Here(cfg, seats)

    monkeypatch.setattr(synth, "open_rollouts", open_here)
    return opened


def test_a_run_writes_what_it_kept_and_is_not_run_again(
    tmp_path: Path, in_process: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path / "run", keep={"win": 0.5, "format": 1.0})
    synth.run(cfg)
    first = (tmp_path / "run" / "episodes.jsonl").read_bytes()
    episodes = list(read_episodes(tmp_path / "run" / "episodes.jsonl"))
    everything = list(read_episodes(tmp_path / "run" / "played.jsonl"))
    assert len(everything) == 20
    assert episodes == [e for e in everything if e.scores["agent"]["win"] >= 0.5]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["kept"] == len(episodes)
    shown = capsys.readouterr().out
    assert "win/draw/loss" in shown
    assert "<think>X: " in shown

    synth.run(cfg)
    assert len(in_process) == 1
    again = config(tmp_path / "again", keep={"win": 0.5, "format": 1.0})
    synth.run(again)
    times = {"began": 0, "seconds": 0}
    lines = [json.loads(line) | times for line in first.splitlines()]
    other = (tmp_path / "again" / "episodes.jsonl").read_bytes()
    assert [json.loads(line) | times for line in other.splitlines()] == lines


def test_nothing_kept_says_what_there_was(tmp_path: Path, in_process: list[int]) -> None:
    cfg = config(tmp_path / "run", keep={"win": 1.5})
    with pytest.raises(RunFailed, match=r"none of 20 .*win 1\.5.*best scores were win 1.*Lower"):
        synth.run(cfg)
    assert not (tmp_path / "run" / "episodes.jsonl").exists()


async def test_episodes_that_a_server_failed_are_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synth, "open_rollouts", killing(0))
    data = {"run": {"dir": str(tmp_path)}, "env": {"name": "copyword"}}
    data["synth"] = {"episodes": 8, "player": "endpoint"}  # type: ignore[dict-item]
    busy = (503, {}, "busy")
    async with serving(busy, busy, said("<copy>no</copy>")) as server:  # alive, but busy
        data["endpoint"] = {"url": server.url, "model": "m", "retries": 0}
        await asyncio.to_thread(synth.run, from_dict(data))
        shown = capsys.readouterr().out
        assert "8 episodes played, 2 failed, 6 kept" in shown
        assert "2 episodes are missing" in shown
        assert not (tmp_path / "result.json").exists()
        await asyncio.to_thread(synth.run, from_dict(data))
        assert len(server.seen) == 8 + 2
    assert "missing" not in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["kept"] == 8
    everything = list(read_episodes(tmp_path / "played.jsonl"))
    assert [e.id for e in everything] == [f"synth-{k}/0" for k in range(8)]
    assert list(read_episodes(tmp_path / "episodes.jsonl")) == everything


def test_a_mixture_is_played_by_weight_and_each_keeps_by_its_own_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synth, "open_rollouts", killing(0))
    mix = {
        "words": {"name": "copyword", "weight": 3, "seats": {"agent": "player:perfect"}},
        "games": {"name": "tictactoe"},
    }
    cfg = from_dict(
        {
            "run": {"dir": str(tmp_path / "run")},
            "env": {"mix": mix},
            "synth": {"player": "random", "episodes": 21, "keep": {"win": 0.5}},
        }
    )
    synth.run(cfg)
    played = list(read_episodes(tmp_path / "run" / "played.jsonl"))
    kept = list(read_episodes(tmp_path / "run" / "episodes.jsonl"))
    assert [e.env for e in played] == 16 * ["words"] + 5 * ["games"]  # 15.75 and 5.25
    assert all(e.scores["agent"]["copied"] == 1 for e in played[:16])
    won = [e for e in played[16:] if e.scores["agent"]["win"] >= 0.5]
    assert kept == [*played[:16], *won], "words has no such score"
    assert len(won) < 5
    said = capsys.readouterr().out
    assert "16 episodes played, 16 kept (100.0%)" in said
    assert f"5 episodes played, {len(won)} kept" in said

    (tmp_path / "run" / "config.yaml").write_text(json.dumps(to_dict(cfg)))
    replay.run(replace(cfg, replay=ReplayConfig(file=str(tmp_path / "run" / "played.jsonl"))))
    assert "│   21 │                  0 │" in capsys.readouterr().out
    other = from_dict({"env": {"mix": {**mix, "games": {"name": "copyword"}}}})
    del other.env.mix["games"]
    other.env.mix["boards"] = {"name": "tictactoe"}
    with pytest.raises(ConfigError, match=r"has episodes of games, not of 'words' or 'boards'"):
        replay.stored_episodes(
            tmp_path / "run" / "played.jsonl",
            {name: make_environment(own, name) for name, own in components(other).items()},
        )
    learned = replace(cfg, sft=SftConfig(data=str(tmp_path / "run" / "episodes.jsonl")))
    rows = load_rows(learned, Chat.load(str(model_dir("embedded"))))
    assert len(rows) == len(won), "the seats of words are not the policy's, so nothing is learned"
