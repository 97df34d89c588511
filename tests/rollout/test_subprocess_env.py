from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import ConfigError, GroupPlan, ScriptedPlayer, Task
from rayrl.rollout.rollout import play_episode
from rayrl.rollout.subprocess_env import SubprocessEnv
from rayrl.types import Episode, Message
from tests.act import Flaky, collect, instant, says

FAR = """
    import os, sys, time
    from collections import UserDict
    from dataclasses import dataclass
    import rayrl

    @dataclass(frozen=True, kw_only=True)
    class Job(rayrl.Task):
        act: str = ""

    def jobs(seed: int, u: float, act: str = "") -> Job:
        return Job(seed=seed, act=act)

    class Mute(Exception):
        def __str__(self):
            raise SystemExit(1)

    class OwnBase(BaseException):
        pass

    RAISED = {
        "mute": Mute,
        "base": OwnBase,
        "exit": SystemExit,
        "close": GeneratorExit,
        "shout": lambda: ValueError("x" * 10_000_000),
    }
    ODD = {
        "mapping": UserDict({"n": 1, "pid": True}),
        "keys": {("n",): 1},
        "huge": {"n": 1e308, "pid": 0},
        "complex": {"n": 1j, "pid": 0},
        "text": {"n": "1", "pid": 0},
    }

    def pid() -> int:
        '''The process.'''
        return os.getpid()

    @rayrl.env(tasks=jobs, rewards={"n": 1.0, "pid": 0.0})
    async def far(task, agent):
        n = 0
        for k in range(3):
            how = {"temperature": 0.5, "max_tokens": 7} if k == 1 else {}
            n += len(await agent(f"{k} {task.rng(n).random()}", **how))
        if task.act == "block":
            while True:
                pass
        if task.act == "sleep":
            time.sleep(60)
        if task.act == "raise":
            raise ValueError("on fire")
        if task.act == "gone":
            raise rayrl.InfraError("the server is gone")
        if task.act in RAISED:
            raise RAISED[task.act]()
        if task.act in ODD:
            return ODD[task.act]
        if task.act == "die":
            os._exit(7)
        if task.act == "nan":
            return {"n": float("nan"), "pid": 0}
        if task.act == "tool":
            await agent("which?", tools=[pid])
        if task.act == "fork":
            side = agent.fork()
            await agent("on")
            deeper = side.fork()
            said = [await side("aside"), await deeper("deeper")]
            side.restart()
            said.append(await side("anew"))
            await agent(" ".join(said))
        if task.act == "restart":
            agent.restart()
            await agent("anew")
        return {"n": n, "pid": os.getpid()}
"""


@pytest.fixture
def far(tmp_path: Path) -> rayrl.Environment:
    path = tmp_path / "far_env.py"
    path.write_text(textwrap.dedent(FAR))
    return rayrl.load_env(str(path))


async def play_far(env: rayrl.Environment, act: str, players: Any, **keywords: Any) -> Episode:
    task = env.configure({"act": act}).tasks(0, 1)[0]
    return await play_episode(env, task, players, id="e", **keywords)


async def test_isolated_episodes_are_the_same(far: rayrl.Environment) -> None:
    tasks = far.tasks(0, 3)
    plans = [GroupPlan(str(k), task, 2, k) for k, task in enumerate(tasks)]
    near = {g.id: g for g in await collect(far, plans, instant(), concurrency=9)}
    async with SubprocessEnv(far, slots=2) as env:
        groups = await collect(env, plans, instant(), concurrency=9, deadline_s=60)
    pids = set()
    for group in groups:
        assert group.complete
        for episode, other in zip(group.episodes, near[group.id].episodes, strict=True):
            assert episode.turns == other.turns
            assert [turn.temperature for turn in episode.turns] == [None, 0.5, None]
            assert episode.scores["agent"]["n"] == other.scores["agent"]["n"]
            pids.add(episode.scores["agent"]["pid"])
    assert 1 <= len(pids) <= 2  # processes are reused
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


async def test_isolated_code_that_blocks_is_killed(far: rayrl.Environment) -> None:
    async with SubprocessEnv(far, slots=1) as env:
        after = first = await play_far(env, "", says(), deadline_s=60)
        for act in ("block", "sleep"):  # in a running process, because starting one takes a while
            late = await play_far(env, act, says(), deadline_s=5)
            assert late.failure is not None
            assert late.failure.kind == "env"
            assert "did not end within 5 s" in late.failure.message
            assert len(late.turns) == 3
            after = await play_far(env, "", says(), deadline_s=60)
        assert after.failure is None
        assert after.scores["agent"]["n"] == first.scores["agent"]["n"] == 9.0
        with pytest.raises(ProcessLookupError):
            os.kill(int(first.scores["agent"]["pid"]), 0)


async def test_errors_of_isolated_code(far: rayrl.Environment) -> None:
    async with SubprocessEnv(far, slots=1) as env:
        raised = await play_far(env, "raise", says(), deadline_s=60)
        assert raised.failure is not None
        assert raised.failure.kind == "env"
        assert "ValueError: on fire" in raised.failure.message
        assert 'raise ValueError("on fire")' in raised.failure.traceback
        died = await play_far(env, "die", says(), deadline_s=60)
        assert died.failure is not None
        assert "its process exited unexpectedly (exit code 7)" in died.failure.message
        nan = await play_far(env, "nan", says(), deadline_s=60)
        assert nan.failure is not None
        assert "nan as score 'n'" in nan.failure.message
        infra = await play_far(env, "", {"agent": Flaky(1)}, deadline_s=60)
        assert infra.failure is not None
        assert infra.failure.kind == "infra"
        gone = await play_far(env, "gone", says(), deadline_s=60)
        assert gone.failure is not None
        assert (gone.failure.kind, "the server is gone" in gone.failure.message) == ("infra", True)
        fine = await play_far(env, "", says(), deadline_s=60)
        assert fine.failure is None


