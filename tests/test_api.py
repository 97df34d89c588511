"""The Python API without Ray: what a call's configuration is, what a run gives, event loops."""

from __future__ import annotations

import asyncio
import importlib
import json
import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import rayrl
from rayrl import Agent, Config, ConfigError, Run, Scores, Task
from rayrl.api import _blocking, configure
from rayrl.cluster.open import make_environment
from rayrl.config import from_dict
from rayrl.config.mix import components
from rayrl.environment.registry import environment_of, load_env
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.rollout.players import player_function
from rayrl.run.folder import RunDir
from rayrl.run.loggers import make_loggers
from rayrl.types import Episode, Group, Turn


@dataclass(frozen=True, kw_only=True)
class Coin(Task):
    side: str = "heads"


def coins(seed: int, u: float, *, sides: int = 2) -> Coin:
    return Coin(seed=seed, side=f"{int(u * sides)}")


def make_env() -> rayrl.Environment:
    @rayrl.env(tasks=coins, rewards={"right": 1.0})
    async def toss(task: Coin, agent: Agent) -> Scores:
        return {"right": float(await agent("?") == task.side)}

    return toss


def build(verb: str = "train", config: Config | None = None, **given: Any) -> Config:
    env, name = given.pop("env", "tictactoe"), given.pop("name", None)
    return configure(verb, config, env, name, given.pop("settings", {}))


def test_every_public_name_is_there() -> None:
    assert sorted(rayrl.__all__) == list(rayrl.__all__)
    for name in rayrl.__all__:
        assert getattr(rayrl, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = rayrl.trian  # type: ignore[attr-defined]


def test_the_run_is_named_after_environment_and_verb() -> None:
    assert build().run.dir == "runs/tictactoe-train"
    assert build(env=make_env()).run.dir == "runs/toss-train"
    assert build("eval", settings={"eval.player": "optimal"}).run.dir == (
        "runs/tictactoe-eval-optimal"
    )
    named = build(name="mine", settings={"train.steps": 3})
    assert (named.run.name, named.run.dir, named.train.steps) == ("mine", "runs/mine", 3)
    assert build(config=named, name="other").run.dir == "runs/other"
    assert build(config=from_dict({"run": {"dir": "/data/x"}}), name="other").run.dir == "/data/x"


def test_settings_are_checked_as_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"train\.stps.*Did you mean 'train\.steps'"):
        build(settings={"train.stps": 3})
    with pytest.raises(ConfigError, match=r"train\.steps='many': expected a whole number"):
        build(settings={"train.steps": "many"})
    with pytest.raises(ConfigError, match=r"train\.group_size=1: .*use 2 or more"):
        rayrl.train(env="tictactoe", settings={"train.group_size": 1})
    with pytest.raises(ConfigError, match=r"env\.name='tictacto': .*Did you mean 'tictactoe'"):
        rayrl.evaluate(env="tictacto", player="optimal")
    assert rayrl.load_config("experiment=tictactoe").env.name == "tictactoe"


def test_an_environment_is_named_or_travels_by_value() -> None:
    tictactoe = load_env("tictactoe").configure({"max_turns": 5}, {"win": 2.0})
    config = build(env=tictactoe)
    assert (config.env.name, config.env.args) == ("tictactoe", {"max_turns": 5})
    assert config.env.rewards == {"win": 2.0}

    own = make_env()
    config = build(env=own.configure({"sides": 6}))
    assert (config.env.name, config.env.args) == ("object:toss", {"sides": 6})
    assert load_env("object:toss").args == {"sides": 6}
    assert load_env("object:toss").spec.value is not None
    with pytest.raises(ConfigError, match="'object:gone' is an object that a Python program"):
        load_env("object:gone")


def test_an_environment_that_cannot_travel_says_so() -> None:
    lock = threading.Lock()

    @rayrl.env(tasks=[Task()], rewards={"right": 1.0})
    async def locked(task: Task, agent: Agent) -> Scores:
        with lock:
            return {"right": 1.0}

    with pytest.raises(ConfigError, match=r"'locked' cannot be sent.*lock.*path/to/file.py"):
        build(env=locked)


def test_only_the_environment_that_is_found_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "zz_envs.py").write_text(MODULE)
    envs = importlib.import_module("zz_envs")
    assert build(env=envs.easy).env.name == "zz_envs:easy"
    assert build(env=envs.easy.configure(rewards={"right": 3})).env.name == "zz_envs:easy"
    assert build(env=envs.hard).env.name == "object:hard", "its coroutine is that of another"
    assert load_env("object:hard").rewards == {"right": 5.0}

    @envs.easy.player("mine")
    def mine(messages: object, rng: object) -> str:
        return "1"

    assert build(env=envs.easy).env.name == "object:easy", "a player was added here"


