"""Reinforcement learning: play, compare, learn, push, again. The whole algorithm is this page.

With train.max_lag=0 a step is a function of (run.seed, run.name, step) and the weights it begins
with, so a run that was killed goes on from its last checkpoint and ends as if it had not stopped.
With more, episodes are played while the learner works (`run/rollout_buffer.py`); what was played
since the checkpoint is on the disk, turn by turn, and no group is trained on twice.
"""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

from rayrl.cluster.learner_group import LearnerGroup
from rayrl.cluster.open import make_environment, open_training
from rayrl.cluster.weight_sync.push import WeightSync
from rayrl.config import Config
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.folder import RunDir
from rayrl.run.group_log import GroupLog
from rayrl.run.metrics import Clock, headline, step_metrics, warnings
from rayrl.run.monitor import Monitor
from rayrl.run.progress_bar import ProgressBar
from rayrl.run.recovery import Recovery
from rayrl.run.rollout_buffer import RolloutBuffer
from rayrl.run.stage import (
    MODEL,
    already_finished,
    check_tasks,
    check_trained,
    log_template_notes,
    seats_of,
)
from rayrl.run.start_check import check_start
from rayrl.types import derive_seed

__all__ = ["run", "train"]


def run(config: Config) -> None:
    """Train `config.model` on `config.env`; resumes if the run folder has a checkpoint."""
    check_start(config, "train")
    asyncio.run(train(config))
    print(f"Model in {Path(config.run.dir) / MODEL}")


async def train(config: Config) -> None:
    """Open what a run needs, and go through its steps.

    Raises:
        ConfigError: no seat that the policy plays.
        RunFailed: the environment, the cluster or the numbers do not allow to go on.
    """
    cfg = config.train
    environment = make_environment(config)
    check_trained(environment, config)
    with RunDir(config.run.dir, config, begin=False) as folder:
        if folder.finished is not None and folder.finished.get("steps", 0) >= cfg.steps:
            print(already_finished(folder.path))
            return
        log_template_notes(config, seats_of(environment, config, "model").values())
        found = folder.latest_checkpoint()
        start = found.step if found else 0
        log = GroupLog(folder.path / "groups")
        if folder.went_back:
            log.forget(start)
        opening = open_training(config, cfg.steps, log.turns)
        async with opening as (rollouts, learner, weights):
            folder.begin()
            async with RolloutBuffer(
                rollouts, functools.partial(plans, config), config, log
            ) as buffer:
                buffer.restore(start, found.state if found else {})
                with (
                    ProgressBar(config.run.name, cfg.steps) as progress,
                    Monitor(config, folder, progress.note) as monitor,
                ):
                    loop = Loop(
                        config, folder, buffer, learner, weights, progress, monitor, pushed=start
                    )
                    await loop.recovery.through(cfg.steps, loop.step, loop.export, loop.begin)
            folder.finish({"steps": cfg.steps, "model": MODEL})


class Loop:
    """Collect, batch, update, push, log: step after step, also after the learner was lost.

    Args:
        pushed: version that the replicas hold.
    """

    def __init__(
        self,
        config: Config,
        folder: RunDir,
        buffer: RolloutBuffer,
        learner: LearnerGroup,
        weights: WeightSync,
        progress: ProgressBar,
        monitor: Monitor,
        *,
        pushed: int,
    ) -> None:
        self.config, self.folder, self.progress, self.monitor = config, folder, progress, monitor
        self.buffer, self.learner, self.weights = buffer, learner, weights
        self.pushed = pushed
        self.recovery = Recovery(learner, folder, progress, config.learner.restarts)

    async def begin(self, step: int) -> None:
        """The learner is at this step, at first, or again because it was lost.

        Then it learns again what it had learned, from the same batches, and what it had published
        is gone with its processes.
        """
        self.weights.reset()
        self.buffer.rewind(step)
        self.monitor.rewind()
        if step == self.pushed:
            await self.weights.push(step)
        self.buffer.advance(self.pushed)

    async def export(self) -> None:
        """Leave the trained model."""
        with self.folder.whole(MODEL) as path:
            await self.learner.export(path)

    async def step(self, step: int) -> None:
        """One step of training."""
        config, folder = self.config, self.folder
        await self.monitor.pause_or_stop()
        clock = Clock()
        with clock("collect"):
            played = await self.buffer.batch(step)
        with clock("batch"):
            scored = advantages(played.groups, config.algo)
            batch = make_batch(played.groups, scored, keep_zero=needs_every_row(config))
        with clock("update"):
            await self.weights.sleep_replicas()
            learned = await self.learner.step(batch)
        with clock("push"):
            if self.pushed <= step + 1:  # else the replicas have newer ones: a learner was lost
                await self.weights.push(step + 1)
                self.pushed = step + 1
        self.buffer.advance(step + 1)
        metrics = step_metrics(step, played, batch, learned, clock)
        folder.log(step, metrics)
        self.monitor.observe(step, metrics, clock, played)
        last = step + 1 == config.train.steps
        if step % config.run.episodes_every == 0 or last:
            folder.write_episodes(step, (*played.groups, *played.dropped))
        if (step + 1) % config.run.checkpoint_every == 0 or last or self.monitor.will_halt:
            self.buffer.checkpointed(step + 1)
            with folder.checkpoint(step + 1, self.buffer.state()) as path:
                await self.learner.save(path)
            self.buffer.log.keep(step + 1)
            self.recovery.checkpointed()
        self.progress.update(step + 1, headline(metrics))
        for warning in warnings(metrics):
            self.progress.note(f"step {step + 1}: {warning}")


def needs_every_row(config: Config) -> bool:
    """Whether the loss has terms that act where the advantage is zero."""
    return config.algo.kl_coef > 0 or config.algo.entropy_coef > 0


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
