"""Which worker plays what, and what is played again: the scheduler by hand, without Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from rayrl.cluster.workers.scheduler import RolloutRequest, Scheduler, is_broken
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Episode, Failure, Group, Task


def plan(name: str, size: int = 1) -> GroupPlan:
    return GroupPlan(name, Task(), size, 0)


def group(name: str, *kinds: str) -> Group:
    """A group with one episode per kind of failure; "" is none."""
    episodes = tuple(
        Episode(f"{name}/{k}", "nim", Task(), k, (), failure=Failure(kind, "x") if kind else None)
        for k, kind in enumerate(kinds or [""])
    )
    return Group(name, Task(), episodes)


class Caller:
    """Submits a request, and notes what comes of it."""

    def __init__(self, scheduler: Scheduler, names: Sequence[str], size: int = 1) -> None:
        self.groups: list[Group] = []
        self.retries: list[str] = []
        self.ends: list[BaseException | None] = []
        self.request = RolloutRequest(
            [plan(name, size) for name in names],
            self.groups.append,
            lambda group: self.retries.append(group.id),
            self.ends.append,
        )
        scheduler.submit(self.request)

    @property
    def names(self) -> list[str]:
        return [group.id for group in self.groups]


def scheduler(*capacities: int, elastic: Sequence[int] = ()) -> Scheduler:
    """Fixed workers in slots 0, 1, ..., then elastic ones, with these capacities."""
    made = Scheduler({"": ("nim", ("agent",))})
    for slot, capacity in enumerate((*capacities, *elastic)):
        made.add_worker(slot, capacity, elastic=slot >= len(capacities))
    return made


def assigned(made: Scheduler) -> dict[int, list[str]]:
    return {slot: [g.plan.id for g in groups] for slot, groups in made.assign().items()}


def finish(made: Scheduler, slot: int, *names: str) -> None:
    """These groups end on a worker, unbroken."""
    sizes = [made.groups_on(slot)[name].plan.size for name in names]
    made.finish(slot, sum(sizes), [group(name) for name in names])


# --- the queue -------------------------------------------------------------------------------


def test_fixed_workers_share_the_queue_evenly_and_get_an_eighth_more() -> None:
    made = scheduler(8, 8)
    Caller(made, [f"g{k}" for k in range(20)])
    found = assigned(made)
    assert found == {
        0: [f"g{k}" for k in range(0, 18, 2)],
        1: [f"g{k}" for k in range(1, 18, 2)],
    }
    assert made.waiting_episodes == 2
    assert assigned(made) == {}


def test_a_group_goes_to_a_worker_with_any_capacity_left() -> None:
    made = scheduler(4)
    Caller(made, ["a", "b", "c"], size=3)
    assert assigned(made) == {0: ["a", "b"]}, "3 of 4 are taken, so b begins; 6 are"
    made.finish(0, 3, [group("a")])
    assert assigned(made) == {0: ["c"]}


def test_episodes_that_end_make_way_before_their_group_has_ended() -> None:
    made = scheduler(2)
    Caller(made, ["a", "b"], size=2)
    assert assigned(made) == {0: ["a"]}
    made.finish(0, 1, [])
    assert assigned(made) == {0: ["b"]}


def test_elastic_workers_get_what_fixed_ones_have_no_capacity_for() -> None:
    made = scheduler(2, elastic=[2, 2])
    Caller(made, ["a", "b", "c", "d", "e", "f", "g"])
    assert assigned(made) == {0: ["a", "b"], 1: ["c", "d"], 2: ["e", "f"]}
    finish(made, 2, "e")
    finish(made, 0, "b")
    assert assigned(made) == {0: ["g"]}
    assert made.busy == {0, 1, 2}
    finish(made, 1, "c", "d")
    assert made.busy == {0, 2}


def test_overlapping_requests_are_served_in_order() -> None:
    made = scheduler(1)
    first, second = Caller(made, ["a", "b"]), Caller(made, ["c"])
    order = []
    for _ in range(3):
        (names,) = assigned(made).values()
        order += names
        finish(made, 0, *names)
    assert order == ["a", "b", "c"]
    assert (first.names, first.ends) == (["a", "b"], [None])
    assert (second.names, second.ends) == (["c"], [None])


def test_nothing_is_assigned_before_a_worker_can_play() -> None:
    made = scheduler()
    Caller(made, ["a"])
    assert assigned(made) == {}
    made.add_worker(0, 1)
    assert assigned(made) == {0: ["a"]}


def test_a_request_without_groups_ends_at_once() -> None:
    assert Caller(scheduler(1), []).ends == [None]


def test_the_most_groups_that_waited_at_once_are_counted_between_two_calls() -> None:
    made = scheduler(1)
    Caller(made, ["a", "b", "c"])
    assigned(made)
    finish(made, 0, "a")
    assigned(made)
    assert made.take_most_waiting() == 2
    assert made.take_most_waiting() == 1
    assert made.waiting_episodes == 1


# --- callers that go -------------------------------------------------------------------------


def test_of_a_withdrawn_request_nothing_begins_resumes_or_is_delivered() -> None:
    made = scheduler(2)
    gone, other = Caller(made, ["a", "b", "c"]), Caller(made, ["d"])
    assert assigned(made) == {0: ["a", "b"]}
    made.withdraw(gone.request)
    finish(made, 0, "a")
    assert assigned(made) == {0: ["d"]}
    made.lose_worker(0, "died")
    made.add_worker(0, 2)
    assert assigned(made) == {0: ["d"]}, "and not b"
    finish(made, 0, "d")
    assert (gone.groups, gone.ends) == ([], [])
    assert (other.names, other.ends) == (["d"], [None])


def test_suspects_of_a_withdrawn_request_do_not_hold_up_their_worker() -> None:
    made = scheduler(2)
    gone = Caller(made, ["a", "b"])
    assigned(made)
    made.lose_worker(0, "died")
    made.withdraw(gone.request)
    made.add_worker(0, 2)
    Caller(made, ["c", "d"])
    assert assigned(made) == {0: ["c", "d"]}


def test_a_callers_exception_ends_its_request_only() -> None:
    made = scheduler(2)
    ends: list[BaseException | None] = []
    full = OSError("disk full")

    def keep(_: Group) -> None:
        raise full

    made.submit(RolloutRequest([plan("a"), plan("b"), plan("c")], keep, keep, ends.append))
    other = Caller(made, ["d"])
    assert assigned(made) == {0: ["a", "b"]}
    finish(made, 0, "a")
    assert ends == [full]
    assert assigned(made) == {0: ["d"]}, "and not c"
    finish(made, 0, "b", "d")
    assert (ends, other.names) == ([full], ["d"])


def test_an_error_ends_all_requests() -> None:
    made = scheduler(1)
    callers = Caller(made, ["a"]), Caller(made, ["b"])
    assigned(made)
    made.fail(error := RuntimeError("a bug"))
    assert [caller.ends for caller in callers] == [[error], [error]]
    assert made.waiting_episodes == 0


# --- infrastructure failures -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "broken"),
    [
        ([""], False),
        (["infra"], True),
        (["", "env"], False),
        (["env", "infra"], True),
        (["infra", "stopped"], False),
        (["refused"], False),
    ],
)
def test_only_infrastructure_failures_are_worth_a_retry(kinds: list[str], broken: bool) -> None:
    assert is_broken(group("g", *kinds)) is broken


def test_a_broken_group_is_played_once_more_after_the_others() -> None:
    made = scheduler(2)
    caller = Caller(made, ["a", "b", "c", "d"])
    assert assigned(made) == {0: ["a", "b"]}
    made.finish(0, 2, [group("b", "infra"), group("a", "infra")])
    assert caller.retries == ["b", "a"]
    assert assigned(made) == {0: ["c", "d"]}
    finish(made, 0, "c")
    assert assigned(made) == {}, "d has not ended"
    finish(made, 0, "d")
    (again,) = made.assign().values()
    assert [g.plan.id for g in again] == ["a", "b"], "in the order of the plans"
    assert all(g.resumes for g in again)
    made.finish(0, 2, [group("a"), group("b", "infra")])
    assert caller.names == ["c", "d", "a", "b"], "b as it is: it had its retry"
    assert (caller.retries, caller.ends) == (["b", "a"], [None])
    assert assigned(made) == {}


def test_a_retry_does_not_wait_for_other_requests() -> None:
    made = scheduler(2)
    Caller(made, ["a"])
    Caller(made, ["b"])
    assert assigned(made) == {0: ["a", "b"]}
    made.finish(0, 1, [group("a", "infra")])
    assert assigned(made) == {0: ["a"]}


# --- workers that die --------------------------------------------------------------------------


def test_what_a_dead_worker_had_resumes_in_two_halves_apart_from_all_else() -> None:
    made = scheduler(4)
    caller = Caller(made, ["a", "b", "c", "d", "e"])
    assert assigned(made) == {0: ["a", "b", "c", "d"]}
    finish(made, 0, "b")
    made.lose_worker(0, "died")
    assert assigned(made) == {}, "it is being replaced"
    made.add_worker(0, 4)
    (half,) = made.assign().values()
    assert [g.plan.id for g in half] == ["a", "c"]
    assert all(g.resumes for g in half)
    finish(made, 0, "a")
    assert assigned(made) == {}, "nothing is added to a trial"
    finish(made, 0, "c")
    assert assigned(made) == {0: ["d"]}
    finish(made, 0, "d")
    (rest,) = made.assign().values()
    assert [(g.plan.id, g.resumes) for g in rest] == [("e", False)]
    finish(made, 0, "e")
    assert caller.names == ["b", "a", "c", "d", "e"]
    assert caller.ends == [None]


def test_another_worker_goes_on_with_the_queue_meanwhile() -> None:
    made = scheduler(1, 1)
    Caller(made, ["a", "b", "c"])
    assert assigned(made) == {0: ["a"], 1: ["b"]}
    made.lose_worker(0, "died")
    finish(made, 1, "b")
    assert assigned(made) == {1: ["c"]}


def test_a_group_that_takes_down_a_second_worker_alone_on_it_is_an_env_failure() -> None:
    made = scheduler(2)
    caller = Caller(made, ["a"], size=2)
    assert assigned(made) == {0: ["a"]}
    made.lose_worker(0, "its worker process died")
    assert caller.groups == [], "once is not enough: the worker may have died of something else"
    made.add_worker(0, 2)
    assert assigned(made) == {0: ["a"]}
    made.lose_worker(0, "its worker process died")
    (failed,) = caller.groups
    assert [e.id for e in failed.episodes] == ["a/0", "a/1"]
    assert failed.trainable == ("agent",)
    for episode in failed.episodes:
        assert episode.failure is not None
        assert episode.failure.kind == "env"
        assert "'nim' on task Task(seed=0): its worker process died" in episode.failure.message
    assert caller.ends == [None]
    made.add_worker(0, 2)
    assert assigned(made) == {}


def play_all(made: Scheduler, slot: int, kills: Callable[[str], bool]) -> tuple[int, int]:
    """Play with one worker that dies of some groups; returns its deaths and the parts it played."""
    deaths = parts = 0
    while found := assigned(made):
        parts += 1
        if any(map(kills, found[slot])):
            deaths += 1
            made.lose_worker(slot, "died")
            made.add_worker(slot, 1000)
        else:
            finish(made, slot, *found[slot])
    return deaths, parts


@pytest.mark.parametrize("n", [2, 3, 8, 100, 500])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_the_group_to_blame_is_found_among_many_with_few_deaths(n: int, where: float) -> None:
    made = scheduler(1000)
    names = [f"g{k}" for k in range(n)]
    caller = Caller(made, names)
    culprit = names[int(where * n)]
    deaths, parts = play_all(made, 0, lambda name: name == culprit)
    assert deaths <= math.ceil(math.log2(n)) + 1
    assert parts <= 2 * math.ceil(math.log2(n)) + 1
    assert sorted(caller.names) == sorted(names)
    assert [g.id for g in caller.groups if not g.complete] == [culprit]


def test_several_groups_to_blame_are_all_found_and_nobody_else_is() -> None:
    made = scheduler(1000)
    caller = Caller(made, [f"g{k}" for k in range(64)])
    culprits = {"g3", "g4", "g40"}
    play_all(made, 0, culprits.__contains__)
    assert len(caller.groups) == 64
    assert {g.id for g in caller.groups if not g.complete} == culprits


def test_a_worker_that_dies_of_nothing_it_plays_costs_no_group() -> None:
    made = scheduler(8)
    caller = Caller(made, [f"g{k}" for k in range(8)])
    assigned(made)
    made.lose_worker(0, "its node died")
    made.add_worker(0, 8)
    deaths, parts = play_all(made, 0, lambda name: False)
    assert (deaths, parts) == (0, 2)
    assert all(g.complete for g in caller.groups)
    assert len(caller.groups) == 8


def test_suspects_of_an_elastic_worker_go_to_the_fixed_one_that_has_fewest() -> None:
    made = scheduler(1, 1, elastic=[2])
    caller = Caller(made, ["a", "b", "c", "d"])
    assert assigned(made) == {0: ["a"], 1: ["b"], 2: ["c", "d"]}
    made.lose_worker(0, "died")
    made.lose_worker(2, "died")
    made.remove_worker(2)
    assert made.busy == {0, 1}
    assert assigned(made) == {}, "b is not to be taken down by c"
    finish(made, 1, "b")
    assert assigned(made) == {1: ["c"]}
    finish(made, 1, "c")
    made.add_worker(0, 1)
    assert assigned(made) == {0: ["a"], 1: ["d"]}
    finish(made, 0, "a")
    finish(made, 1, "d")
    assert (len(caller.groups), caller.ends) == (4, [None])


def test_an_elastic_worker_that_never_started_leaves_nothing() -> None:
    made = scheduler(1)
    made.remove_worker(1)
    assert made.groups_on(1) == {}


# --- winding down ------------------------------------------------------------------------------


def test_wind_down_ends_requests_with_what_has_begun() -> None:
    made = scheduler(2)
    caller, later = Caller(made, ["a", "b", "c"]), Caller(made, ["d"])
    assert assigned(made) == {0: ["a", "b"]}
    made.wind_down()
    assert (caller.ends, later.ends) == ([], [None]), "a and b have begun, d has not"
    assert made.busy == {0}, "it is asked for what it has not begun"
    made.give_back(0, ["b"])
    assert caller.ends == []
    finish(made, 0, "a")
    assert (caller.names, caller.ends) == (["a"], [None])
    assert Caller(made, ["e"]).ends == [None], "nothing is begun"
    made.wind_up()
    again = Caller(made, ["b", "c"])
    assert assigned(made) == {0: ["b", "c"]}, "its capacity is what it was"
    finish(made, 0, "b", "c")
    assert again.ends == [None]


def test_wind_down_retries_nothing() -> None:
    made = scheduler(3)
    caller = Caller(made, ["a", "b", "c"])
    assigned(made)
    made.finish(0, 1, [group("a", "infra")])
    made.wind_down()
    made.finish(0, 1, [group("b", "infra")])
    assert caller.retries == ["a", "b"], "the caller has seen them"
    finish(made, 0, "c")
    assert (caller.names, caller.ends) == (["c"], [None])
    assert assigned(made) == {}


def test_a_retry_that_waits_for_a_group_that_is_given_back_is_played() -> None:
    made = scheduler(3)
    caller = Caller(made, ["a", "b"])
    assigned(made)
    made.wind_down()
    made.wind_up()
    made.finish(0, 1, [group("a", "infra")])
    made.give_back(0, ["b"])  # the worker was asked before
    assert assigned(made) == {0: ["a"]}
    finish(made, 0, "a")
    assert caller.ends == [None]


def test_wind_down_drops_suspects_and_what_a_worker_dies_with() -> None:
    made = scheduler(1, 1)
    caller = Caller(made, ["a", "b"])
    assigned(made)
    made.lose_worker(0, "died")
    made.wind_down()
    assert made.busy == {1}
    made.lose_worker(1, "died")
    assert (caller.groups, caller.ends) == ([], [None])
    made.wind_up()
    made.add_worker(0, 1)
    made.add_worker(1, 1)
    assert assigned(made) == {}
