"""Tasksets of verifiers' v1 interface, played by the real library in an environment of its own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayrl.environment.environment import Environment
from rayrl.environment.registry import environment_of, load_env
from rayrl.environment.schemes.verifiers import process
from rayrl.environment.schemes.verifiers.taskset import TasksetTask
from rayrl.environment.tasks import roundtrip_problem
from rayrl.errors import ConfigError, InfraError
from rayrl.rollout.check import check_env
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.resume import EpisodeResume
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode, Message

pytestmark = pytest.mark.slow  # each of its programs imports verifiers

VENV = Path(sys.prefix, "verifiers")  # made by scripts/setup dev
HERE = Path(__file__).parent / "verifiers_tasksets"
UV = """#!/bin/sh
# Stands in for uv, which would install a program's requirements: here they are there already.
case "$*" in
  *--help*) echo --script ;;
  "python find"*) echo {python} ;;
esac
"""


@pytest.fixture(scope="module", autouse=True)
def _path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    assert VENV.exists(), "scripts/setup dev makes it"
    folder = tmp_path_factory.mktemp("uv")
    uv = folder / "uv"
    uv.write_text(UV.format(python=VENV / "bin" / "python"))
    uv.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("HOME", str(folder))  # verifiers keeps prepared programs there
        yield
    for one in process._processes.values():
        one.close()


def load(name: str, **args: Any) -> Environment:
    return load_env(f"verifiers:{VENV}:{HERE / name}.py").configure(args)


def any_reply(messages: Sequence[Message], rng: random.Random) -> str:
    """Right and wrong replies to what the tasksets here ask."""
    asked = messages[-1].content
    if asked.startswith("How much"):
        call = {"name": "shop_price", "arguments": {"item": asked.split()[-1][:-1]}}
        return f"<tool_call>{json.dumps(call)}</tool_call>"
    if asked.startswith("Is it"):
        return "yes" if asked.split()[-1][:-1] in messages[0].content else "no"
    if asked.endswith("= ?") and rng.random() < 0.5:
        a, _, b = asked.split()[:3]
        return str(int(a) + int(b))
    return asked if messages[-1].role == "tool" else str(rng.randrange(5))


async def episode(env: Environment, number: int = 0, **options: Any) -> Episode:
    (task,) = env.tasks(number, 1)
    players = options.pop("players", None) or dict.fromkeys(env.seats, ScriptedPlayer(any_reply))
    return await play_episode(env, task, players, id="e", seed=number, **options)


# --- the same as in verifiers --------------------------------------------------------------------


async def together(env: Environment, size: int) -> list[Episode]:
    return await asyncio.gather(*[episode(env, number) for number in range(size)])


def test_rewards_are_those_of_verifiers() -> None:
    """A plain taskset, two agents, and a tool with the program of a harness of verifiers' own."""
    talk, null = {"harness": {"id": "talk"}}, {"harness": {"id": "null"}}
    cases = [
        ("sums", {"agent": talk}, 6),
        ("duel", {"guesser": talk, "answerer": talk}, 4),
        ("prices", {"agent": null}, 1),
    ]
    asked, ours = [], []
    for name, agents, size in cases:
        env = load(name, **agents)
        assert env.seats == tuple(agents)
        played = asyncio.run(together(env, size))
        assert [one.failure for one in played] == [None] * size
        replies = []
        for one in played:
            assert isinstance(one.task, TasksetTask)
            said = {
                seat: [turn.text for turn in one.turns if turn.seat == seat] for seat in env.seats
            }
            replies.append([dict(one.task.data), said])
        here = {"runtime": {"type": "subprocess"}}
        asked.append([name, {seat: {**here, **field} for seat, field in agents.items()}, replies])
        ours.append([dict(one.rewards) for one in played])
    done = subprocess.run(
        [VENV / "bin" / "python", HERE / "reference.py"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(ours, json.loads(done.stdout), strict=True):
        assert mine == [pytest.approx(rewards) for rewards in theirs]
    assert len({str(rewards) for rewards in ours[0]}) > 1
    assert len({str(rewards) for rewards in ours[1]}) > 1
    assert any(turn.text.startswith("<tool_call>") for turn in played[0].turns)


async def test_agents_are_seats() -> None:
    env = load("duel")
    knows = ScriptedPlayer(lambda messages, rng: "yes")
    guesses = iter("123")
    players = {"guesser": ScriptedPlayer(lambda m, rng: next(guesses)), "answerer": knows}
    one = await episode(env, players=players)
    assert [turn.seat for turn in one.turns] == ["guesser", "answerer"]
    assert one.scores["answerer"]["reward"] == pytest.approx(0.1)  # of `finalize`
    assert one.facts["traces"][0]["agent"] in env.seats
    ended = await episode(env, players={**players, "answerer": ScriptedPlayer(lambda m, r: "no")})
    assert ended.failure is not None  # no guess is left


async def test_a_limit_of_turns_ends_an_agent() -> None:
    players = {seat: ScriptedPlayer(lambda messages, rng: "no") for seat in load("duel").seats}
    assert len((await episode(load("duel"), players=players)).turns) == 8
    short = load("duel", guesser={"max_turns": 2})
    assert len((await episode(short, players=players)).turns) == 4


# --- tasks ---------------------------------------------------------------------------------------


def test_tasks_are_held_out_and_travel() -> None:
    env = load("sums")
    train, held = (
        {str(task.data["prompt"]) for task in one.tasks(5, 60) if isinstance(task, TasksetTask)}
        for one in (env.training(0.1), env.evaluation(0.1))
    )
    assert len(train) == 18
    assert len(held) == 2
    assert not train & held
    assert not any(roundtrip_problem(task) for task in env.tasks(0, 4))
    assert [*env.tasks(0, 4)] == [*load("sums").tasks(0, 4)]


def test_a_taskset_without_an_end_is_cut() -> None:
    def numbers(env: Environment) -> set[int]:
        return {task.data["idx"] for task in env.tasks(0, 50) if isinstance(task, TasksetTask)}

    assert numbers(load("duel", num_tasks=5)) == {0, 1, 3, 4}  # 2 is held out
    assert 970 < max(numbers(load("duel"))) < 1000


async def test_luck_is_the_tasks() -> None:
    env = load("sums")
    one, other, third = await asyncio.gather(episode(env, 1), episode(env, 1), episode(env, 2))
    assert one.scores["agent"]["luck"] == other.scores["agent"]["luck"]
    assert one.scores["agent"]["luck"] != third.scores["agent"]["luck"]


# --- settings ------------------------------------------------------------------------------------


def test_settings_are_fields_of_the_configuration() -> None:
    assert load("sums", taskset={"most": 3}, held_out=0.5).args["taskset"] == {"most": 3}
    assert len({str(task) for task in load("sums", taskset={"most": 3}).tasks(0, 9)}) > 2
    assert environment_of(load("duel", hint="Well.").spec).args["hint"] == "Well."
    assert load("sums", slots=3).slots == 3
    client = {"type": "eval", "base_url": "http://127.0.0.1:9/v1", "api_key_var": "X"}
    assert load("duel", answerer={"client": client}).seats == ("guesser",)


def test_another_environment_plays_a_taskset() -> None:
    where = f"verifiers:{VENV}:best-of-n+{HERE / 'sums'}.py"
    env = load_env(where).configure({"n": 2})
    one = asyncio.run(episode(env))
    assert one.failure is None, one.failure
    assert len(one.turns) == len(one.facts["traces"]) == 2
    rewards = [trace["reward"] for trace in one.facts["traces"]]
    assert one.rewards["agent"] == sum(rewards) / 2


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("sums", {"taskset": {"mots": 3}}, "env.args.taskset.mots=3: Extra inputs"),
        ("sums", {"taskset": {"most": "many"}}, "env.args.taskset.most='many': Input should be"),
        ("sums", {"tasket": {}}, "no such setting. Did you mean 'taskset'?"),
        ("sums", {"agent": {"harness": {"id": "nul"}}}, "'nul' not found"),
        ("sums", {"agent": {"harness": {"id": "bash"}}}, "env.args.agent.runtime.type=docker"),
        ("prices", {}, "the harness 'bash' of the agent 'agent' executes"),
        ("sums", {"slots": "many"}, "expected int"),
    ],
)
def test_wrong_settings_are_named(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name, **args)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{VENV}:best-of-m+{HERE}/sums.py", "environment 'best-of-m' not found"),
        (f"{VENV}:{HERE}/talk.py", "exports no Taskset subclass"),
        (f"{VENV}:{HERE}/nothing.py", "there is no file"),
        ("/no/such/venv:sums", "cannot be started (No such file"),
        (f"{sys.prefix}/openenv:{HERE}/sums.py", "has no verifiers with its v1 interface"),
        (f"{HERE}/sums.py", "Install verifiers>=0.3.1 in a virtual environment of its own"),
        ("best-of-n+gsm8k", "Install verifiers>=0.3.1 in a virtual environment of its own"),
    ],
)
def test_what_is_not_there_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_env(f"verifiers:{name}")
    assert said in str(caught.value)


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("sandbox", "infra", "agent 'agent': SandboxError: no machine is left"),
        ("reward", "env", "ZeroDivisionError: of nothing"),
    ],
)
async def test_failures_have_a_kind(fault: str, kind: str, said: str) -> None:
    one = await episode(load("sums", taskset={"fault": fault}))
    assert one.failure is not None
    assert one.failure.kind == kind
    assert said in one.failure.message