MODULE = """
import rayrl

@rayrl.env(tasks=[rayrl.Task()], rewards={"right": 1.0})
async def easy(task, agent):
    return {"right": 1.0}

hard = rayrl.env(tasks=[rayrl.Task()], rewards={"right": 5.0}, name="hard")(easy.play)
"""


def test_what_is_no_environment_config_or_list_of_loggers_says_so() -> None:
    async def bare(task: Task, agent: Agent) -> Scores:
        return {}

    with pytest.raises(ConfigError, match=r"env=.*bare.*decorate its coroutine"):
        rayrl.train(env=bare)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"is no Config.*pass an environment as env="):
        rayrl.train(make_env())  # type: ignore[arg-type]
    for loggers in ("tensorboard", print):
        with pytest.raises(ConfigError, match=r"loggers=.*give a list"):
            make_loggers(Config(), loggers)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Jsonl.*needs arguments"):
        make_loggers(Config(), [rayrl.Jsonl])  # type: ignore[list-item]
    assert len(make_loggers(Config(), ["tensorboard"])) == 1, "it is there once"


def test_settings_win_over_what_configure_has_set() -> None:
    env = make_env().configure({"sides": 3})
    assert build(env=env).env.args == {"sides": 3}
    assert build(env=env, settings={"env.args.sides": 4}).env.args == {"sides": 4}


def test_a_folder_belongs_to_one_verb(tmp_path: Path) -> None:
    config = from_dict({"run": {"dir": str(tmp_path)}, "env": {"name": "tictactoe"}})
    with RunDir(tmp_path, config, verb="train") as folder:
        folder.log(0, {"reward": 1.0})
    with pytest.raises(ConfigError, match=r"holds a run of `rayrl train`; give this eval another"):
        rayrl.evaluate(config, player="optimal")


def test_a_cell_with_a_player_may_run_again() -> None:
    env = make_env()
    for _ in range(2):

        @env.player("p")
        def p(messages: object, rng: object) -> str:
            return "1"

    with pytest.raises(ConfigError, match="two players called 'p'"):
        env.player("p")(make_env)  # type: ignore[arg-type]


def test_functions_are_named_and_found() -> None:
    def mine(inputs: object) -> object:
        return inputs

    from rayrl.config.registry import bind, load_function

    assert bind("algo.loss", mine) == "object:mine"
    assert load_function("algo.loss", "object:mine") is mine
    with pytest.raises(ConfigError, match=r"algo\.advantage='object:mine' is an object"):
        load_function("algo.advantage", "object:mine")


def test_players_are_passed_as_objects() -> None:
    lock = threading.Lock()

    def mine(messages: object, rng: object) -> str:
        return "1"

    def locked(messages: object, rng: object) -> str:
        with lock:
            return "1"

    with pytest.raises(ConfigError, match=r"env\.seats\.agnt: .*no such seat.*'agent'"):
        rayrl.train(env="tictactoe", seats={"agnt": mine})
    with pytest.raises(ConfigError, match="no seat of 'tictactoe' is the policy"):
        rayrl.train(env="tictactoe", seats={"agent": mine})
    with pytest.raises(ConfigError, match=r"env\.seats\.agent=3: must be policy"):
        rayrl.evaluate(env="tictactoe", seats={"agent": 3})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"eval\.player: .*locked cannot be sent to other.*lock"):
        rayrl.evaluate(env="tictactoe", player=locked)
    with pytest.raises(ConfigError, match=r"env\.seats\.o: .*locked cannot be sent to other"):
        rayrl.train(env="tictactoe_versus", seats={"o": locked})


# --- tasks of training and of evaluation ----------------------------------------------------------


def of_tasks(tasks: Sequence[Task], eval_tasks: Any = None) -> rayrl.Environment:
    @rayrl.env(tasks=tasks, eval_tasks=eval_tasks, rewards={"right": 1.0})
    async def rows(task: Task, agent: Agent) -> Scores:
        return {"right": 1.0}

    return rows


