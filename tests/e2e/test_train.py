"""Whole training runs on a local Ray: repeatable, resumable, and not put off by a dead replica."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrl.advantage import advantages
from rayrl.batch import make_batch
from rayrl.cluster.actors import open_training
from rayrl.config import Config, from_dict
from rayrl.train import plans
from rayrl.types import Group
from rayrl.weights import unflatten
from tests.apart import Shared
from tests.runs import ENVS, ROOT, command, episodes, figures, train, until, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def unbroken(tiny: Path, shared: Shared) -> Path:
    def make(folder: Path) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_")}
        folder.mkdir()
        train(tiny, folder / "run", env={**env, "HOME": str(folder)})

    return shared("unbroken", make) / "run"


def test_it_learns_and_says_so(tiny: Path, unbroken: Path) -> None:
    rows = figures(unbroken)
    assert [row["step"] for row in rows] == list(range(6))
    assert all(row["grad_norm"] > 0 and row["entropy"] > 0 for row in rows)
    assert all(row["mismatch/mean"] < 1e-4 for row in rows), "engine and learner agree"
    assert weights(unbroken) != (tiny / "model.safetensors").read_bytes()
    assert not (unbroken.parent / ".ray").exists(), "later `ray start`s would ask for its token"


def test_same_seed_same_episodes_and_weights(tiny: Path, unbroken: Path, tmp_path: Path) -> None:
    other = ["cluster.env_hosts=2", "cluster.replicas=2", "cluster.concurrency=5"]
    train(tiny, tmp_path / "run", *other)
    assert episodes(tmp_path / "run") == episodes(unbroken)
    assert figures(tmp_path / "run") == figures(unbroken)
    assert weights(tmp_path / "run") == weights(unbroken)


def test_killed_and_resumed_it_ends_as_if_unbroken(
    tiny: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    with subprocess.Popen(
        command(tiny, folder), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3, process)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "model").exists()
    train(tiny, folder)
    assert figures(folder) == figures(unbroken)
    assert episodes(folder) == episodes(unbroken)
    assert weights(folder) == weights(unbroken)


def test_stopped_by_an_alarm_then_paused_it_ends_as_if_unbroken(
    tiny: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    floor = "alarms.entropy_floor"  # in nats that no policy has
    settings = [f"{floor}.threshold=1000", f"{floor}.patience=3", f"{floor}.action=stop"]
    stopped = subprocess.run(
        command(tiny, folder, *settings), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 1, stopped.stderr
    assert f"stopped after step 3 by {floor}.action=stop" in stopped.stderr
    assert "lower learner.lr" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (folder / "checkpoints" / "step_000003" / "run.json").is_file()
    settings = [f"{floor}.threshold=1000", f"{floor}.patience=2", f"{floor}.action=pause"]
    with subprocess.Popen(
        command(tiny, folder, *settings), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        until((folder / "PAUSED").is_file, process)
        assert len(figures(folder)) == 5
        (folder / "PAUSED").unlink()
        assert process.wait(600) == 0
        assert process.stderr is not None
        assert "going on" in process.stderr.read()
    assert figures(folder) == figures(unbroken)
    assert weights(folder) == weights(unbroken)
    lines = (folder / "alarms.jsonl").read_text().splitlines()
    assert [(row["step"], row["action"]) for row in map(json.loads, lines)] == [
        (2, "stop"),
        (4, "pause"),
    ]
    timeline = [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timeline] == list(range(6))
    for row in timeline:
        assert {"collect", "update", "push"} <= {name for name, _, _ in row["stages"]}
        assert 0 < max(row["requests"]["mean"]) <= 16
        assert 0 < max(row["episodes"]["mean"]) <= 16


async def test_a_replica_killed_while_playing(tiny: Path, tmp_path: Path) -> None:
    """The run goes on, and every token was made with the weights its episode claims."""
    import ray

    config: Config = from_dict(
        {
            "run": {"dir": str(tmp_path / "run")},
            "env": {"name": f"{ENVS}:talk"},
            "model": {"path": str(tiny)},
            "engine": {"max_len": 256},
            "sampling": {"max_tokens": 64},
            "train": {"groups": 8, "group_size": 16},
            "learner": {"kind": "reference", "lr": 0.05},
            "cluster": {"replicas": 2, "request_deadline_s": 300.0},
        }
    )
    async with open_training(config, 2) as (rollouts, learner, weights_):
        await weights_.push(0)
        first = await rollouts.collect(plans(config, 0), 0)
        await learner.step(make_batch(first.groups, advantages(first.groups, config.algo)))
        await weights_.push(1)
        published = await learner.publish(1)
        flat = await published.buffer[0]

        playing = asyncio.ensure_future(rollouts.collect(plans(config, 1), 1))
        await asyncio.sleep(0.1)
        assert not playing.done()
        actors = ray.util.list_named_actors(all_namespaces=True)
        victim = next(a["name"] for a in actors if a["name"].startswith("SERVE_REPLICA::"))
        ray.kill(ray.get_actor(victim, namespace="serve"))
        second = await playing

    assert len(second.groups) == 8
    assert second.infra_failures == 0
    spans = [s for g in second.groups for e in g.episodes for t in e.turns for s in t.versions]
    assert {span.version for span in spans} == {1}
    assert gap(second.groups, tiny, unflatten(flat, published.manifest)) < 1e-4
    assert gap(second.groups, tiny, {}) > 1e-2, "with the old weights they would not agree"


def gap(groups: Sequence[Group], tiny: Path, state: dict[str, Any]) -> float:
    """Greatest difference of the episodes' logprobs from those of the weights in `state`."""
    import torch

    from rayrl.learner.step import load_model, row_logprobs

    model = load_model(tiny)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, strict=False)
    batch = make_batch(groups, advantages(groups, from_dict({}).algo), keep_zero=True)
    with torch.no_grad():
        ours = row_logprobs(model, batch.rows, 4096, 1.0)
    return max(float(np.abs(ours[id(row)] - row.old_logprobs).max()) for row in batch.rows)
