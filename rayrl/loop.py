"""Reinforcement learning: collect, batch, update, push. The whole algorithm is `train`.

With train.max_lag=0 a step is a function of (run.seed, run.name, step) and the weights it begins
with, so a run that was killed resumes from its last checkpoint and ends as if it had not stopped.
With more, episodes are played while the learner works (`run/rollout_buffer.py`); what was played
since the checkpoint is on disk, turn by turn, and no group is trained on twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from rayrl.config import Config, validate
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.run.folder import RunDir
from rayrl.run.loggers import LogFunction, Logger
from rayrl.run.stage import MODEL, already_finished
from rayrl.run.start_check import check_start
from rayrl.run.training import StepControl, open_training

__all__ = ["run", "train"]


def run(config: Config) -> None:
    """Train `config.model` on `config.env`; resumes if the run folder has a checkpoint."""
    asyncio.run(train(config))
    print(f"Model in {Path(config.run.dir) / MODEL}")


async def train(
    config: Config,
    *,
    loggers: Sequence[str | Logger | LogFunction] = (),
    on_step: Callable[[StepControl], object] | None = None,
) -> None:
    """The loop.

    Args:
        loggers: besides those of `run.loggers`.
        on_step: called after every step.

    Raises:
        ConfigError: a setting cannot work, or no seat is the policy's.
        RunFailed: the environment, the cluster or the numerics failed.
    """
    validate(config, "train")
    check_start(config, "train")
    algo, steps = config.algo, config.train.steps
    # terms that act where the advantage is zero; a loss from outside may have some
    every_row = algo.kl_coef > 0 or algo.entropy_coef > 0 or ":" in algo.loss
    with RunDir(config.run.dir, config, begin=False, loggers=loggers, verb="train") as folder:
        done = folder.finished
        if done is not None and (done.get("steps", 0) >= steps or done.get("stopped")):
            print(already_finished(folder.path))
            return
        async with open_training(config, folder) as training:
            async for attempt in training.attempts():  # another, whenever the learner was lost
                with attempt:
                    for step in range(attempt.start, training.stopped_after or steps):
                        groups = await training.collect(step)
                        with training.clock("batch"):
                            scored = advantages(groups, algo)
                            batch = make_batch(groups, scored, keep_zero=every_row)
                        with training.clock("update"):
                            learned = await training.learner.step(batch)
                        await training.push(step + 1)
                        # log; evaluate and save where due
                        await training.end_step(step, batch, learned, on_step)
                        if training.stopped_after is not None:
                            break
                    await training.finish()