@pytest.mark.parametrize(
    ("n", "share", "held_out"), [(100, 0.1, 10), (7, 0.1, 1), (2, 0.9, 1), (10, 0.25, 2), (3, 1, 2)]
)
def test_a_share_of_a_sequence_is_held_out(n: int, share: float, held_out: int) -> None:
    env = of_tasks([Task(seed=k) for k in range(n)])
    train = {task.seed for task in env.training(share).source}  # type: ignore[union-attr]
    evaluated = {task.seed for task in env.evaluation(share).source}  # type: ignore[union-attr]
    assert len(evaluated) == held_out
    assert train | evaluated == set(range(n))
    assert not train & evaluated
    assert env.evaluation(share).source == env.evaluation(share).source, "always the same ones"


def test_one_task_or_no_share_is_for_both() -> None:
    for env, share in ((of_tasks([Task()]), 0.5), (of_tasks([Task(), Task()]), 0.0)):
        assert env.training(share).source == env.evaluation(share).source == env.source


def test_eval_tasks_are_for_evaluation_only() -> None:
    ours, theirs = [Task(seed=1), Task(seed=2)], [Task(seed=3)]
    env = of_tasks(ours, theirs)
    assert env.training(0.5).source == ours
    assert env.evaluation(0.5).source == theirs
    generated = of_tasks(ours, coins).evaluation(0.5).configure({"sides": 3})
    assert {task.side for task in generated.tasks(0, 9)} == {"0", "1", "2"}  # type: ignore[attr-defined]
    before = of_tasks(ours, coins).configure({"sides": 3}).evaluation(0.5)
    assert before.args == {"sides": 3}, "a keyword that only the evaluation's source has"


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_gives_metrics_and_the_best_step(tmp_path: Path) -> None:
    config = from_dict({"run": {"dir": str(tmp_path), "loggers": []}, "env": {"name": "x"}})
    with RunDir(tmp_path, config) as folder:
        for step, reward in enumerate((0.1, 0.9, 0.4)):
            folder.log(step, {"reward": reward, "loss": float("nan")})
    run = Run(tmp_path, config)
    assert [row["reward"] for row in run.metrics] == [0.1, 0.9, 0.4]
    assert run.best("reward")["step"] == 1
    assert run.best("reward", lowest=True)["step"] == 0
    with pytest.raises(ConfigError, match=r"'rewrd' is no metric.*loss, reward, step"):
        run.best("rewrd")
    with pytest.raises(ConfigError, match="'loss' is no metric"):
        run.best("loss")
    with pytest.raises(rayrl.DataError, match=r"step_000004\.jsonl"):
        list(run.episodes(4))


class Kept:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def open(self, folder: Path, config: Config, first_step: int) -> None:
        self.calls.append(("open", folder, first_step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((step, dict(metrics)))

    def close(self) -> None:
        self.calls.append("close")


LOGGED = []


def log_here(step: int, metrics: Mapping[str, float]) -> None:
    LOGGED.append((step, dict(metrics)))


def test_loggers_are_names_objects_files_and_functions(tmp_path: Path) -> None:
    kept, told, file = Kept(), list[int](), tmp_path / "more" / "own.jsonl"
    loggers = ["tensorboard", f"{__file__}:log_here"]
    run = {"dir": str(tmp_path / "run"), "loggers": loggers}
    config = from_dict({"run": run, "env": {"name": "x"}})
    own = [kept, rayrl.Jsonl(file), lambda step, metrics: told.append(step)]
    with RunDir(tmp_path / "run", config, loggers=own) as folder:
        folder.log(3, {"reward": 0.5, "text": "no number", "bad": float("inf")})
        folder.log(4, {"reward": 1.5})
    assert kept.calls == [
        ("open", tmp_path / "run", 0), (3, {"reward": 0.5}), (4, {"reward": 1.5}), "close"
    ]  # fmt: skip
    assert told == [3, 4]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"step": 3, "reward": 0.5}, {"step": 4, "reward": 1.5}]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    (loaded,) = make_loggers(from_dict({"run": {"loggers": [f"{__file__}:log_here"]}}))
    loaded.log(0, {"a": 1.0})


