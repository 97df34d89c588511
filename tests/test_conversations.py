"""An episode is a tree of turns: agents that branch and restart, rows, what follows, replays."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import rayrl
from rayrl import Agent, EnvError, Episode, Group, ScriptedPlayer, Task
from rayrl.config import AlgoConfig
from rayrl.conversations import transcripts, turns_after
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.report.console import episode_panel
from rayrl.report.page import _episode
from rayrl.rollout.conversation import Point
from rayrl.rollout.episode_io import episode_from_json, episode_to_json
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.records import group_from_bytes, group_to_bytes
from rayrl.rollout.resume import EpisodeResume
from rayrl.types import Completion, Message, Origin, Request, Sampling, Turn
from tests.act import Instant, chat

OPERATIONS = ("ask", "ask", "ask", "branch", "back", "name", "begin", "restart", "fork")
Program = Sequence[tuple[int, str]]  # which of the agents there are, and what is done with it


@dataclass
class Played:
    """What agents did, as told by a model of the tree that knows nothing of names and origins."""

    resume: EpisodeResume
    engine: Instant
    before: list[int | None] = field(default_factory=list)  # for each turn, the one before it
    beginning: list[int] = field(default_factory=list)  # the turn that its text begins with

    @property
    def turns(self) -> list[Turn]:
        return self.resume.turns


async def play(program: Program, recorded: Sequence[Turn] = ()) -> Played:
    engine = Instant(chat(), ["yes", "no", "perhaps"])
    player = PolicyPlayer(chat(), engine, Sampling(max_tokens=4))
    played = Played(EpisodeResume(recorded), engine)
    agents: list[tuple[Agent, int | None, int | None]] = [
        (Agent(player, resume=played.resume), None, None)
    ]
    points: list[tuple[Point, int | None, int | None]] = [(agents[0][0].point, None, None)]
    for number, (which, operation) in enumerate(program):
        k = which % len(agents)
        agent, last, first = agents[k]
        if operation == "ask":
            assert agent.turns == (0 if last is None else 1 + depth(played, last))
            await agent(f"question {number}")
            here = len(played.turns) - 1
            played.before.append(last)
            played.beginning.append(here if first is None else first)
            agents[k] = agent, here, played.beginning[-1]
            points.append((agent.point, here, played.beginning[-1]))
        elif operation == "restart":
            agent.restart()
            agents[k] = agent, last, None
        elif operation == "back":
            point, last, first = points[number % len(points)]
            agents.append((agent.branch(at=point), last, first))
        elif operation == "begin":
            agents.append((agent.branch(empty=True), None, None))
        elif operation == "fork":
            await agent.fork()("not recorded")
        else:
            agents.append((agent.branch("critic" if operation == "name" else ""), last, first))
    return played


def depth(played: Played, turn: int) -> int:
    before = played.before[turn]
    return 0 if before is None else 1 + depth(played, before)


programs = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(OPERATIONS)), max_size=16)


@settings(max_examples=300)
@given(programs)
def test_every_sampled_id_is_trained_once_after_what_the_model_had_read(program: Program) -> None:
    played = asyncio.run(play([one for one in program if one[1] != "fork"]))
    requests, turns = played.engine.requests, played.turns
    assert len({request.seed for request in requests}) == len(requests)
    conversations = {turn.conversation for turn in turns}
    assert len({request.session for request in requests}) == len(conversations)
    episode = Episode("g/0", "e", Task(), 0, tuple(turns), rewards={"agent": 1.0})
    numbers = {(0, "agent"): [1.0 + k for k in range(len(turns))]}
    rows = make_batch([Group("g", Task(), (episode,))], [numbers]).rows
    found: list[int] = []
    for row in rows:
        for number in sorted(set(row.advantages.tolist()) - {0.0}):
            k = int(number) - 1
            found.append(k)
            (places,) = (row.advantages == number).nonzero()
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            assert tuple(row.ids[: places[0]]) == requests[k].prompt_ids
            assert tuple(row.ids[places]) == turns[k].completion_ids
            assert tuple(row.rollout_logprobs[places]) == turns[k].rollout_logprobs
        assert (row.loss_mask == (row.advantages != 0)).all()
    assert sorted(found) == list(range(len(turns)))
    children = {(played.before[k], first) for k, first in enumerate(played.beginning)}
    leaves = [k for k, first in enumerate(played.beginning) if (k, first) not in children]
    assert sorted(path[-1] for path in transcripts(turns)) == leaves
    assert [path[0] for path in transcripts(turns)] == [
        played.beginning[path[-1]] for path in transcripts(turns)
    ]


@settings(max_examples=200)
@given(programs)
def test_what_follows_a_turn_is_the_longest_way_on(program: Program) -> None:
    played = asyncio.run(play(program))
    after = [0] * len(played.turns)
    for k in reversed(range(len(after))):
        before = played.before[k]
        if before is not None:
            after[before] = max(after[before], after[k] + 1)
    assert turns_after(played.turns) == after


@settings(max_examples=200)
@given(programs, st.data())
def test_the_tree_survives_files_and_replays(program: Program, data: st.DataObject) -> None:
    played = asyncio.run(play(program))
    turns = tuple(played.turns)
    episode = Episode("g/0", "e", Task(), 0, turns, {"agent": {}}, {"agent": 1.0})
    group = Group("g", Task(), (episode,))
    assert group_from_bytes(group_to_bytes(group)) == group
    assert episode_from_json(episode_to_json(episode)).turns == turns
    made = data.draw(st.integers(0, len(turns)))
    again = asyncio.run(play(program, turns[:made]))
    assert tuple(again.turns) == turns
    assert again.resume.remaining == ()
    forks = sum(operation == "fork" for _, operation in program)
    assert len(again.engine.requests) == len(turns) - made + forks


def test_turns_whose_beginning_is_missing_are_refused() -> None:
    late = Turn("agent", (), "", "stop", conversation="/1", origin=Origin("", 2))
    with pytest.raises(ValueError, match="'/1' began after 2 turns of '', of which 0 are there"):
        transcripts([late])


def test_gigpo_discounts_by_what_follows_in_the_tree() -> None:
    """One asks twice, then two critics beside each other; the other only twice.

    At gamma 0.5, the first one's returns are 0.25 (two more turns, whichever critic), 0.5, and 1
    for each critic; were they in a line, the first would have 0.125.
    """
    line = [Turn("agent", (), "", "stop", state=state) for state in "ab"]
    critics = [
        Turn("agent", (), "", "stop", state="c", conversation=name, origin=Origin("", 2))
        for name in ("/1", "/2")
    ]
    episodes = (
        Episode("g/0", "e", Task(), 0, (*line, *critics), rewards={"agent": 1.0}),
        Episode("g/1", "e", Task(), 1, tuple(line), rewards={"agent": 0.0}),
    )
    algo = AlgoConfig(advantage="gigpo", normalize="none", step_weight=1.0, gamma=0.5)
    (values,) = advantages([Group("g", Task(), episodes)], algo)
    assert values[0, "agent"] == pytest.approx((0.5 + 0.125, 0.5 + 0.25, 0.5, 0.5))
    assert values[1, "agent"] == pytest.approx((-0.5 - 0.125, -0.5 - 0.25))


def test_names_of_branches() -> None:
    agent = Agent(ScriptedPlayer(lambda messages, rng: "ok"), episode="e")
    two = [agent.branch("critic"), agent.branch("critic")]
    assert [one.session for one in two] == ["e/agent/critic", "e/agent/critic-2"]
    assert two[0].branch().session == "e/agent/critic/1"
    for name in ("a/b", "1", "critic-2", 3):
        with pytest.raises(EnvError, match="letters, digits and _"):
            agent.branch(name)  # type: ignore[arg-type]
    with pytest.raises(EnvError, match="'agent' was never there"):
        agent.branch(at=Point("e/agent", 1))


class Late:
    """An engine whose answers come in an order that the questions say, as `late N`."""

    def __init__(self) -> None:
        self.engine = Instant(chat(), ["yes", "no", "perhaps"])

    async def generate(self, request: Request) -> Completion:
        said = re.findall(r"late (\d)", chat().text(request.prompt_ids))
        for _ in range(10 * int(said[-1])):
            await asyncio.sleep(0)
        return await self.engine.generate(request)


@rayrl.env(tasks=[Task()], rewards={"n": 1.0})
async def team(task: Task, agent: Agent) -> rayrl.Scores:
    """Two sub-agents at once, of two turns each; then a compaction."""

    async def sub(name: str, late: int) -> str:
        own = agent.branch(name, empty=True)
        for number in range(2):
            await asyncio.sleep(0)
            reply = await own(f"part {name} {number} late {late}")
        return reply

    await agent("plan, late 0")
    parts = await asyncio.gather(*[sub(name, late) for name, late in ORDER])
    await agent(f"{sorted(parts)} late 0")
    agent.restart()
    await agent("all in all, late 0")
    return {"n": 1.0}


ORDER = [("one", 1), ("two", 2)]


async def test_sub_agents_may_ask_in_another_order_when_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rayrl.rollout.resume.PATIENCE_S", 0.01)

    async def run(recorded: Sequence[Turn] = ()) -> tuple[Episode, Late]:
        late = Late()
        players = {"agent": PolicyPlayer(chat(), late, Sampling(max_tokens=9))}
        resume = EpisodeResume(recorded)
        episode = await rayrl.play_episode(team, Task(), players, id="e", seed=7, resume=resume)
        return episode, late

    calm, late = await run()
    assert calm.failure is None
    assert len(calm.turns) == 7
    assert len(transcripts(calm.turns)) == 4
    by_conversation = sorted(calm.turns, key=lambda turn: (turn.conversation, turn.offset))
    monkeypatch.setattr(f"{__name__}.ORDER", [("two", 2), ("one", 1)])
    for made in range(8):
        again, late = await run(calm.turns[:made])
        assert (again.failure, again.replayed) == (None, made)
        assert len(late.engine.requests) == 7 - made
        turns = sorted(again.turns, key=lambda turn: (turn.conversation, turn.offset))
        assert turns == by_conversation


async def test_a_seat_waits_for_its_branches_too() -> None:
    """Errors, calls without await and ends of conversations are the seat's, whoever made them."""

    class Breaks:
        trainable = False
        ended = 0

        async def answer(
            self, conversation: object, new: Sequence[Message], options: object
        ) -> Turn:
            raise rayrl.InfraError("gone")

        def end(self, conversation: object) -> None:
            self.ended += 1

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def catches(task: Task, agent: Agent) -> rayrl.Scores:
        with contextlib.suppress(rayrl.InfraError):
            await agent.branch()("?")
        return {"n": 1.0}

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def forgets(task: Task, agent: Agent) -> rayrl.Scores:
        agent.branch()("?").close()
        return {"n": 1.0}

    player = Breaks()
    episode = await rayrl.play_episode(catches, Task(), {"agent": player}, id="e")
    assert episode.failure is not None
    assert episode.failure.kind == "infra"
    assert player.ended == 2
    episode = await rayrl.play_episode(forgets, Task(), {"agent": player}, id="e")
    assert episode.failure is not None
    assert "was called without `await`, 1 of 1 times" in episode.failure.message


