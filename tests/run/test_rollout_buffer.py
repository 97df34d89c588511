"""Which groups begin, which make up a batch, what is played again: by hand, without playing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.run.group_log import Batched
from rayrl.run.rollout_buffer import MOST_FAILED, GroupState, RolloutBuffer
from rayrl.types import Episode, Failure, Group, Task, Turn, VersionSpan

PENDING, RUNNING, READY, FAILED, REJECTED = GroupState


def group(index: int, version: int = 0, kind: str = "") -> Group:
    turn = Turn("agent", (), "x", "stop", 0, (1,), (2,), (0.0,), (VersionSpan(version, 0, 1),))
    failure = Failure(kind, "because") if kind else None  # type: ignore[arg-type]
    rewards = {} if kind else {"agent": 1.0}
    task = Task(seed=index)
    return Group(
        f"{index}", task, (Episode(f"{index}/0", "x", task, 0, (turn,), {}, rewards, failure),)
    )


def end(buffer: RolloutBuffer, *indices: int, version: int = 0, kind: str = "") -> None:
    for index in indices:
        buffer.end(index, group(index, version, kind))


@pytest.mark.parametrize(
    ("lag", "version", "begun"), [(0, 0, [0, 1]), (1, 0, [0, 1, 2, 3]), (9, 0, [0, 1, 2, 3, 4, 5])]
)
def test_groups_of_as_many_steps_as_the_lag_allows_begin(
    lag: int, version: int, begun: list[int]
) -> None:
    buffer = RolloutBuffer(2, lag, steps=3)
    assert buffer.begin(version) == begun
    assert buffer.begin(version) == [], "each once"
    assert {buffer.state_of(index) for index in begun} == {RUNNING}


def test_a_batch_takes_the_oldest_and_is_due_when_full_or_when_nothing_runs() -> None:
    buffer = RolloutBuffer(2, 1, steps=2)
    buffer.begin(0)
    end(buffer, 3)
    assert not buffer.is_due()
    end(buffer, 1, 2)
    assert buffer.is_due()
    assert list(buffer.close().taken) == [1, 2]
    assert [buffer.state_of(index) for index in range(4)] == [RUNNING, None, None, READY]
    assert not buffer.is_due()
    end(buffer, 0, kind="env")
    assert buffer.is_due(), "nothing is running"
    batch = buffer.close()
    assert (list(batch.taken), list(batch.failed)) == ([3], [0])
    assert buffer.state_of(0) is None


def test_a_cancelled_group_and_one_that_waited_too_long_begin_again() -> None:
    buffer = RolloutBuffer(1, 1, steps=9)
    buffer.begin(0)
    assert buffer.end(0, group(0, kind="stopped")) is PENDING
    end(buffer, 1, version=0)
    assert not buffer.restart_stale(0)
    assert buffer.restart_stale(1)
    assert [buffer.state_of(0), buffer.state_of(1)] == [PENDING, PENDING]
    assert buffer.begin(1) == [0, 1, 2]
    assert [buffer.attempts(index) for index in range(3)] == [1, 1, 0]
    end(buffer, 0, 1, version=1)
    batch = buffer.close()
    assert batch.restarted == (0, 1)
    assert [one.id for one in batch.stale] == ["0", "1"]
    assert buffer.close().restarted == (), "reported once"


def test_with_a_lag_another_group_is_played_for_one_that_failed() -> None:
    for lag, more in ((0, []), (1, [4])):
        buffer = RolloutBuffer(2, lag, steps=9)
        buffer.begin(0)
        end(buffer, 0, kind="env")
        assert buffer.begin(0) == more


def test_with_a_lag_a_batch_does_not_wait_for_ever_for_groups_that_all_fail() -> None:
    buffer = RolloutBuffer(3, 1, 9)
    running, ended = buffer.begin(0), 0
    while not buffer.is_due():
        buffer.end(running.pop(0), group(ended, 0, "env"))
        running += buffer.begin(0)
        ended += 1
    assert ended == 3 * MOST_FAILED
    assert len(buffer.close().failed) == ended


def test_saved_and_loaded_what_was_running_begins_again() -> None:
    buffer = RolloutBuffer(2, 1, steps=9)
    buffer.begin(0)
    end(buffer, 0, kind="stopped")
    end(buffer, 1, kind="env")
    end(buffer, 2)
    buffer.begin(0)  # 0 again, and 4 instead of 1
    state, ended = buffer.save(), buffer.ended(READY, FAILED)
    assert state == {
        "next": 5,
        "unfinished": [0, 2, 3, 4],
        "attempts": {},  # the restart of 0 is logged with the next batch
        "failures": 0,
        "replaced": 0,
    }
    restarted = buffer.close().restarted

    loaded = RolloutBuffer(2, 1, steps=9)
    loaded.load(state, 0, ended, [Batched(0, (), (), restarted)])
    states = [loaded.state_of(index) for index in range(6)]
    assert states == [PENDING, FAILED, READY, PENDING, PENDING, None]
    assert loaded.begin(0) == [0, 3, 4]
    assert loaded.attempts(0) == 1
    assert loaded.save()["failures"] == 0


def test_batches_that_closed_since_the_checkpoint_are_not_played_again() -> None:
    state = {"next": 4, "unfinished": [0, 1, 2, 3]}
    since = [Batched(1, taken=(2, 5), dropped=(3,), restarted=(1,))]
    loaded = RolloutBuffer(2, 1, steps=9)
    loaded.load(state, 1, {6: group(6)}, since)
    states = [loaded.state_of(index) for index in range(8)]
    assert states == [PENDING, PENDING, None, None, PENDING, None, READY, None]
    assert loaded.attempts(1) == 1, "under the name that its turns were recorded by"
    assert loaded.begin(1) == [0, 1, 4], "3 failed, and 6 was played instead"


def test_a_group_that_was_ready_and_then_too_old_is_not_lost_by_a_restart() -> None:
    loaded = RolloutBuffer(1, 1, steps=9)
    loaded.load({"next": 2, "unfinished": [1]}, 1, {}, [Batched(1, taken=(2,), restarted=(1,))])
    assert loaded.begin(2) == [1, 3]


def test_groups_that_teach_nothing_are_replaced_until_the_limit() -> None:
    buffer = RolloutBuffer(2, 0, steps=9, refill=2, teaches=lambda group: group.id in "1 5 8 9")
    assert buffer.begin(0) == [0, 1]
    assert buffer.end(0, group(0)) is REJECTED
    assert buffer.begin(0) == [2]
    end(buffer, 2)
    assert buffer.begin(0) == [3]
    end(buffer, 1, 3)
    assert buffer.begin(0) == [], "two have been replaced"
    assert buffer.is_due()
    batch = buffer.close()
    assert (list(batch.taken), list(batch.rejected), batch.replaced) == ([0, 1], [2, 3], 2), (
        "what the limit leaves short takes the oldest that was rejected"
    )
    assert buffer.begin(1) == [4, 5], "the next step goes on where this one has stopped"
    end(buffer, 4)
    assert buffer.begin(1) == [6], "as many as before"


def test_with_a_lag_steps_whose_groups_were_rejected_with_an_earlier_batch_get_others() -> None:
    """No group teaches: the first batch ends those of both steps, and two that replaced others."""
    buffer = RolloutBuffer(2, 1, steps=3, refill=2, teaches=lambda group: False)
    assert buffer.begin(0) == [0, 1, 2, 3]
    end(buffer, 0, 1, 2, 3)
    assert buffer.begin(0) == [4, 5]
    end(buffer, 4, 5)
    batch = buffer.close()
    assert (list(batch.taken), list(batch.rejected), batch.replaced) == ([0, 1], [2, 3, 4, 5], 4)
    assert buffer.begin(1) == [6, 7, 8, 9], "two steps are left"


@settings(max_examples=50)
@given(st.data(), st.integers(1, 3), st.integers(0, 4))
def test_without_lag_a_batch_is_what_comes_first_and_teaches_in_whatever_order_it_ends(
    data: st.DataObject, groups: int, refill: int
) -> None:
    steps = 3
    useful = data.draw(st.sets(st.integers(0, steps * (groups + refill)), max_size=12))

    def teaches(group: Group) -> bool:
        return int(group.id) in useful

    buffer = RolloutBuffer(groups, 0, steps, refill, teaches)
    logged: list[Batched] = []
    checkpoint, at = buffer.save(), 0
    first = 0
    for step in range(steps):
        # by hand: one task after the other
        drawn = [first + k for k in range(groups)]
        replaced = 0
        while replaced < min(refill, sum(k not in useful for k in drawn)):
            replaced += 1
            drawn.append(first + groups + replaced - 1)
        first += len(drawn)
        chosen = sorted(drawn, key=lambda k: k not in useful and bool(refill))[:groups]
        running = set(buffer.begin(step))
        while not buffer.is_due():
            index = data.draw(st.sampled_from(sorted(running)))
            buffer.end(index, group(index))
            running |= set(buffer.begin(step))
            running.remove(index)
            if data.draw(st.booleans(), label="killed"):
                ended = buffer.ended()
                buffer = RolloutBuffer(groups, 0, steps, refill, teaches)
                buffer.load(checkpoint, at, ended, logged)
                assert set(buffer.begin(step)) == running
        batch = buffer.close()
        assert list(batch.taken) == sorted(chosen)
        assert sorted([*batch.taken, *batch.rejected]) == drawn
        rejected = tuple(batch.rejected)
        logged.append(Batched(step, tuple(batch.taken), rejected=rejected, replaced=batch.replaced))
        if data.draw(st.booleans(), label="checkpoint"):
            checkpoint, at, logged = buffer.save(), step + 1, []


@settings(max_examples=50)
@given(st.data(), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_every_task_is_trained_on_once_or_reported(
    data: st.DataObject, groups: int, max_lag: int, refill: int
) -> None:
    """Any order of endings, failures, rejections and deaths of the process."""
    steps = 5
    useful = data.draw(st.sets(st.integers(0, 20)))

    def new_buffer() -> RolloutBuffer:
        teaches = lambda group: int(group.id) in useful  # noqa: E731
        return RolloutBuffer(groups, max_lag, steps, refill, teaches)

    buffer = new_buffer()
    left: Counter[int] = Counter()
    running: dict[int, int] = {}
    for step in range(steps):
        if data.draw(st.booleans(), label="killed"):
            ended, state = buffer.ended(), buffer.save()
            buffer = new_buffer()
            buffer.load(state, step, ended, [])
            running = {}
        running |= dict.fromkeys(buffer.begin(step), step)
        for index, version in [*running.items()]:
            if version < step - max_lag:
                buffer.end(index, group(index, version, "stopped"))
                del running[index]
        running |= dict.fromkeys(buffer.begin(step), step)
        while buffer.restart_stale(step - max_lag) or not buffer.is_due():
            running |= dict.fromkeys(buffer.begin(step), step)
            if running:
                index = data.draw(st.sampled_from(sorted(running)))
                kind = data.draw(st.sampled_from(["", "", "env"]))
                buffer.end(index, group(index, running.pop(index), kind))
                if max_lag or refill:
                    running |= dict.fromkeys(buffer.begin(step), step)
        batch = buffer.close()
        assert len(batch.taken) <= groups
        assert batch.taken or batch.failed or batch.stale, "a step has something to train on"
        if max_lag:
            gave_up = len(batch.failed) >= MOST_FAILED * groups
            assert len(batch.taken) == groups or not running or gave_up
        for one in batch.taken.values():
            for turn in one.episodes[0].turns:
                assert turn.versions[0].version >= step - max_lag
        left.update([*batch.taken, *batch.failed, *batch.rejected])
    assert set(left.values()) <= {1}, "no group twice"
    if max_lag == refill == 0:
        assert sorted(left) == list(range(groups * steps))
