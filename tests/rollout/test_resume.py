"""Resumed episodes, compared with the same episodes without interruption."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import GroupPlan, InfraError, Message, Scores, Task, format_line
from rayrl.cluster.workers.turn_log import Recorder, TurnSender
from rayrl.rollout.agent import Agent, Options
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.episode_io import episode_from_json, episode_to_json
from rayrl.rollout.players import PolicyPlayer, ScriptedPlayer
from rayrl.rollout.resume import EpisodeResume, PartialEpisode, ReplayMismatch, TurnLog
from rayrl.rollout.rollout import play_episode
from rayrl.rollout.subprocess_env import SubprocessEnv
from rayrl.types import Completion, Episode, Failure, Group, Request, Sampling, Turn, Usage, user
from tests.act import HERMES, Flaky, Instant, InTurn, build_tokenizer, chat, collect, says

ENVS = [  # each with a player whose episodes are long
    ("copyword", "perfect", {}),
    ("double_check", "sycophant", {}),
    ("reverse_text", "teacher", {}),
    ("tictactoe", "teacher", {}),
    ("tictactoe_versus", "random", {}),
    ("tools", "clumsy", {"protocol": "native", "failure_rate": 0.3}),
    ("tools", "perfect", {"protocol": "text", "failure_rate": 0.3}),
]


class Teacher(PolicyPlayer):
    """A policy that knows what to say: a scripted player's texts as the ids of a model.

    Its generator stands for the model, so ids, sessions and seeds are as they are in training.
    """

    def __init__(self, function: Any, version: int = 0) -> None:
        super().__init__(chat(), self, Sampling(max_tokens=4096))
        self.script = ScriptedPlayer(function)
        self.version = version
        self.sessions: list[str] = []
        self.said: list[Message] = []
        self.next = ""

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        self.next = (await self.script.answer(conversation, new, options)).text
        return await super().answer(conversation, new, options)

    async def generate(self, request: Request) -> Completion:
        self.sessions.append(request.session)
        ids = self.chat.reply(self.next)
        spans = (rayrl.VersionSpan(self.version, 0, len(ids)),)
        return Completion(ids, (-0.25,) * len(ids), spans, "stop")


async def resumed(env: rayrl.Environment, plan: GroupPlan, players: Any, begun: Any) -> Any:
    """The episode of a plan of size 1 that goes on from `begun`, and the turns that were logged."""
    log = TurnLog()
    (group,) = await collect(
        env,
        [plan],
        players,
        concurrency=1,
        backoff_s=0.001,
        recorded={f"{plan.id}/0": begun},
        on_turn=log.add,
    )
    return group.episodes[0], log.partial_episodes()


def test_every_environment_is_covered() -> None:
    assert {name for name, _, _ in ENVS} == set(rayrl.installed_envs())


@pytest.mark.parametrize(("name", "player", "args"), ENVS)
async def test_every_environment_resumes_after_every_turn(
    name: str, player: str, args: dict[str, Any]
) -> None:
    env = rayrl.load_env(name).configure(args)
    teacher = env.players[player]
    for k, task in enumerate(env.tasks(seed=5, n=2)):
        plan = GroupPlan(f"g{k}", task, 1, k)
        (whole,) = await collect(
            env, [plan], dict.fromkeys(env.seats, Teacher(teacher)), concurrency=1
        )
        (episode,) = whole.episodes
        assert episode.failure is None
        assert episode.turns
        # as a log on another machine has it
        turns = episode_from_json(json.loads(json.dumps(episode_to_json(episode)))).turns
        for made in range(len(turns) + 1):
            players = {seat: Teacher(teacher) for seat in env.seats}
            again, told = await resumed(env, plan, players, PartialEpisode(turns[:made], 3))
            assert again == episode
            assert (again.replayed, again.replay_mismatches) == (made, 0)
            assert told == {f"g{k}/0": PartialEpisode(episode.turns, 4)}
            sessions = [one for seat in players.values() for one in seat.sessions]
            assert len(sessions) == len(turns) - made  # nothing was generated twice
            assert all(session.startswith(f"g{k}/0~3/") for session in sessions)


@rayrl.env(tasks=[Task(seed=4)], rewards={"n": 1.0})
async def three(task: Task, agent: Agent) -> Scores:
    said = [await agent(f"{k} {task.rng(k).random()}") for k in range(3)]
    return {"n": float(len("".join(said)))}


PLAN = GroupPlan("g", Task(seed=4), 1, 7)


async def recorded(env: rayrl.Environment, players: Any) -> tuple[Turn, ...]:
    (group,) = await collect(env, [PLAN], players, concurrency=1)
    turns: tuple[Turn, ...] = group.episodes[0].turns
    return turns


async def test_an_infrastructure_failure_resumes_from_its_turns() -> None:
    class Dies(Instant):
        """Fails on the third and the fifth request."""

        async def generate(self, request: Request) -> Completion:
            done = await super().generate(request)
            if len(self.requests) in (3, 5):
                raise InfraError("replica died")
            return done

    texts = ["one", "the lazy dog", "three"]
    whole = await recorded(
        three, {"agent": PolicyPlayer(chat(), Instant(chat(), texts), Sampling())}
    )
    engine = Dies(chat(), texts)
    told: list[tuple[str, int, str]] = []
    (group,) = await collect(
        three,
        [PLAN],
        {"agent": PolicyPlayer(chat(), engine, Sampling())},
        concurrency=1,
        backoff_s=0.001,
        on_turn=lambda episode, attempt, turn: told.append(
            (episode, attempt, turn.prompt[0].content[0])
        ),
    )
    assert group.episodes[0].turns == whole
    assert (group.episodes[0].replayed, group.episodes[0].replay_mismatches) == (2, 0)
    # called for turns 0, 1, 2 (which failed) and 2 again
    assert [r.session for r in engine.requests] == ["g/0/agent"] * 3 + ["g/0~1/agent"]
    assert engine.requests[2].prompt_ids == engine.requests[3].prompt_ids
    assert engine.requests[2].seed == engine.requests[3].seed
    assert told == [("g/0", 0, "0"), ("g/0", 0, "1")] + [("g/0", 1, k) for k in "012"]


async def test_an_environment_that_differs_starts_over() -> None:
    asked = itertools.count()

    @rayrl.env(tasks=[Task(seed=4)], rewards={"n": 1.0})
    async def forgets(task: Task, agent: Agent) -> Scores:
        said = [await agent("same"), await agent(f"not the same {next(asked)}")]
        return {"n": float(len("".join(said)))}

    turns = await recorded(forgets, says("abc"))
    paid = tuple(replace(turn, usage=Usage(1, 0, 10, k)) for k, turn in enumerate(turns, 1))
    episode, told = await resumed(forgets, PLAN, says("abc"), PartialEpisode(paid, 5))
    assert episode.failure is None
    assert episode.scores == {"agent": {"n": 6.0}}
    assert [turn.prompt[0].content for turn in episode.turns] == ["same", "not the same 2"]
    assert (episode.replayed, episode.replay_mismatches) == (0, 1)
    assert episode.retried_usage == Usage(2, 0, 20, 3)
    assert told == {"g/0": PartialEpisode(episode.turns, 7)}  # attempt 5 is outdated, 6 ended

    # after one mismatch, later infrastructure failures start over immediately
    class Dies(ScriptedPlayer):
        def __init__(self) -> None:
            super().__init__(lambda messages, rng: "abc")
            self.sessions: list[str] = []

        async def answer(
            self, conversation: Conversation, new: Sequence[Message], options: Options
        ) -> Turn:
            self.sessions.append(conversation.session)
            if len(self.sessions) == 2:
                raise InfraError("replica died")
            return await super().answer(conversation, new, options)

    player = Dies()
    episode, _ = await resumed(forgets, PLAN, {"agent": player}, PartialEpisode(turns, 1))
    assert episode.failure is None
    assert (episode.replayed, episode.replay_mismatches) == (0, 1)
    assert player.sessions == ["g/0~2/agent"] * 2 + ["g/0~3/agent"] * 2


@pytest.mark.parametrize(
    ("today", "what"),
    [
        ("shorter", "the environment ended 1 turn early"),
        ("raises", r"failed \(.*ValueError: today.*\) 2 turns early"),
        ("catches", "'agent' was sent different messages"),
        ("restarts", "'agent' was called in a different conversation"),
        ("tools", r"offered the tools \['look'\] instead of \[\]"),
    ],
)
async def test_what_counts_as_a_replay_mismatch(today: str, what: str) -> None:
    def look() -> str:
        """Look."""
        return "a wall"

    act = ""

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def play(task: Task, agent: Agent) -> Scores:
        await agent("a")
        if act == "raises":
            raise ValueError("today")
        if act == "restarts":
            agent.restart()
        if act == "catches":
            try:
                await agent("else")
            except Exception:
                return {"n": 9.0}
        await agent("b", tools=[look] if act == "tools" else [])
        if act != "shorter":
            await agent("c")
        return {"n": 1.0}

    engine = Instant(chat(), ["one", "three"])
    turns = await recorded(play, {"agent": PolicyPlayer(chat(), engine, Sampling())})
    act = today
    asked = len(engine.requests)
    with pytest.raises(ReplayMismatch, match=what) as caught:
        await play_episode(
            play,
            Task(),
            {"agent": PolicyPlayer(chat(), engine, Sampling())},
            id="e",
            resume=EpisodeResume(turns),
        )
    assert len(engine.requests) == asked
    assert caught.value.matched == (2 if today == "shorter" else 1)
    assert caught.value.recorded == turns[caught.value.matched]


@rayrl.env(tasks=[Task()], rewards={"first": 1.0})
async def buzzer(task: Task, a: Agent, b: Agent) -> Scores:
    """Two concurrent rounds; the first to answer gets the point, and both are told."""
    points = {"a": 0.0, "b": 0.0}

    async def ask(agent: Agent, text: str) -> None:
        await agent(text)
        if not first:
            first.append(agent.seat)

    for number in range(2):
        first: list[str] = []
        await asyncio.gather(ask(a, f"round {number}"), ask(b, f"round {number}"))
        points[first[0]] += 1.0
        await asyncio.gather(a(f"{first[0]} was first"), b(f"{first[0]} was first"))
    return {"a": {"first": points["a"]}, "b": {"first": points["b"]}}


class Slow:
    """Replies with its name, after yielding to others."""

    trainable = False

    def __init__(self, name: str, pauses: int) -> None:
        self.name, self.pauses = name, pauses

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        for _ in range(self.pauses):
            await asyncio.sleep(0)
        return Turn(conversation.seat, tuple(new), self.name, "stop", state=options.state)


async def test_seats_called_concurrently_are_answered_in_the_recorded_order() -> None:
    late_a = {"a": Slow("a", 9), "b": Slow("b", 1)}
    late_b = {"a": Slow("a", 1), "b": Slow("b", 9)}
    (group,) = await collect(buzzer, [PLAN], late_a, concurrency=1)
    (episode,) = group.episodes
    assert [turn.seat for turn in episode.turns] == ["b", "a"] * 4
    assert episode.scores == {"a": {"first": 0.0}, "b": {"first": 2.0}}
    for made in range(len(episode.turns) + 1):  # even when replayed concurrently, b is first
        again, _ = await resumed(buzzer, PLAN, late_a, PartialEpisode(episode.turns[:made]))
        assert again == episode
        assert (again.replayed, again.replay_mismatches) == (made, 0)
    again, _ = await resumed(buzzer, PLAN, late_b, PartialEpisode(episode.turns[:5]))
    assert again.scores == {"a": {"first": 0.0}, "b": {"first": 2.0}}  # b had answered twice


async def test_other_seats_do_not_wait_after_a_mismatch() -> None:
    turns = await recorded(buzzer, {"a": Slow("a", 9), "b": Slow("b", 1)})
    other = replace(turns[0], prompt=(user("round 7"),))
    with pytest.raises(ReplayMismatch, match="'b' was sent different messages"):
        await play_episode(
            buzzer,
            Task(),
            {}.fromkeys("ab", Slow("", 0)),
            id="e",
            resume=EpisodeResume([other, turns[1]]),
        )
    for _ in range(5):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}  # a's call has ended too


async def test_an_answer_after_the_end_is_dropped() -> None:
    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def hasty(task: Task, a: Agent, b: Agent) -> Scores:
        late.append(asyncio.ensure_future(b("?")))
        return {"a": {"n": float(len(await a("?")))}, "b": {"n": 0.0}}

    late: list[asyncio.Future[Any]] = []
    log = TurnLog()
    players = {"a": Slow("a", 1), "b": Slow("b", 9)}
    (group,) = await collect(hasty, [PLAN], players, concurrency=1, on_turn=log.add)
    assert await late[0] == "b"
    assert [turn.seat for turn in group.episodes[0].turns] == ["a"]
    assert log.partial_episodes() == {"g/0": PartialEpisode(group.episodes[0].turns, 1)}


async def test_the_state_key_comes_from_the_current_code() -> None:
    key = "old"

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def keyed(task: Task, agent: Agent) -> Scores:
        return {"n": float(len(await agent("one", state=key) + await agent("two")))}

    turns = await recorded(keyed, says())
    key = "new"
    episode, _ = await resumed(keyed, PLAN, {"agent": Flaky(9)}, PartialEpisode(turns))
    assert [turn.state for turn in episode.turns] == ["new", "two"]
    assert episode.replayed == 2


async def test_turns_not_replayed_are_kept_for_the_next_attempt() -> None:
    fails = 0

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def connects(task: Task, agent: Agent) -> Scores:
        nonlocal fails
        await agent("one")
        if fails:
            fails -= 1
            raise InfraError("its database is away")
        await agent("two")
        return {"n": float(len(await agent("three")))}

    turns = await recorded(connects, says())
    paid = tuple(replace(turn, usage=Usage(1, 0, 10, k)) for k, turn in enumerate(turns, 1))
    fails = 1
    nobody: dict[str, Any] = {"agent": Flaky(9)}
    episode, told = await resumed(connects, PLAN, nobody, PartialEpisode(paid))
    assert episode.failure is None
    assert (episode.replayed, episode.retried_usage) == (3, None)
    assert told == {"g/0": PartialEpisode(paid, 3)}
    fails = 9
    episode, _ = await resumed(connects, PLAN, nobody, PartialEpisode(paid))
    assert episode.failure is not None
    assert episode.failure.kind == "infra"
    assert (episode.replayed, episode.retried_usage) == (1, Usage(2, 0, 20, 5))


async def test_a_seat_whose_turn_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrl.rollout.resume.PATIENCE_S", 0.01)
    begins = itertools.cycle("ab")

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def coin(task: Task, a: Agent, b: Agent) -> Scores:
        seats = {"a": a, "b": b}
        first = next(begins)
        heard = await seats.pop(first)("you begin")
        await next(iter(seats.values()))(heard)
        return {"a": {"n": 1.0}, "b": {"n": 0.0}}

    players = {"a": Slow("a", 0), "b": Slow("b", 0)}
    turns = await recorded(coin, players)
    assert [turn.seat for turn in turns] == ["a", "b"]
    with pytest.raises(ReplayMismatch, match="'a' should have been called before 'b'"):
        await play_episode(coin, Task(), players, id="e", resume=EpisodeResume(turns))
    next(begins)  # so that b begins again
    episode, _ = await resumed(coin, PLAN, players, PartialEpisode(turns))
    assert episode.failure is None
    assert (episode.replayed, episode.replay_mismatches) == (0, 1)


async def test_forks_call_the_player_again_and_restarts_are_replayed() -> None:
    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def branches(task: Task, agent: Agent) -> Scores:
        await agent("one")
        side = agent.fork()
        heard = await side("aside")
        await agent(f"it said {heard}")
        agent.restart()
        await agent("anew")
        await agent("and on")
        return {"n": float(agent.turns)}

    def players(engine: Instant) -> dict[str, Any]:
        return {"agent": PolicyPlayer(chat(), engine, Sampling())}

    texts = ["one", "three", "the lazy dog"]
    first = Instant(chat(), texts)
    turns = await recorded(branches, players(first))
    assert [turn.offset > 0 for turn in turns] == [False, True, False, True]
    for made in range(len(turns) + 1):
        engine = Instant(chat(), texts)
        episode, _ = await resumed(branches, PLAN, players(engine), PartialEpisode(turns[:made]))
        assert episode.turns == turns
        assert episode.replayed == made
        aside = made > 0
        assert len(engine.requests) == len(turns) - made + aside + (not aside)
        by_prompt = {request.prompt_ids: request.seed for request in first.requests}
        assert all(by_prompt[r.prompt_ids] == r.seed for r in engine.requests)


@pytest.mark.parametrize("protocol", ["native", "text"])
async def test_a_tool_loop_resumes_in_the_middle(protocol: Any) -> None:
    ran: list[int] = []

    def double(number: int) -> int:
        """Twice a number."""
        ran.append(number)
        return 2 * number

    @rayrl.env(tasks=[Task()], rewards={"right": 1.0})
    async def sums(task: Task, agent: Agent) -> Scores:
        reply = await agent("?", tools=[double], protocol=protocol)
        last = await agent("sure?", tools=[double], protocol=protocol)
        ids = [call.id for call in (*reply.tool_calls, *last.tool_calls)]
        assert ids == ["call_0", "call_1", "call_2"]
        return {"right": float(reply == "8")}

    def call(number: int) -> str:
        native = rayrl.format_call("double", {"number": number})
        return native if protocol == "native" else format_line("double", str(number))

    from rayrl.chat.renderer import Chat

    speaks = Chat(build_tokenizer(HERMES))
    texts = [call(2), call(4), "8", call(8), "yes"]
    sampling = Sampling(max_tokens=4096)
    turns = await recorded(sums, {"agent": PolicyPlayer(speaks, InTurn(speaks, *texts), sampling)})
    assert len(turns) == 5
    for made in range(6):
        ran.clear()
        player = PolicyPlayer(speaks, InTurn(speaks, *texts[made:]), sampling)
        episode, _ = await resumed(sums, PLAN, {"agent": player}, PartialEpisode(turns[:made]))
        assert episode.failure is None
        assert episode.turns == turns
        assert episode.scores == {"agent": {"right": 1.0, "tool_calls": 3.0, "tool_errors": 0.0}}
        assert ran == [2, 4, 8]  # tools are environment code and run again


def ranked(episodes: Sequence[Episode]) -> list[float]:
    lengths = sorted(episode.scores["agent"]["n"] for episode in episodes)
    return [float(lengths.index(episode.scores["agent"]["n"])) for episode in episodes]


async def test_group_rewards_with_one_resumed_episode() -> None:
    rewards = {"n": 1.0, "rank": rayrl.group_reward(ranked)}
    env = rayrl.env(tasks=[Task(seed=4)], rewards=rewards, name="ranks")(three.play)
    plan = GroupPlan("g", Task(seed=4), 3, 7)

    def players() -> dict[str, Any]:
        engine = Instant(chat(), ["one", "the lazy dog", "three"])
        return {"agent": PolicyPlayer(chat(), engine, Sampling())}

    (whole,) = await collect(env, [plan], players(), concurrency=3)
    begun = {"g/1": PartialEpisode(whole.episodes[1].turns[:2])}
    (again,) = await collect(env, [plan], players(), concurrency=3, recorded=begun)
    assert again == whole
    assert [episode.replayed for episode in again.episodes] == [0, 2, 0]
    assert any(episode.scores["agent"]["rank"] for episode in again.episodes)


FAR = """
    import itertools
    from pathlib import Path
    import rayrl

    def look(number: int) -> str:
        '''Look.'''
        return f"seen {number}"

    @rayrl.env(tasks=[rayrl.Task(seed=s) for s in range(2)], rewards={"n": 1.0})
    async def far(task, a, b):
        n = len(await a("go"))
        n += len(await b(f"a said {n}", tools=[look]))
        a.restart()
        n += len(await a(f"anew {task.rng(n).random()}"))
        if task.seed:
            file = Path(__file__).with_name("count")
            count = len(file.read_text()) if file.exists() else 0
            file.write_text("x" * (count + 1))
            n += len(await a(f"time {count}"))
        return {"a": {"n": n}, "b": {"n": n}}
