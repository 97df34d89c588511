"""Collecting by hand: which plans begin when, what is a batch, what survives a death."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.cluster.rollouts import CollectedGroups
from rayrl.cluster.workers.worker_pool import Load
from rayrl.config import Config, from_dict
from rayrl.errors import ConfigError, DataError, RunFailed
from rayrl.rollout.rollout import GroupPlan
from rayrl.run import collector
from rayrl.run.collector import GroupCollector
from rayrl.run.group_log import Batched, GroupLog, Played
from rayrl.run.rollout_buffer import GroupState, _Entry
from rayrl.types import Episode, Failure, Group, Task, Turn, VersionSpan

N = 2  # groups a step


def config(lag: int, steps: int = 4, refill: float = 1, budget: float = 1) -> Config:
    return from_dict(
        {
            "env": {"name": "x", "failure_budget": budget},
            "train": {
                "groups": N,
                "group_size": 1,
                "steps": steps,
                "max_lag": lag,
                "refill": refill,
            },
        }
    )


class Tasks:
    """One after the other; an index is a task's seed. It notes what it observes."""

    def __init__(self) -> None:
        self.observed: list[list[int]] = []

    def plan(self, index: int) -> GroupPlan:
        return GroupPlan("{}-{}".format(*divmod(index, N)), Task(seed=index), 1, index)

    def is_uniform(self, index: int) -> bool:
        return index % 4 != 3

    def draws(self) -> dict[int, float]:
        return {}

    def observe(self, groups: Mapping[int, Group]) -> dict[str, float]:
        self.observed.append(sorted(groups))
        return {"pools/seen": float(len(self.observed))}

    def save(self) -> dict[str, Any]:
        return {"observed": self.observed.copy()}

    def load(self, state: Mapping[str, Any], draws: Mapping[int, float]) -> None:
        self.observed = list(state.get("observed", ()))


def plans(step: int) -> list[GroupPlan]:
    return [Tasks().plan(step * N + k) for k in range(N)]


def group(plan: GroupPlan, version: int, kind: str = "") -> Group:
    turn = Turn("agent", (), "x", "stop", 0, (1,), (2,), (0.0,), (VersionSpan(version, 0, 1),))
    failure = Failure(kind, "because") if kind else None  # type: ignore[arg-type]
    rewards = {} if kind else {"agent": 1.0}
    episode = Episode(f"{plan.id}/0", "x", plan.task, 0, (turn,), {}, rewards, failure)
    return Group(plan.id, plan.task, (episode,))


class Workers:
    """Plays what it is told to end, when it is told; a group has the version it began with."""

    def __init__(self) -> None:
        self.live: dict[str, tuple[GroupPlan, int, Callable[[Group], None]]] = {}
        self.begun: list[str] = []
        self._idle: list[tuple[set[str], asyncio.Event]] = []
        self.broken: Exception | None = None
        self.discarded: list[str] = []

    async def play(
        self, plans: Sequence[GroupPlan], min_version: int, on_group: Callable[[Group], None]
    ) -> None:
        if self.broken:
            raise self.broken
        for plan in plans:
            assert plan.id not in self.live
            self.live[plan.id] = plan, min_version, on_group
            self.begun.append(plan.id)
        left, done = {plan.id for plan in plans}, asyncio.Event()
        self._idle.append((left, done))
        await done.wait()

    def end(self, *names: str, kind: str = "") -> None:
        for name in names:
            plan, version, on_group = self.live.pop(name)
            on_group(group(plan, version, kind))
            for left, done in self._idle:
                left.discard(name)
                if not left:
                    done.set()

    def load(self) -> Load:
        return Load(workers=1, asked=0, waiting=0)

    def cancel(self, plans: Sequence[str], oldest: int) -> None:
        for name in plans:
            if name in self.live and self.live[name][1] < oldest:
                self.end(name, kind="stopped")

    def discard_turns(self, groups: Sequence[str]) -> None:
        self.discarded = list(groups)