async def test_branches_share_the_counts_of_tools_and_the_end() -> None:
    def look() -> str:
        """Look."""
        return "a wall"

    kept: list[Agent] = []

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def looks(task: Task, agent: Agent) -> rayrl.Scores:
        kept.append(agent.branch())
        for one in (agent, kept[0]):
            await one("?", tools=[look], tool_rounds=1)
        return {"n": float(agent.tool_calls)}

    player = ScriptedPlayer(lambda messages, rng: '<tool_call>{"name": "look"}</tool_call>')
    episode = await rayrl.play_episode(looks, Task(), {"agent": player}, id="e")
    assert episode.scores["agent"]["n"] == episode.scores["agent"]["tool_calls"] == 2.0
    with pytest.raises(EnvError, match="the episode is over"):
        await kept[0]("?")


def test_people_see_where_branches_begin() -> None:
    def turn(name: str, origin: Origin | None = None) -> Turn:
        return Turn("agent", (), "ok", "stop", conversation=name, origin=origin)

    turns = (
        turn(""),
        turn("/one", Origin("", 1)),
        turn("/one", Origin("", 1)),
        turn("/1", Origin("/one", 3, empty=True)),
        turn("/two"),
    )
    episode = Episode("g/0", "e", Task(), 0, turns, {"agent": {}}, {"agent": 1.0})
    told = [
        "agent/one goes on after turn 1 of agent",
        "agent/1 begins anew after turn 3 of agent/one",
        "agent/two is a conversation of its own",
    ]
    shown = io.StringIO()
    Console(file=shown).print(episode_panel(episode))
    page = _episode("best", episode)["messages"]
    assert [m["text"] for m in page if m["role"] == "tool"] == told
    speakers = ["", "agent/one", "agent/one", "agent/1", "agent/two"]
    assert [m["speaker"] for m in page if m["role"] == "assistant"] == speakers
    for line in told:
        assert shown.getvalue().count(line) == 1
    for name in speakers[1:]:
        assert f"{name} ▸ ok" in shown.getvalue()