def test_a_logger_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.loggers='tensorbord'.*Did you mean 'tensorboard'"):
        make_loggers(from_dict({"run": {"loggers": ["tensorbord"]}}))
    with pytest.raises(ConfigError, match=r"3 is neither a name, nor a rayrl\.Logger"):
        make_loggers(Config(), [3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"run\.wandb_project is empty"):
        make_loggers(from_dict({"run": {"loggers": ["wandb"]}}))[0].open(Path(), Config(), 0)


# --- batches --------------------------------------------------------------------------------------


def test_an_advantage_may_be_one_number_per_episode() -> None:
    task = Task(seed=1)
    group = Group(
        "g",
        task,
        tuple(
            Episode(
                f"g/{k}",
                "e",
                task,
                k,
                tuple(
                    Turn("agent", (), "x", "stop", 2 * t, (1,), (2,), (-0.5,)) for t in range(k + 1)
                ),
                {"agent": {"s": k}},
                {"agent": float(k)},
            )
            for k in range(2)
        ),
    )
    algo = from_dict({"algo": {"normalize": "none"}}).algo
    expected = make_batch([group], advantages([group], algo))
    batch = make_batch([group], [[-0.5, 0.5]])
    assert [row.advantages.tolist() for row in batch.rows] == [
        row.advantages.tolist() for row in expected.rows
    ]
    assert [row.advantages.tolist() for row in batch.rows] == [[0, -0.5], [0, 0.5, 0, 0.5]]
    with pytest.raises(ValueError, match="2 episodes, but advantages of 1"):
        make_batch([group], [[1.0]])


# --- event loops ----------------------------------------------------------------------------------


async def work(value: int) -> tuple[int, int]:
    """What it does."""
    await asyncio.sleep(0)
    if value < 0:
        raise ConfigError("less than 0")
    return value, threading.get_ident()


def test_a_blocking_call_runs_without_an_event_loop() -> None:
    call = _blocking(work)
    assert call(3) == (3, threading.get_ident())
    assert call.__doc__ == "What it does."
    with pytest.raises(ConfigError, match="less than 0"):
        call(-1)


async def test_a_blocking_call_runs_within_an_event_loop() -> None:
    call = _blocking(work)
    value, thread = call(3)
    assert value == 3
    assert thread != threading.get_ident()
    with pytest.raises(ConfigError, match="less than 0"):
        call(-1)


def test_a_cell_that_is_interrupted_ends_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import Future

    ended, interruptions = list[bool](), list[KeyboardInterrupt]()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    result = Future.result

    def interrupted(self: Future[Any], timeout: float | None = None) -> Any:
        if not interruptions:
            return result(self, timeout)
        raise interruptions.pop()

    async def cell() -> None:
        interruptions.append(KeyboardInterrupt())
        monkeypatch.setattr("rayrl.api.Future.result", interrupted)
        _blocking(forever)()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert ended == [True]


def test_a_mixture_is_of_names_objects_and_settings() -> None:
    one, two = make_env().configure({"sides": 3}, {"right": 2.0}), make_env()

    def rival(messages: Sequence[Any], rng: Any) -> str:
        return "0"

    config = configure(
        "train",
        None,
        None,
        None,
        {"env.mix.games.max_tokens": 9},
        {
            "coins": one,
            "more": {"name": two, "weight": 2, "args": {"sides": 4}, "seats": {"agent": rival}},
            "games": "tictactoe",
        },
    )
    assert config.run.name == "coins-more-games-train"
    found = components(config)
    assert (found["games"].env.name, found["games"].sampling.max_tokens) == ("tictactoe", 9)
    assert (found["coins"].env.args, found["coins"].env.rewards) == ({"sides": 3}, {"right": 2.0})
    assert (config.env.mix["more"]["weight"], found["more"].env.args) == (2, {"sides": 4})
    made = {name: make_environment(own, name) for name, own in found.items()}
    assert [env.name for env in made.values()] == ["coins", "more", "games"]
    assert made["coins"].play is one.play, "not the other of the same name"
    assert made["more"].play is two.play
    assert (
        player_function(made["more"], "env.seats.agent", found["more"].env.seats["agent"]) is rival
    )
    away = pickle.loads(cloudpickle.dumps(made["coins"].spec))
    there = environment_of(away)
    assert (there.name, there.args, there.rewards) == ("coins", {"sides": 3}, {"right": 2.0})
    with pytest.raises(ConfigError, match=r"env\.mix\.a=3: decorate its coroutine"):
        configure("train", None, None, None, {}, {"a": 3, "b": "tictactoe"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"env\.name=tictactoe: env\.mix names"):
        rayrl.train(env="tictactoe", mix={"a": "copyword", "b": "tools"})
    with pytest.raises(ConfigError, match=r"env\.mix\.a\.name='copywrd'.*Did you mean 'copyword'"):
        rayrl.train(mix={"a": "copywrd", "b": "tools"})
    with pytest.raises(ConfigError, match=r"env\.mix\.a\.args\.longst: .*Did you mean 'longest'"):
        rayrl.train(mix={"a": {"name": "copyword", "args": {"longst": 3}}, "b": "tools"})
