from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import ConfigError, EnvError, Scores, Task
from rayrl.environment.environment import EnvSpec
from rayrl.environment.registry import environment_of, installed_schemes, reference_of
from rayrl.rollout.agent import Agent
from rayrl.rollout.subprocess_env import SubprocessEnv
from rayrl.types import derive_seed


@dataclass(frozen=True, kw_only=True)
class Level(Task):
    u: float
    hard: float = 0.0
    span: tuple[float, float] = (0.0, 1.0)


def levels(seed: int, u: float, hard: float = 0.5, span: tuple[float, float] = (0, 1)) -> Level:
    return Level(seed=seed, u=u, hard=hard, span=span)


@rayrl.env(tasks=levels, rewards={"win": 1.0, "format": 0.2})
async def game(task: Level, agent: Agent) -> Scores:
    return {"win": 1.0, "format": float(await agent("?") == "x")}


@rayrl.env(tasks=levels, rewards={"win": 1.0})
async def duel(task: Level, x: Agent, o: Agent) -> Scores:
    return {"x": {"win": 1.0}, "o": {"win": 0.0}}


def test_the_decorator_reads_the_coroutine() -> None:
    assert (game.name, game.seats) == ("game", ("agent",))
    assert duel.seats == ("x", "o")
    assert game.args == {"hard": 0.5, "span": (0, 1)}
    assert game.spec == EnvSpec(f"{__name__}:game", {}, {})


@pytest.mark.parametrize("n", [1, 3, 16])
def test_tasks_are_stratified_and_seeded(n: int) -> None:
    tasks = game.tasks(seed=7, n=n)
    assert [int(task.u * n) for task in tasks] == list(range(n))  # one in each stratum
    assert [task.seed for task in tasks] == [derive_seed(7, "task", k) for k in range(n)]
    assert tasks == game.tasks(seed=7, n=n)
    assert tasks != game.tasks(seed=8, n=n)
    later = game.tasks(seed=7, n=n, start=n)
    assert [int(task.u * n) for task in later] == list(range(n))
    assert not {task.seed for task in tasks} & {task.seed for task in later}


def test_u_never_reaches_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.Random.random", lambda self: math.nextafter(1.0, 0.0))
    tasks = game.tasks(seed=0, n=3)
    assert all(0 <= task.u < 1 for task in tasks)


