"""What holds of all samplers that go by what was played: uniform draws, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.config import Config, TrainConfig, from_dict
from rayrl.environment.environment import TaskSource
from rayrl.run.sampling.mixture import run_sampler
from rayrl.run.sampling.task_sampler import TaskSampler, UniformSampler, UniformShare
from rayrl.types import Group, Task
from tests.sampled import DIFFERENT, SAME, environment, group, rows, source

ADAPTIVE = "difficulty", "replay"


def config(groups: int, share: float, kind: str, **env: Any) -> Config:
    train = {"groups": groups, "group_size": 2, "task_sampling": kind, "uniform_share": share}
    return from_dict({"env": env or {"name": "x"}, "train": train | {"pools": 4}})


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, TaskSource]:
    return {
        "function": source,
        "list": [Task(seed=seed) for seed in range(7)],
        "rows": rows(tmp_path, 7),
    }


@pytest.mark.parametrize("sampling", ADAPTIVE)
@pytest.mark.parametrize("kind", ["function", "list", "rows"])
def test_with_only_uniform_draws_they_are_those_of_the_uniform_sampler(
    sources: dict[str, TaskSource], kind: str, sampling: str
) -> None:
    env, made = environment(sources[kind]), config(3, 1.0, sampling)
    uniform, sampler = UniformSampler(env, made), run_sampler({"": env}, made)
    for step in range(6):
        indices = range(3 * step, 3 * step + 3)
        assert [sampler.plan(k) for k in indices] == [uniform.plan(k) for k in indices]
        sampler.observe({k: group(*DIFFERENT) if k % 2 else group(*SAME) for k in indices})


@settings(max_examples=50)
@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 200))
def test_uniform_draws_are_spaced_evenly(groups: int, share: float, start: int) -> None:
    train = TrainConfig(groups=groups, uniform_share=share)
    uniform = UniformShare(environment(), train, seed=0)
    n = sum(uniform.has(index) for index in range(start, start + groups))
    assert abs(n - groups * share) < 1 + 1e-9


def test_the_draws_of_a_step_cover_the_source_evenly_either_kind() -> None:
    uniform = UniformShare(environment(), TrainConfig(groups=12, uniform_share=0.25), seed=0)
    for step in range(5):
        indices = range(12 * step, 12 * step + 12)
        strata = [int(3 * uniform.u(k)) for k in indices if uniform.has(k)]
        others = [int(9 * uniform.other(k)) for k in indices if not uniform.has(k)]
        assert sorted(strata) == [0, 1, 2]
        assert sorted(others) == list(range(9))


MIX = {"a": {"name": "x", "weight": 2}, "b": {"name": "x"}}


def made(kind: str, sampling: str, folder: Path) -> TaskSampler:
    if kind in ("mixture", "tokens"):
        by = "tokens" if kind == "tokens" else "episodes"
        env = {"a": environment(), "b": environment(rows(folder, 3))}
        return run_sampler(env, config(3, 0.34, sampling, mix=MIX, mix_by=by))
    env = {"": environment(rows(folder, 5)) if kind == "rows" else environment()}
    return run_sampler(env, config(3, 0.34, sampling))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("sampling", ADAPTIVE)
@pytest.mark.parametrize("kind", ["function", "rows", "mixture", "tokens"])
@settings(max_examples=15)
@given(data=st.data())
def test_saved_and_loaded_at_any_moment_it_goes_on_with_the_same_tasks(
    kind: str, sampling: str, folder: Path, data: st.DataObject
) -> None:
    """Groups begin and are observed in any order, as with a lag; now and then it is killed."""
    kept, killed = made(kind, sampling, folder), made(kind, sampling, folder)
    checkpoint, begun, since = killed.save(), dict[int, Any](), list[dict[int, Group]]()
    waiting: dict[int, Task] = {}
    for index in range(data.draw(st.integers(1, 24))):
        plan = kept.plan(index)
        assert killed.plan(index) == plan
        begun[index] = killed.draws()[index]
        waiting[index] = plan.task
        chosen = data.draw(st.sets(st.sampled_from(sorted(waiting))), label="ended")
        if chosen:
            rewards = st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=3)
            groups = {
                k: group(*data.draw(rewards), tokens=data.draw(st.integers(1, 9)))
                for k in sorted(chosen, reverse=True)
            }
            assert killed.observe(groups) == kept.observe(dict(sorted(groups.items())))
            since.append(groups)
            for k in chosen:
                del waiting[k]
        if data.draw(st.booleans(), label="checkpoint"):
            checkpoint, begun, since = json.loads(json.dumps(killed.save())), {}, []
        if data.draw(st.booleans(), label="killed"):
            killed = made(kind, sampling, folder)
            killed.load(checkpoint, begun)
            for groups in since:
                killed.observe(groups)
        assert {k: killed.plan(k).task for k in waiting} == waiting
        assert all(killed.is_uniform(k) == kept.is_uniform(k) for k in waiting)
        assert killed.save() == kept.save()