async def test_a_players_error_is_the_episodes() -> None:
    class Gone(ScriptedPlayer):
        async def answer(self, *_: Any) -> Any:
            raise InfraError("the replica is gone")

    one = await episode(load("sums"), players={"agent": Gone(any_reply)})
    assert one.failure is not None
    assert one.failure.kind == "infra"
    assert "the replica is gone" in one.failure.message


async def test_code_that_blocks_is_killed_and_others_are_played_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env, blocks = load("sums"), load("sums", taskset={"fault": "block"})
    running = process._processes[os.getpid(), VENV / "bin" / "python", str(HERE)]
    asked = asyncio.Event()

    async def waits(messages: Sequence[Message], rng: random.Random) -> str:
        asked.set()
        await asyncio.to_thread(running._threads[1].join)  # it reads until the process has ended
        return "1"

    sibling = asyncio.create_task(episode(env, players={"agent": ScriptedPlayer(waits)}))
    await asked.wait()
    sent, send = asyncio.Event(), running.send

    def noting(request: Mapping[str, Any]) -> Any:
        if request["do"] == "play":
            sent.set()
        return send(request)

    monkeypatch.setattr(running, "send", noting)
    monkeypatch.setattr(process, "CANCEL_S", 0.1)
    blocked = asyncio.create_task(episode(blocks))
    await sent.wait()
    blocked.cancel()
    lost = await sibling
    assert lost.failure is not None
    assert lost.failure.kind == "infra"
    assert "ended (signal 9)" in lost.failure.message
    assert (await episode(env)).failure is None