def test_a_sequence_of_tasks_is_drawn_by_quantile() -> None:
    many = [Level(u=0, seed=k) for k in range(4)]

    @rayrl.env(tasks=many, rewards={"win": 1.0})
    async def listed(task: Level, agent: Agent) -> Scores:
        return {"win": 0.0}

    assert listed.tasks(seed=0, n=4) == many
    assert [task.seed // 2 for task in listed.tasks(seed=1, n=2)] == [0, 1]
    with pytest.raises(ConfigError, match="no such setting"):
        listed.configure({"hard": 1})


def test_configure_returns_a_new_environment() -> None:
    new = game.configure({"hard": 1, "span": [0.2, 0.7]}, {"format": 0.1})
    assert new.args == {"hard": 1.0, "span": (0.2, 0.7)}
    assert new.tasks(0, 1)[0].span == (0.2, 0.7)
    assert new.reward({"win": 1.0, "format": 1.0}) == pytest.approx(1.1)
    assert game.reward({"win": 1.0, "format": 1.0}) == pytest.approx(1.2)
    assert game.args["hard"] == 0.5
    again = game.configure(*(new.spec.args, new.spec.rewards))
    assert (again.args, again.rewards) == (new.args, new.rewards)


@pytest.mark.parametrize(
    ("args", "made"),
    [
        ({"make.size": 3}, {"size": 3}),
        ({"make.map.wide": 3, "make.map.deep": 4}, {"size": 1, "map": {"wide": 3, "deep": 4}}),
        ({"make": {"a": 1}, "make.b": 2}, {"a": 1, "b": 2}),
        ({"make.b": 2, "make": {"a": 1}}, {"a": 1}),
        ({"more.a": 1}, {"size": 1}),
    ],
)
def test_a_key_of_a_mapping_is_set_by_itself(args: Any, made: Any) -> None:
    def source(
        seed: int,
        u: float,
        make: dict[str, Any] = {"size": 1},  # noqa: B006
        more: dict[str, Any] | None = None,
        tries: int = 1,
    ) -> Task:
        return Task(seed=seed)

    @rayrl.env(tasks=source, rewards={"win": 1.0})
    async def made_of(task: Task, agent: Agent) -> Scores:
        return {"win": 0.0}

    new = made_of.configure(args)
    assert new.args == {"make": made, "more": {"a": 1} if "more.a" in args else None, "tries": 1}
    assert made_of.configure(new.spec.args).args == new.args
    with pytest.raises(ConfigError, match=r"env\.args\.tries.*expected int, got \{'a': 1\}"):
        made_of.configure({"tries.a": 1})
    with pytest.raises(ConfigError, match=r"env\.args\.mkae\.a: .*no such setting.*'make'"):
        made_of.configure({"mkae.a": 1})


@pytest.mark.parametrize(
    ("args", "rewards", "said"),
    [
        ({"hrad": 1}, {}, "env.args.hrad.*Did you mean 'hard'"),
        ({"hard": "high"}, {}, "env.args.hard.*expected float, got 'high'"),
        ({"seed": 1}, {}, "env.args.seed"),
        ({}, {"wins": 1.0}, "env.rewards.wins.*Did you mean 'win'"),
        ({}, {"win": float("nan")}, "env.rewards.win: a weight must be a finite number"),
        ({}, {"win": "1"}, "env.rewards.win: a weight must be a finite number"),
    ],
)
def test_configure_names_what_is_wrong(args: Any, rewards: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        game.configure(args, rewards)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned None: it must return its scores"),
        ({"win": 1.0}, "no score 'format'"),
        ({"win": 1.0, "format": 1.0, "formt": 0.0}, "undeclared score 'formt'.*mean 'format'"),
        ({"win": math.nan, "format": 0.0}, "nan as score 'win'.*finite"),
        ({"win": math.inf, "format": 0.0}, "inf as score 'win'.*finite"),
        ({"win": "1", "format": 0.0}, "'1' as score 'win'"),
        ({"win": None, "format": 0.0}, "None as score 'win'"),
    ],
)
def test_invalid_scores(returned: Any, said: str) -> None:
    with pytest.raises(EnvError, match=said):
        game.scores(returned)


def test_a_group_reward_is_not_returned() -> None:
    rank = rayrl.group_reward(lambda episodes: [0.0] * len(episodes))
    ranked = rayrl.env(tasks=levels, rewards={"win": 1.0, "rank": rank}, name="ranked")(game.play)
    with pytest.raises(EnvError, match=r"'rank', which is a reward over the group: .*leave it out"):
        ranked.scores({"win": 1.0, "rank": 0.0})


def test_scores_of_seats() -> None:
    assert game.scores({"win": True, "format": 0}) == {"agent": {"win": 1.0, "format": 0.0}}
    assert duel.scores({"x": {"win": 1}, "o": {"win": 0}}) == {"x": {"win": 1.0}, "o": {"win": 0.0}}
    with pytest.raises(EnvError, match="no seat 'o'"):
        duel.scores({"x": {"win": 1.0}})
    with pytest.raises(EnvError, match="no score 'win' for seat 'o'"):
        duel.scores({"x": {"win": 1.0}, "o": {}})
    with pytest.raises(EnvError, match="undeclared seat 'win'"):
        duel.scores({"win": 1.0})


def test_invalid_environments() -> None:
    with pytest.raises(ConfigError, match="async def"):

        @rayrl.env(tasks=levels, rewards={})
        def sync(task: Task, agent: Agent) -> Any:
            return {}

    with pytest.raises(ConfigError, match="an agent for each seat"):

        @rayrl.env(tasks=levels, rewards={})
        async def alone(task: Task) -> Any:
            return {}

    with pytest.raises(ConfigError, match=r"form='<move>' of environment 'game': put \{\}"):
        rayrl.env(tasks=levels, rewards={}, form="<move>", name="game")(game.play)
    with pytest.raises(ConfigError, match="`seed` and `u`"):
        rayrl.env(tasks=lambda seed: Task(), rewards={})(game.play)
    with pytest.raises(ConfigError, match="`tasks` is empty"):
        rayrl.env(tasks=[], rewards={})(game.play)


