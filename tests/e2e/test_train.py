"""Whole training runs on a local Ray: repeatable, resumable, and not put off by a dead replica."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
from tests.tiny import save_tiny_model

ROOT = Path(__file__).parent.parent.parent
ENVS = ROOT / "tests" / "cluster_envs.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def command(tiny: Path, folder: Path, *more: str) -> list[str]:
    settings = {
        "run.dir": folder,
        "run.checkpoint_every": 2,
        "env.name": f"{ENVS}:talk",
        "model.path": tiny,
        "engine.max_len": 256,
        "sampling.max_tokens": 8,
        "train.steps": 6,
        "train.groups": 4,
        "train.group_size": 4,
        "learner.kind": "reference",
        "learner.lr": 0.01,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "rayrl", "train", *words, *more]


def train(tiny: Path, folder: Path, *more: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command(tiny, folder, *more), cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def figures(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def episodes(folder: Path) -> dict[str, list[Any]]:
    def plain(line: str) -> Any:
        return {k: v for k, v in json.loads(line).items() if k != "seconds"}

    files = sorted((folder / "episodes").glob("*.jsonl"))
    return {f.name: [plain(line) for line in f.read_text().splitlines()] for f in files}


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_")}
    train(tiny, folder, env={**env, "HOME": str(folder.parent)})
    return folder


def until(fact: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


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


def test_submitted_to_a_cluster(tiny: Path, tmp_path: Path) -> None:
    """`ray job submit`: overrides, the log, and a non-zero exit when the run fails."""
    import socket

    def free() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    bin_ = Path(sys.executable).parent
    port, dashboard = free(), free()
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
    temp = Path(os.environ.get("TMPDIR", "/tmp")) / f"ray-{os.getpid()}"
    start = [bin_ / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    start += ["--include-dashboard=true", f"--temp-dir={temp}", "--object-store-memory=200000000"]
    start += [f"--dashboard-agent-listen-port={free()}"]
    with (
        (tmp_path / "ray.log").open("w") as log,
        subprocess.Popen(start, stdout=log, stderr=log, env=env, start_new_session=True) as cluster,
    ):
        try:
            submit = [bin_ / "ray", "job", "submit", f"--address=http://127.0.0.1:{dashboard}"]

            def job(*words: str) -> subprocess.CompletedProcess[str]:
                line = ["env", f"PYTHONPATH={ROOT}", *map(str, words)]
                for _ in range(60):
                    done = subprocess.run(
                        [*submit, "--", *line], env=env, capture_output=True, text=True, check=False
                    )
                    if "Failed to connect" not in done.stdout + done.stderr:
                        break
                    time.sleep(2)
                return done

            good = job(*command(tiny, tmp_path / "run", "train.steps=2", "run.name=submitted"))
            assert good.returncode == 0, good.stdout + good.stderr
            assert "submitted 2/2" in good.stdout, "the log streams"
            assert len(figures(tmp_path / "run")) == 2
            bad = job(*command(tiny, tmp_path / "bad", "env.args.fault=raise"))
            assert bad.returncode != 0
            assert "the fault of number 3" in bad.stdout
            typo = job(*command(tiny, tmp_path / "typo", "train.stepz=2"))
            assert typo.returncode != 0
            assert "train.steps" in typo.stdout
        finally:
            os.killpg(cluster.pid, signal.SIGTERM)
            cluster.wait(60)
