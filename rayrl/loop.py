"""Reinforcement learning: collect, batch, update, push. The whole algorithm is `train`.

With train.max_lag=0 a step is a function of (run.seed, run.name, step) and the weights it begins
with, so a run that was killed resumes from its last checkpoint and ends as if it had not stopped.
With more, episodes are played while the learner works (`run/rollout_buffer.py`); what was played
since the checkpoint is on disk, turn by turn, and no group is trained on twice.
"""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

from rayrl.cluster.open import make_environment
from rayrl.config import Config
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.folder import RunDir
from rayrl.run.stage import (
    MODEL,
    already_finished,
    check_tasks,
    check_trained,
    log_template_notes,
    seats_of,
)
from rayrl.run.start_check import check_start
from rayrl.run.training import open_training
from rayrl.types import derive_seed

__all__ = ["run", "train"]


def run(config: Config) -> None:
    """Train `config.model` on `config.env`; resumes if the run folder has a checkpoint."""
    check_start(config, "train")
    asyncio.run(train(config))
    print(f"Model in {Path(config.run.dir) / MODEL}")


async def train(config: Config) -> None:
    """The loop.

    Raises:
        ConfigError: no seat that the policy plays.
        RunFailed: the environment, the cluster or the numerics failed.
    """
    environment, algo, steps = make_environment(config), config.algo, config.train.steps
    check_trained(environment, config)
    # terms that act where the advantage is zero; a loss from outside may have some
    every_row = algo.kl_coef > 0 or algo.entropy_coef > 0 or ":" in algo.loss
    with RunDir(config.run.dir, config, begin=False) as folder:
        if folder.finished is not None and folder.finished.get("steps", 0) >= steps:
            print(already_finished(folder.path))
            return
        log_template_notes(config, seats_of(environment, config, "model").values())
        async with open_training(config, folder, functools.partial(plans, config)) as training:
            async for attempt in training.attempts():  # another, whenever the learner was lost
                with attempt:
                    for step in range(attempt.start, steps):
                        groups = await training.collect(step)
                        with training.clock("batch"):
                            scored = advantages(groups, algo)
                            batch = make_batch(groups, scored, keep_zero=every_row)
                        with training.clock("update"):
                            learned = await training.learner.step(batch)
                        await training.push(step + 1)
                        await training.end_step(step, batch, learned)
                    await training.export()
        folder.finish({"steps": steps, "model": MODEL})


def plans(config: Config, step: int) -> list[GroupPlan]:
    """What is played at a step: one group for each stratum of the task source."""
    seed = derive_seed(config.run.seed, config.run.name, "train")
    n = config.train.groups
    environment = make_environment(config)
    tasks = environment.tasks(seed, n, start=step * n)
    check_tasks(environment, tasks)
    return [
        GroupPlan(f"{step}-{k}", task, config.train.group_size, derive_seed(seed, step, k))
        for k, task in enumerate(tasks)
    ]