def test_a_source_that_fails_is_named() -> None:
    def broken(seed: int, u: float) -> Task:
        raise ValueError("no dictionary")

    def wrong(seed: int, u: float) -> Any:
        return {"seed": seed}

    with pytest.raises(EnvError, match="'game' raised ValueError: no dictionary"):
        rayrl.env(tasks=broken, rewards={"win": 1})(game.play).tasks(0, 1)
    with pytest.raises(EnvError, match=r"must return a rayrl\.Task"):
        rayrl.env(tasks=wrong, rewards={"win": 1})(game.play).tasks(0, 1)


def test_a_setting_that_the_source_rejects_keeps_its_message() -> None:
    def strict(seed: int, u: float, hard: float = 2.0) -> Level:
        raise ConfigError(f"env.args.hard={hard}: must be at most 1.")

    refusing = rayrl.env(tasks=strict, rewards={"win": 1.0}, name="strict")(game.play)
    with pytest.raises(ConfigError, match=r"^env\.args\.hard=2\.0: must be at most 1\.$"):
        refusing.tasks(0, 1)


def test_seats_may_depend_on_settings() -> None:
    def tasks(seed: int, u: float, players: int = 2, prefix: str = "p") -> Task:
        return Task(seed=seed)

    def seats(players: int, prefix: str) -> list[str]:
        return [f"{prefix}{number}" for number in range(players)]

    async def around(task: Task, *agents: Any) -> Scores:
        return {agent.seat: {"n": len(agents)} for agent in agents}

    env = rayrl.env(tasks=tasks, rewards={"n": 1.0}, seats=seats)(around)
    assert env.seats == ("p0", "p1")
    four = env.configure({"players": 4}).configure({"prefix": "seat"})
    assert four.seats == ("seat0", "seat1", "seat2", "seat3")
    assert env.seats == ("p0", "p1")
    assert four.evaluation(0.1).training(0.1).labelled("x").seats == four.seats
    with pytest.raises(ConfigError, match=r"seats=\['a-0', 'a-1'\]: give one or more different"):
        env.configure({"prefix": "a-"})
    with pytest.raises(ConfigError, match=r"seats=\[\]"):
        env.configure({"players": 0})
    fixed = rayrl.env(tasks=tasks, rewards={"n": 1.0}, seats=("x", "o"))(around)
    assert fixed.configure({"players": 3}).seats == ("x", "o")

    def needed(seed: int, u: float, players: int, prefix: str = "p") -> Task:
        return Task(seed=seed)

    late = rayrl.env(tasks=needed, rewards={"n": 1.0}, seats=seats)(around)
    assert late.configure({"players": 1}).seats == ("p0",)


def test_two_players_of_one_name() -> None:
    env = rayrl.env(tasks=levels, rewards={"win": 1})(game.play)
    env.player("teacher")(lambda messages, rng: "a")
    with pytest.raises(ConfigError, match="two players called 'teacher'"):
        env.player("teacher")(lambda messages, rng: "b")


