"""Reinforcement learning: play, compare, learn, push, again. The whole algorithm is this page.

A step is a function of (run.seed, run.name, step) and the weights it begins with, so a run that was
killed goes on from its last checkpoint and ends as if it had not stopped.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from rayrl.advantage import advantages
from rayrl.bar import Bar
from rayrl.batch import make_batch
from rayrl.cluster.actors import make_environment, open_training
from rayrl.config import Config
from rayrl.errors import ConfigError
from rayrl.progress import Clock, headline, step_metrics, warnings
from rayrl.rollout import GroupPlan
from rayrl.rundir import RunDir
from rayrl.stage import MODEL, check_trained, say_templates, seats_of
from rayrl.types import derive_seed

__all__ = ["run", "train"]


def run(config: Config) -> None:
    """Train `config.model` on `config.env`; resumes if the run folder has a checkpoint."""
    asyncio.run(train(config))
    print(f"Model in {Path(config.run.dir) / MODEL}")


async def train(config: Config) -> None:
    """The loop: collect, batch, update, push, log.

    Raises:
        ConfigError: a setting this version does not have, or no seat that the policy plays.
        RunFailed: the environment, the cluster or the numbers do not allow to go on.
    """
    cfg = config.train
    if cfg.max_lag > 0:
        raise ConfigError(f"train.max_lag={cfg.max_lag}: not in this version; set train.max_lag=0.")
    environment = make_environment(config)
    check_trained(environment, config)
    with RunDir(config.run.dir, config) as folder:
        if folder.finished is not None and folder.finished["steps"] >= cfg.steps:
            return
        say_templates(config, seats_of(environment, config, "model").values())
        found = folder.latest_checkpoint()
        start = found.step if found else 0
        async with open_training(config, cfg.steps) as (rollouts, learner, weights):
            if found:
                await learner.load(found.path)
            await weights.push(start)
            with Bar(config.run.name, cfg.steps) as bar:
                for step in range(start, cfg.steps):
                    clock = Clock()
                    with clock("collect"):
                        played = await rollouts.collect(plans(config, step), step - cfg.max_lag)
                    with clock("batch"):
                        scored = advantages(played.groups, config.algo)
                        batch = make_batch(played.groups, scored, keep_zero=needs_every_row(config))
                    with clock("update"):
                        await weights.make_room()
                        learned = await learner.step(batch)
                    with clock("push"):
                        await weights.push(step + 1)
                    metrics = step_metrics(played, batch, learned, clock, config.algo)
                    folder.log(step, metrics)
                    last = step + 1 == cfg.steps
                    if step % config.run.episodes_every == 0 or last:
                        folder.write_episodes(step, (*played.groups, *played.dropped))
                    if (step + 1) % config.run.checkpoint_every == 0 or last:
                        with folder.checkpoint(step + 1) as path:
                            await learner.save(path)
                    bar.update(step + 1, **headline(metrics))
                    for warning in warnings(metrics, config.algo):
                        bar.note(f"step {step + 1}: {warning}")
            await learner.export(folder.path / MODEL)
            folder.finish({"steps": cfg.steps, "model": MODEL})


def needs_every_row(config: Config) -> bool:
    """Whether the loss has terms that act where the advantage is zero."""
    return config.algo.kl_coef > 0 or config.algo.entropy_coef > 0


def plans(config: Config, step: int) -> list[GroupPlan]:
    """What is played at a step: one group for each stratum of the task source."""
    seed = derive_seed(config.run.seed, config.run.name, "train")
    n = config.train.groups
    return [
        GroupPlan(f"{step}-{k}", task, config.train.group_size, derive_seed(seed, step, k))
        for k, task in enumerate(make_environment(config).tasks(seed, n, start=step * n))
    ]