"""


async def test_isolated_environments_resume(tmp_path: Path) -> None:
    path = tmp_path / "far.py"
    path.write_text(textwrap.dedent(FAR))
    far = rayrl.load_env(str(path))

    def player(messages: Sequence[Message], rng: Any) -> str:
        called = any(m.role == "tool" for m in messages)
        asks = messages[-1].content.startswith("a said") and not called
        return rayrl.format_call("look", {"number": 3}) if asks else f"x{rng.randrange(9)}"

    async with SubprocessEnv(far, slots=1) as env:
        plan = GroupPlan("g", Task(seed=0), 1, 7)
        (group,) = await collect(env, [plan], dict.fromkeys("ab", Teacher(player)), concurrency=1)
        (episode,) = group.episodes
        assert [turn.seat for turn in episode.turns] == ["a", "b", "b", "a"]
        for made in range(5):
            players = {seat: Teacher(player) for seat in "ab"}
            again, _ = await resumed(env, plan, players, PartialEpisode(episode.turns[:made]))
            assert again == episode
            assert again.replayed == made
            assert sum(len(one.sessions) for one in players.values()) == 4 - made
        plan = GroupPlan("g", Task(seed=1), 1, 7)
        (group,) = await collect(env, [plan], dict.fromkeys("ab", Teacher(player)), concurrency=1)
        turns = group.episodes[0].turns
        assert turns[-1].prompt[0].content == "time 0"
        again, _ = await resumed(
            env, plan, dict.fromkeys("ab", Teacher(player)), PartialEpisode(turns)
        )
        assert again.failure is None
        assert again.turns[-1].prompt[0].content == "time 2"
        assert (again.replayed, again.replay_mismatches) == (0, 1)


def test_turn_log_drops_outdated_attempts() -> None:
    log = TurnLog()
    one, two = (Turn("agent", (), text, "stop") for text in ("one", "two"))
    log.add("g/0", 0, one)
    log.add("g/0", 0, two)
    log.add("h/0", 0, one)
    assert log.partial_episodes() == {
        "g/0": PartialEpisode((one, two), 1),
        "h/0": PartialEpisode((one,), 1),
    }
    log.add("g/0", 1, one)
    log.add("g/0", 0, two)  # from a worker that was believed dead
    log.remove("h")
    assert log.partial_episodes() == {"g/0": PartialEpisode((one,), 2)}


async def test_an_env_worker_sends_pickled_turns_and_nothing_of_a_group_that_has_ended() -> None:
    one = Turn("agent", (user("?"),), "one", "stop", completion_ids=(3,), rollout_logprobs=(-0.5,))
    recorder = Recorder()
    told: list[list[str]] = []

    class Remote:
        class add:
            @staticmethod
            async def remote(turns: Any) -> None:
                told.append([episode for episode, *_ in turns])
                recorder.add(turns)

    sender = TurnSender(Remote)
    for episode in ("g/0", "g/1", "h/0", "k/0"):
        sender.add(episode, 0, one)
    done = Episode("h/0", "env", Task(), 0, (one,))
    sender.drop_ended(Group("h", Task(), (done,)))
    failed = replace(done, failure=Failure("infra", "its replica died"))
    sender.drop_ended(Group("k", Task(), (failed,)))  # it is played again from what is told
    while not told:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert told == [["g/0", "g/1", "k/0"]]
    assert recorder.partial_episodes(["g", "none"]) == {
        "g/0": PartialEpisode((one,), 1),
        "g/1": PartialEpisode((one,), 1),
    }
    recorder.discard(["g"])
    assert recorder.partial_episodes(["g", "k"]) == {"k/0": PartialEpisode((one,), 1)}


PLAYING = """
    import asyncio, os, pickle, signal, sys
    import rayrl
    from rayrl.chat.renderer import Chat
    from rayrl.config import EngineConfig
    from rayrl.engine import open_engine
    from rayrl.weights.model_dir import EMBEDDED, model_dir
    from rayrl.rollout.players import PolicyPlayer
    from rayrl.rollout.rollout import GroupPlan, play_groups
    from rayrl.rollout.resume import TurnLog
    from rayrl.types import Sampling

    async def main(journal, result, die_after):
        env = rayrl.load_env("tictactoe_versus")
        log, made = TurnLog(), 0
        if os.path.exists(journal):
            with open(journal, "rb") as file:
                while frame := file.peek(1):
                    log.add(*pickle.load(file))
        out = open(journal, "ab")

        def told(*what):
            nonlocal made
            made += 1
            pickle.dump(what, out)
            out.flush()
            if made == die_after:
                os.kill(os.getpid(), signal.SIGKILL)

        engine = open_engine(model_dir(EMBEDDED), EngineConfig())
        player = PolicyPlayer(Chat.load(EMBEDDED), engine, Sampling(max_tokens=12))
        plan = GroupPlan("g", env.tasks(0, 1)[0], 3, 1)
        groups = []
        for options in ({"recorded": log.partial_episodes(), "on_turn": told}, {}):
            players = dict.fromkeys(env.seats, player)
            async for group in play_groups(env, [plan], players, concurrency=3, **options):
                groups.append(group)
        with open(result, "wb") as file:
            pickle.dump(groups, file)
        await engine.close()

    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.slow
def test_episodes_outlive_processes_that_are_killed(tmp_path: Path) -> None:
    code, journal, result = (tmp_path / name for name in ("playing.py", "journal", "result"))
    code.write_text(textwrap.dedent(PLAYING))

    def play(die_after: int) -> int:
        words = [sys.executable, str(code), str(journal), str(result), str(die_after)]
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, env=threads, check=False).returncode

    rayrl.load_env("tictactoe_versus")  # its task class, for pickle
    assert play(4) == -signal.SIGKILL
    assert play(9) == -signal.SIGKILL  # four turns were resumed, five are new
    assert play(0) == 0
    again, whole = pickle.loads(result.read_bytes())
    assert again == whole  # ids, logprobs and scores of the model that ships with rayrl
    assert whole.complete
    assert len({episode.turns for episode in whole.episodes}) == 3
    assert sum(episode.replayed for episode in again.episodes) >= 9
    assert sum(episode.replayed for episode in whole.episodes) == 0