class Guess:
    """A reset/step environment: guess the task's number."""

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.target, self.tries, self.closed = seed % 3, 0, False
        assert options["task"].seed == seed
        return "guess 0 to 2", {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.tries += 1
        hit = action == str(self.target)
        return (
            "again",
            1.0 if hit else -0.25,
            hit,
            self.tries == 3,
            {"scores": {"tries": self.tries}},
        )


async def test_gymnasium_adapter() -> None:
    env = rayrl.from_gymnasium(Guess, tasks=[Task(seed=1)], rewards={"tries": 0.0}, name="guess")
    replies = iter(["0", "1"])

    def player(messages: Sequence[rayrl.Message], rng: Any) -> str:
        return next(replies)

    episode = await rayrl.play_episode(
        env, env.tasks(0, 1)[0], {"agent": rayrl.ScriptedPlayer(player)}, id="e"
    )
    assert episode.failure is None
    assert episode.scores == {"agent": {"reward": 0.75, "tries": 2.0}}
    assert episode.rewards == {"agent": 0.75}
    assert [turn.prompt[0].content for turn in episode.turns] == ["guess 0 to 2", "again"]


async def test_an_environment_that_nothing_finds_travels_by_value() -> None:
    guessing = rayrl.from_gymnasium(Guess, tasks=[Task(seed=1)], rewards={"tries": 0.0})
    async with SubprocessEnv(guessing, slots=1) as env:
        player = rayrl.ScriptedPlayer(lambda messages, rng: "1")
        episode = await rayrl.play_episode(env, Task(seed=1), {"agent": player}, id="e")
    assert episode.failure is None
    assert episode.scores == {"agent": {"reward": 1.0, "tries": 1.0}}


FILE = """
    from dataclasses import dataclass
    import rayrl

    @dataclass(frozen=True, kw_only=True)
    class Word(rayrl.Task):
        word: str = "a"

    def words(seed: int, u: float, word: str = "a") -> Word:
        return Word(seed=seed, word=word)

    @rayrl.env(tasks=words, rewards={"right": 1.0})
    async def echo(task, agent):
        return {"right": float(await agent(task.word) == task.word)}
"""


def test_load_env_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "echo_env.py"
    path.write_text(textwrap.dedent(FILE))
    env = rayrl.load_env(str(path))
    assert env.name == "echo"
    assert rayrl.load_env(f"{path}:echo") is env
    assert rayrl.load_env(env.ref) is env
    with pytest.raises(ConfigError, match=r"no 'ecko'.*Did you mean 'echo'"):
        rayrl.load_env(f"{path}:ecko")
    with pytest.raises(ConfigError, match=r"there is no file.*Did you mean 'echo_env\.py'"):
        rayrl.load_env(str(tmp_path / "echo_emv.py"))
    path2 = tmp_path / "broken.py"
    path2.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        rayrl.load_env(str(path2))


def test_load_env_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_envs.py").write_text(textwrap.dedent(FILE))
    monkeypatch.syspath_prepend(tmp_path)
    env = rayrl.load_env("some_envs:echo")
    assert env.spec.ref == "some_envs:echo"
    with pytest.raises(ConfigError, match="not an environment"):
        rayrl.load_env("some_envs:words")
    with pytest.raises(ConfigError, match="could not be imported"):
        rayrl.load_env("no_such_module:echo")
    del sys.modules["some_envs"]


def test_a_scheme_is_an_entry_point_and_its_library_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = textwrap.dedent(FILE)
    text += "\n\ndef load(id):\n    echo.id = id\n    return echo\n"
    text += "\n\ndef broken(id):\n    return {}[id] if id else words\n"
    (tmp_path / "zz_scheme.py").write_text(text)
    info = tmp_path / "zz_scheme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zz-scheme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[rayrl.env_schemes]\nzz = zz_scheme:load\nyy = zz_not_there:load [yy]\n"
        "xx = zz_scheme:broken\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"gymnasium", "reasoning_gym", "yy", "zz"} <= set(installed_schemes())
    name = "zz:http://host:8000/a.b"  # an ID may have what it likes
    env = rayrl.load_env(name)
    assert (env.ref, env.id) == (name, "http://host:8000/a.b")  # type: ignore[attr-defined]
    assert reference_of(env) == name
    assert environment_of(env.spec).ref == name
    with pytest.raises(ConfigError, match=r"could not be imported .*pip install 'zz-scheme\[yy\]'"):
        rayrl.load_env("yy:game")
    with pytest.raises(ConfigError, match="not an environment"):
        rayrl.load_env("xx:")
    with pytest.raises(ConfigError, match=r"'xx:game': the scheme xx raised KeyError"):
        rayrl.load_env("xx:game")
    with pytest.raises(ConfigError, match=r"SCHEME:ID with one of the schemes gymnasium"):
        rayrl.load_env("game")
    with pytest.raises(ConfigError, match="Did you mean 'gymnasium'"):
        rayrl.load_env("gymnasum:FrozenLake-v1")
    del sys.modules["zz_scheme"]


def test_an_unknown_name_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrl.environment.registry.installed_envs", lambda: ["tictactoe"])
    with pytest.raises(ConfigError, match="Did you mean 'tictactoe'"):
        rayrl.load_env("tictacto")


def test_public_names() -> None:
    exported = {name for name in vars(rayrl) if not name.startswith("_")}
    for name in rayrl.__all__:
        assert getattr(rayrl, name) is not None
    assert list(rayrl.__all__) == sorted(rayrl.__all__)
    modules = {name for name in exported if type(getattr(rayrl, name)).__name__ == "module"}
    assert exported - modules - {"annotations", "Any", "TYPE_CHECKING"} <= set(rayrl.__all__)