async def test_a_cancelled_episode_is_cancelled_there() -> None:
    env = load("duel")
    asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def never(messages: Sequence[Message], rng: random.Random) -> str:
        asked.set_result(None)
        await asyncio.Event().wait()
        return ""

    running = process._processes[os.getpid(), VENV / "bin" / "python", str(HERE)]
    players = {"guesser": ScriptedPlayer(never), "answerer": ScriptedPlayer(any_reply)}
    playing = asyncio.create_task(episode(env, players=players))
    await asked
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert (await episode(env)).failure is None
    while running._pending:  # the answer to the one that was cancelled
        await asyncio.to_thread(env.tasks, 0, 1)


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", range(5))
async def test_recorded_turns_are_matched(made: int) -> None:
    env, asked = load("duel"), []

    def says(messages: Sequence[Message], rng: random.Random) -> str:
        asked.append(messages[-1].content)
        return "no" if messages[-1].content.startswith("Is it") else str(len(messages))

    players = dict.fromkeys(env.seats, ScriptedPlayer(says))
    whole = await episode(env, players=players)
    assert whole.failure is None, whole.failure
    assert len(whole.turns) == 8
    asked.clear()
    resume = EpisodeResume(whole.turns[:made])
    again = await episode(env, players=players, resume=resume)
    assert again.failure is None, again.failure
    assert again.replayed == made
    assert len(asked) == 8 - made
    assert [turn.text for turn in again.turns] == [turn.text for turn in whole.turns]
    assert again.scores == whole.scores


def test_checks_pass() -> None:
    env = load("sums")
    env.player("any")(any_reply)
    assert check_env(env) == []