class Run:
    """A collector with its workers."""

    def __init__(
        self, folder: Path, lag: int, steps: int = 4, refill: float = 1, budget: float = 1
    ) -> None:
        self.workers = Workers()
        settings = config(lag, steps, refill, budget)
        self.tasks = Tasks()
        self.collector = GroupCollector(self.workers, self.tasks, settings, GroupLog(folder))

    async def start(self, step: int = 0, state: dict[str, Any] | None = None) -> Run:
        self.collector.restore(step, state or {})
        await self.at(step)
        return self

    async def at(self, version: int) -> None:
        self.collector.advance(version)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def batch(self, step: int) -> list[str]:
        return [group.id for group in (await self.collector.collect(step)).groups]

    async def waits(self, step: int) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await self.collector.collect(step)
                return False
        return True

    @property
    def live(self) -> list[str]:
        return sorted(self.workers.live)


Start = Callable[..., Awaitable[Run]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Opens runs in one folder, as a process that is killed and started again does."""
    runs = []

    async def start(
        lag: int,
        steps: int = 4,
        step: int = 0,
        state: Any = None,
        refill: float = 1,
        budget: float = 1,
    ) -> Run:
        runs.append(Run(tmp_path, lag, steps, refill, budget))
        return await runs[-1].start(step, state)

    yield start
    for run in runs:
        await run.collector.__aexit__()


async def test_without_lag_a_batch_is_the_steps_own_groups_and_waits_for_all(
    start: Start,
) -> None:
    run = await start(0, steps=2)
    assert run.live == ["0-0", "0-1"]
    run.workers.end("0-1")
    assert await run.waits(0)
    run.workers.end("0-0")
    assert await run.batch(0) == ["0-0", "0-1"]
    assert run.live == []
    await run.at(1)
    assert run.live == ["1-0", "1-1"]
    run.workers.end("1-0", "1-1")
    assert await run.batch(1) == ["1-0", "1-1"]
    await run.at(2)
    assert run.live == [], "there are two steps"


async def test_without_lag_a_failed_group_is_dropped_and_not_replaced(start: Start) -> None:
    run = await start(0)
    run.workers.end("0-1", kind="env")
    run.workers.end("0-0")
    played = await run.collector.collect(0)
    assert [one.id for one in played.groups] == ["0-0"]
    assert [one.id for one in played.dropped] == ["0-1"]
    await run.at(1)
    assert run.live == ["1-0", "1-1"]


async def test_with_lag_groups_begin_ahead_and_a_straggler_is_for_a_later_batch(
    start: Start,
) -> None:
    run = await start(1)
    assert run.live == ["0-0", "0-1", "1-0", "1-1"]
    run.workers.end("0-1", "1-1")
    assert await run.batch(0) == ["0-1", "1-1"], "it does not wait for 0-0"
    await run.at(1)
    assert run.live == ["0-0", "1-0", "2-0", "2-1"]
    run.workers.end("2-1", "2-0", "0-0")
    played = await run.collector.collect(1)
    assert [one.id for one in played.groups] == ["0-0", "2-0"], "the oldest first"
    assert (played.waiting, played.live) == (1, 1)


async def test_what_is_too_old_is_stopped_and_its_task_is_played_again(start: Start) -> None:
    run = await start(1)
    run.workers.end("0-1", "1-1")
    await run.batch(0)
    await run.at(1)
    run.workers.end("2-0", "2-1")
    assert await run.batch(1) == ["2-0", "2-1"]
    await run.at(2)  # 0-0 and 1-0 began with version 0
    assert run.live == ["0-0~1", "1-0~1", "3-0", "3-1"]
    run.workers.end("0-0~1", "3-1")
    played = await run.collector.collect(2)
    assert [one.id for one in played.groups] == ["0-0~1", "3-1"]
    assert [one.id for one in played.stale_groups] == ["0-0", "1-0"]
    assert played.groups[0].task == plans(0)[0].task
    run.workers.end("1-0~1", "3-0")
    await run.at(3)
    assert await run.batch(3) == ["1-0~1", "3-0"], "every task of four steps was trained on once"


async def test_a_complete_group_that_waited_too_long_is_not_trained_on(start: Start) -> None:
    run = await start(1)
    run.workers.end("0-0", "0-1", "1-0")
    assert await run.batch(0) == ["0-0", "0-1"]
    await run.at(1)
    run.workers.end("2-0", "2-1")
    run.workers.end("1-1")
    assert await run.batch(1) == ["1-0", "1-1"]
    await run.at(2)
    run.collector._buffer._entries[9] = _Entry(
        GroupState.READY, group=group(plans(4)[1], 0)
    )  # two versions old at step 2
    assert await run.batch(2) == ["2-0", "2-1"]
    await run.at(3)
    run.workers.end("3-0", "3-1")
    assert await run.batch(3) == ["3-0", "3-1"]


async def test_with_lag_a_failed_group_makes_room_for_another(start: Start) -> None:
    run = await start(1)
    run.workers.end("0-0", kind="env")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert run.live == ["0-1", "1-0", "1-1", "2-0"]


async def test_what_cannot_be_played_ends_the_run(start: Start) -> None:
    run = await start(0)
    run.workers.end("0-0", "0-1")
    await run.batch(0)
    run.workers.broken = RunFailed("no workers")
    await run.at(1)
    with pytest.raises(RunFailed, match="no workers"):
        await run.batch(1)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("kind", ["env", "infra"])
async def test_a_run_that_failed_plays_what_failed_again(start: Start, lag: int, kind: str) -> None:
    run = await start(lag, budget=0.2)
    run.workers.end("0-0", "0-1")
    await run.batch(0)
    await run.at(1)
    state = run.collector.begin_checkpoint(1)
    ahead = [name for name in run.live if name not in ("1-0", "1-1")]
    run.workers.end(*run.live, kind=kind)  # with a lag, others begin in their place
    with pytest.raises(RunFailed, match=r"because\n(.*\n)*The same command plays"):
        await run.batch(1)

    failed = await start(lag, step=1, state=state, budget=0.2)  # the cause is still there
    assert set(failed.live) >= {"1-0~1", "1-1~1", *(f"{name}~1" for name in ahead)}
    failed.workers.end("1-0~1")
    for _ in range(2):
        failed.workers.end(*failed.live, kind="env")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    with pytest.raises(RunFailed, match=r"env\.failure_budget"):
        await failed.batch(1)

    again = await start(lag, step=1, state=state, budget=0.2)
    assert again.live[0] == "1-1~2", "1-0 is there"
    again.workers.end(*again.live)
    await asyncio.sleep(0)
    first = await again.batch(1)
    assert first == ["1-0~1", "1-1~2"]
    await again.at(2)
    state = again.collector.begin_checkpoint(2)
    again.workers.end(*again.live)
    assert not set(await again.batch(2)) & set(first)

    later = await start(lag, step=2, state=state)  # killed, as any other run
    later.workers.end(*later.live)
    assert not set(await later.batch(2)) & set(first)


async def test_killed_it_goes_on_with_the_same_batches_and_plays_only_the_rest(
    start: Start,
) -> None:
    run = await start(1)
    run.workers.end("0-1", "1-1")
    await run.batch(0)
    await run.at(1)
    state = run.collector.begin_checkpoint(1)
    run.workers.end("2-1", "2-0", "0-0")
    assert await run.batch(1) == ["0-0", "2-0"]
    await run.at(2)
    assert run.live == ["1-0~1", "3-0", "3-1"]

    again = await start(1, step=1, state=state)  # it was killed here
    assert again.live == [], "turns of 1-0 may be of the weights that the next batch leads to"
    assert await again.batch(1) == ["0-0", "2-0"], "as it was"
    await again.at(2)
    assert again.live == ["1-0", "3-0", "3-1"], "2-1 is there"
    again.workers.end("3-1")
    assert await again.batch(2) == ["2-1", "3-1"]
    await again.at(3)
    assert again.live == ["1-0", "3-0"]
    again.workers.end("1-0", "3-0")
    assert await again.batch(3) == ["1-0", "3-0"]


async def test_killed_it_remembers_which_groups_taught_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach = {"0-1", "1-1", "2-1", "3-0", "3-1"}
    monkeypatch.setattr(collector, "has_spread", lambda group: group.id in teach)
    run = await start(0, refill=3)
    run.workers.end("0-1", "0-0")
    await run.at(0)
    assert run.live == ["1-0"], "instead of 0-0"
    run.workers.end("1-0")
    await run.at(0)
    run.workers.end("1-1")
    found = await run.collector.collect(0)
    assert [one.id for one in found.groups] == ["0-1", "1-1"]
    assert [one.id for one in found.rejected] == ["0-0", "1-0"]
    assert [one.id for one in found.sample] == ["0-0", "0-1"], "drawn first"
    await run.at(1)
    assert run.live == ["2-0", "2-1"]
    run.workers.end("2-0")
    await run.at(1)

    again = await start(0, refill=3)  # it was killed here, before the first checkpoint
    assert await again.collector.collect(0) == replace(found, load=again.workers.load())
    await again.at(1)
    assert again.live == ["2-1", "3-0"], "2-0 is there, and was replaced"
    assert again.tasks.observed == run.tasks.observed == [[0, 1, 2, 3]], "what ended in the batch"
    again.workers.end("2-1", "3-0")
    assert await again.batch(1) == ["2-1", "3-0"]
    state = again.collector.begin_checkpoint(2)

    last = await start(0, step=2, state=state, refill=3)
    assert last.live == ["3-1", "4-0"]


async def test_a_learner_that_went_back_gets_the_same_batches(start: Start) -> None:
    run = await start(0)
    for step in range(2):
        run.workers.end(f"{step}-0", f"{step}-1")
        await run.batch(step)
        await run.at(step + 1)
    run.workers.end("2-0", "2-1")
    await run.batch(2)
    run.collector.rewind(0, {})  # it died at step 2, before the first checkpoint
    for step in range(3):
        assert await run.batch(step) == [f"{step}-0", f"{step}-1"]
        await run.at(step + 1)
    assert run.live == ["3-0", "3-1"]
    assert len(run.workers.begun) == 8, "nothing was played twice"
    assert run.tasks.observed == [[0, 1], [2, 3], [4, 5]], "nor observed twice"


async def test_a_checkpoint_on_the_way_back_keeps_what_is_still_to_be_learned_again(
    start: Start,
) -> None:
    run = await start(0)
    for step in range(3):
        run.workers.end(f"{step}-0", f"{step}-1")
        await run.batch(step)
        await run.at(step + 1)
    run.collector.rewind(0, {})
    await run.batch(0)
    state = run.collector.begin_checkpoint(1)
    again = await start(0, step=1, state=state)
    assert await again.batch(1) == ["1-0", "1-1"]
    assert await again.batch(2) == ["2-0", "2-1"]
    await again.at(3)
    assert again.workers.begun == ["3-0", "3-1"]
    assert again.tasks.observed == [[0, 1], [2, 3], [4, 5]], "each once, by the one or the other"


async def test_what_ended_during_a_checkpoint_that_failed_is_not_lost(start: Start) -> None:
    run = await start(0)
    run.workers.end("0-0", "0-1")
    await run.batch(0)
    await run.at(1)
    run.collector.begin_checkpoint(1)
    run.workers.end("1-0")
    run.collector.rewind(0, {})  # the learner died before it had saved
    assert await run.batch(0) == ["0-0", "0-1"]
    run.workers.end("1-1")
    assert await run.batch(1) == ["1-0", "1-1"]
    again = await start(0)
    for step in range(2):
        assert await again.batch(step) == [f"{step}-0", f"{step}-1"]
    assert again.workers.begun == []


@pytest.fixture
def log(tmp_path: Path) -> Iterator[GroupLog]:
    one = GroupLog(tmp_path)
    yield one
    one.close()


def test_a_torn_record_is_cut_off_and_the_log_goes_on(log: GroupLog, tmp_path: Path) -> None:
    first = [Played(k, group(plans(0)[k], 0)) for k in range(2)]
    log.begin(3, first)
    log.add(Batched(3, (0, 1)))
    log.close()
    file = tmp_path / "step_000003.log"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert log.read(3) == first
    log.add(Batched(3, (1, 0)))
    assert log.read(3) == [*first, Batched(3, (1, 0))]
    log.begin(4, [])
    assert file.is_file(), "its checkpoint is still the newest"
    log.delete_others(4)
    assert [one.name for one in tmp_path.iterdir()] == ["step_000004.log"]


def test_a_file_that_is_no_log_is_named(log: GroupLog, tmp_path: Path) -> None:
    (tmp_path / "step_000000.log").write_bytes(b"\0\0\0\5hello")
    with pytest.raises(DataError, match=r"step_000000.log, byte 0: .* remove the file"):
        log.read(0)


async def test_a_step_that_was_not_begun_or_is_collected_twice_says_so(start: Start) -> None:
    run = await start(lag=0)
    run.workers.end("0-0", "0-1")
    await run.batch(0)
    for step in (0, 1):  # 1 has not begun: nobody has pushed
        with pytest.raises(ConfigError, match=rf"step {step} has nothing to train on.*push"):
            await run.batch(step)
    await run.at(1)
    run.workers.end("1-0", "1-1")
    assert await run.batch(1) == ["1-0", "1-1"]


async def test_nothing_is_learned_where_a_server_refused_everything(start: Start) -> None:
    run = await start(lag=0)
    run.workers.end("0-0", "0-1", kind="refused")
    with pytest.raises(RunFailed, match=r"none of 2 groups is complete.\n.*because"):
        await run.batch(0)


# --- what is drawn by what was played -------------------------------------------------------------


class Learns(Tasks):
    """Draws depend on all that was observed; a task's seed says by which it was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[int, float] = {}

    def plan(self, index: int) -> GroupPlan:
        known = sum((k + 1) * seed for k, seed in enumerate(chain(*self.observed)))
        draw = self.drawn.setdefault(index, index + 100 * (known % 997))
        return replace(super().plan(index), task=Task(seed=int(draw)))

    def draws(self) -> dict[int, float]:
        return dict(self.drawn)

    def observe(self, groups: Mapping[int, Group]) -> dict[str, float]:
        drawn = {index: self.drawn.pop(index) for index in groups}
        assert drawn == {index: group.task.seed for index, group in groups.items()}
        self.observed.append(sorted(group.task.seed for group in groups.values()))
        return {"seen": float(len(self.observed))}

    def save(self) -> dict[str, Any]:
        drawn = {str(index): draw for index, draw in self.drawn.items()}
        return {"observed": self.observed.copy(), "drawn": drawn}

    def load(self, state: Mapping[str, Any], draws: Mapping[int, float]) -> None:
        super().load(state, draws)
        self.drawn = {int(index): draw for index, draw in state.get("drawn", {}).items()}
        self.drawn |= draws


class Story:
    """A run in which everything happens that may: `happen` says what is next.

    Attributes:
        batches: what each step was given, the last time it was.
        tasks: what each group played; a group that begins again plays the same.
    """

    def __init__(self, folder: Path, lag: int, refill: float, choose: Callable[..., Any]) -> None:
        self.folder, self.lag, self.refill, self.choose = folder, lag, refill, choose
        self.batches: dict[int, CollectedGroups] = {}
        self.tasks: dict[str, Task] = {}
        self.step, self.checkpoint, self.state = 0, 0, dict[str, Any]()

    async def start(self) -> None:
        """A new process goes on from the last checkpoint."""
        self.run = Run(self.folder, self.lag, refill=self.refill)
        self.run.collector._sampler = self.sampler = Learns()
        self.run.collector.restore(self.checkpoint, self.state)
        await self.go_back()

    async def go_back(self) -> None:
        self.step = self.checkpoint
        self.run.collector.rewind(self.step, self.state)
        await self.run.at(self.step)

    async def kill(self) -> None:
        await self.run.collector.__aexit__()
        await self.start()

    async def play(self) -> None:
        try:
            await self.steps()
        finally:
            await self.run.collector.__aexit__()

    async def steps(self) -> None:
        await self.start()
        while self.step < 4:
            collecting = asyncio.create_task(self.run.collector.collect(self.step))
            for _ in range(3):  # what has become too old begins anew, in a task of its own
                await asyncio.sleep(0)
            while not collecting.done() and self.choose("event", ["end"] * 6 + ["kill"]) == "end":
                await self.end_one()
            if not collecting.done():
                collecting.cancel()
                await asyncio.gather(collecting, return_exceptions=True)
                await self.kill()
                continue
            await self.take(collecting.result())

    async def end_one(self) -> None:
        """A group that is played ends."""
        name = self.choose("group", self.run.live)
        task = self.run.workers.live[name][0].task
        assert self.tasks.setdefault(name.partition("~")[0], task) == task
        fails = name.startswith("1-0") and self.lag and self.choose("fails", [False, True])
        self.run.workers.end(name, kind="env" if fails else "")
        await self.run.at(self.step)

    async def take(self, batch: CollectedGroups) -> None:
        """The step learns from a batch, and perhaps there is a checkpoint, a loss or a death."""
        if self.step in self.batches:
            before = self.batches[self.step]
            assert batch.groups == before.groups
            assert batch.sampling == before.sampling == {"seen": self.step + 1.0}
        self.batches[self.step] = batch
        self.step += 1
        await self.run.at(self.step)
        event = self.choose("event", ["", "", "checkpoint", "broken checkpoint", "lost", "kill"])
        if "checkpoint" in event:
            state = json.loads(json.dumps(self.run.collector.begin_checkpoint(self.step)))
            while self.run.live and self.choose("meanwhile", [True, False]):
                await self.end_one()
            if event == "checkpoint":
                self.checkpoint, self.state = self.step, state
                self.run.collector.log.delete_others(self.step)
            event = self.choose("then", ["", "lost", "kill"] if event == "checkpoint" else ["lost"])
        if event == "lost":
            await self.go_back()
        elif event == "kill":
            await self.kill()


@pytest.mark.parametrize("lag", [0, 1, 2])
@settings(max_examples=30)
@given(data=st.data(), refill=st.sampled_from([1.0, 2.0]), useful=st.sets(st.integers(0, 12)))
def test_whatever_happens_a_group_keeps_its_task_and_every_batch_is_observed_once(
    lag: int, data: st.DataObject, refill: float, useful: set[int]
) -> None:
    def choose(label: str, among: Sequence[Any]) -> Any:
        return data.draw(st.sampled_from(among), label=label)

    def simply(label: str, among: Sequence[Any]) -> Any:
        return among[0]

    def teaches(group: Group) -> bool:
        step, _, k = group.id.partition("~")[0].partition("-")
        return int(step) * N + int(k) in useful

    def played(choose: Callable[..., Any]) -> Story:
        with tempfile.TemporaryDirectory() as folder:
            story = Story(Path(folder), lag, refill, choose)
            asyncio.run(story.play())
        return story

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collector, "has_spread", teaches)
        story = played(choose)
        batches = [
            sorted(g.task.seed for gs in (b.groups, b.dropped, b.rejected) for g in gs)
            for _, b in sorted(story.batches.items())
        ]
        assert story.sampler.observed == batches
        if lag == 0:
            undisturbed = played(simply)
            assert [b.groups for b in undisturbed.batches.values()] == [
                b.groups for _, b in sorted(story.batches.items())
            ]