@pytest.mark.parametrize("isolated", [False, True])
async def test_whatever_isolated_code_raises_or_returns(
    far: rayrl.Environment, isolated: bool
) -> None:
    """Failures are the same wherever the code runs, and the process survives."""
    said = {
        "mute": "Mute: <Mute, whose __str__ raised SystemExit>",
        "base": "OwnBase",
        "exit": "Exit" if isolated else "sys.exit",
        "close": "GeneratorExit",
        "shout": "characters left out",
        "keys": "undeclared score ('n',)",
        "huge": "returned 1e+308 as score 'n'",
        "complex": "returned 1j as score 'n'",
        "text": "returned '1' as score 'n'",
    }
    async with SubprocessEnv(far, slots=1) as there:
        env = there if isolated else far
        first = await play_far(env, "", says(), deadline_s=60)
        for act, words in said.items():
            episode = await play_far(env, act, says(), deadline_s=60)
            assert episode.failure is not None
            assert episode.failure.kind == "env"
            assert words in episode.failure.message
            assert len(episode.failure.traceback) <= 20_000
        odd = await play_far(env, "mapping", says(), deadline_s=60)
        assert odd.scores == {"agent": {"n": 1.0, "pid": 1.0}}
        last = await play_far(env, "", says(), deadline_s=60)
        assert last.scores == first.scores  # the same process


async def test_isolated_tools_and_conversations(far: rayrl.Environment) -> None:
    def player(messages: Sequence[Message], rng: Any) -> str:
        asked = messages[-1].content == "which?"
        return '<tool_call>{"name": "pid", "arguments": {}}</tool_call>' if asked else "yes"

    async with SubprocessEnv(far, slots=1) as env:
        used = await play_far(env, "tool", {"agent": ScriptedPlayer(player)}, deadline_s=60)
        assert used.failure is None
        assert used.scores["agent"]["tool_calls"] == 1.0
        assert used.turns[-1].prompt[0].content == str(int(used.scores["agent"]["pid"]))
        engine_players = instant()
        again = await play_far(env, "restart", engine_players, deadline_s=60)
        assert [turn.offset == 0 for turn in again.turns] == [True, False, False, True]
        assert engine_players["agent"].client.released == ["e/agent", "e/agent/1"]


async def test_isolated_forks_copy_the_conversation(far: rayrl.Environment) -> None:
    def counts(messages: Sequence[Message], rng: Any) -> str:
        return str(len(messages))

    async with SubprocessEnv(far, slots=1) as env:
        there = await play_far(env, "fork", {"agent": ScriptedPlayer(counts)}, deadline_s=60)
        here = await play_far(far, "fork", {"agent": ScriptedPlayer(counts)}, deadline_s=60)
        assert here.turns == there.turns
        assert here.turns[-1].prompt[0].content == "7 7 1"
        players = instant()
        there = await play_far(env, "fork", players, deadline_s=60)
        asked = {r.session: r.prompt_ids for r in players["agent"].client.requests}
        ended = players["agent"].client.released
        players = instant()
        here = await play_far(far, "fork", players, deadline_s=60)
        assert asked == {r.session: r.prompt_ids for r in players["agent"].client.requests}
    assert there.turns == here.turns
    assert sorted(ended) == sorted(asked)
    assert sorted(asked) == [
        "e/agent",
        "e/agent+1",
        "e/agent+1+1",
        "e/agent+1/1",
    ]


async def test_a_child_ends_with_its_parent(far: rayrl.Environment, tmp_path: Path) -> None:
    code = f"""
        import asyncio, rayrl
        from rayrl.rollout.subprocess_env import SubprocessEnv
        async def main():
            env = rayrl.load_env({far.ref!r})
            async with SubprocessEnv(env, slots=1) as env:
                player = rayrl.ScriptedPlayer(lambda m, r: "yes")
                task = env.configure({{"act": ""}}).tasks(0, 1)[0]
                episode = await rayrl.play_episode(env, task, {{"agent": player}}, id="e")
                print(int(episode.scores["agent"]["pid"]), flush=True)
                task = env.configure({{"act": "block"}}).tasks(0, 1)[0]
                await rayrl.play_episode(env, task, {{"agent": player}}, id="e")
        asyncio.run(main())
    """
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(code),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    while _state(pid) != "Z":  # noqa: ASYNC110 - nobody waits for it
        await asyncio.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


async def test_an_environment_that_a_child_cannot_load() -> None:
    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def lost(task: Task, agent: Any) -> Any:
        return {"win": 1.0}

    lost.ref = "nowhere:lost"
    async with SubprocessEnv(lost, slots=1) as isolated:
        with pytest.raises(ConfigError, match="cannot run in its own process"):
            await play_episode(isolated, Task(), says(), id="e", deadline_s=60)
