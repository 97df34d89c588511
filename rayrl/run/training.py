"""What stands around the loop: a run's folder, processes, checkpoints and alarms; see `loop.py`."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrl.cluster.learner_group import LearnerGroup
from rayrl.cluster.open import make_environment, open_cluster
from rayrl.cluster.rollouts import CollectedGroups, Rollouts
from rayrl.cluster.weight_sync.push import WeightSync
from rayrl.config import Config
from rayrl.config.mix import components, named_keys
from rayrl.environment.environment import Environment
from rayrl.environment.rows import Rows
from rayrl.errors import DataError, LearnerLost, RunFailed
from rayrl.learner.batch import Batch
from rayrl.run.checkpoints import Checkpoint
from rayrl.run.collector import GroupCollector
from rayrl.run.evaluation.evaluator import Evaluator, check_metrics
from rayrl.run.folder import RunDir
from rayrl.run.group_log import GroupLog
from rayrl.run.metrics import Clock, headline, step_metrics, warnings
from rayrl.run.monitor import Monitor
from rayrl.run.progress_bar import ProgressBar
from rayrl.run.sampling.mixture import run_sampler
from rayrl.run.stage import (
    MODEL,
    check_trained,
    log_dropped,
    log_template_notes,
    seats_of,
)

__all__ = [
    "Attempt",
    "Recovery",
    "StepControl",
    "Training",
    "open_training",
]

ROWS = "rows.json"  # digests of what data files had in them


@dataclass
class StepControl:
    """What an `on_step` callback sees of a step, and may ask for.

    Attributes:
        step: the step that has just been made, counted from 0.
        metrics: of that step.
        folder: of the run.
        evaluations: metrics of the evaluations so far, by the step that made their weights; -1:
            before the first step.
        stop: set it to end the run after this step, with a checkpoint and the model.
        checkpoint: set it to make a checkpoint now.
        evaluate: whether to play `eval.cells` with the new weights now; set already at the steps of
            `eval.every`. What comes of it is logged with the step, see `eval_metrics`.
    """

    step: int
    metrics: Mapping[str, float]
    folder: Path
    evaluations: Mapping[int, Mapping[str, float]]
    stop: bool = False
    checkpoint: bool = False
    evaluate: bool = False


class Training:
    """A run that is open: its replicas play, its learner learns, its folder is written.

    Attributes:
        config: of the run.
        folder: of the run.
        learner: all its ranks.
        start: the step to begin with: 0, or that of the checkpoint it resumes from.
        steps: the step to end before.
        clock: seconds of the current step by stage.
        stopped_after: steps after which a callback or `train.stop_when` has ended the run early, or
            None.
    """

    def __init__(
        self,
        config: Config,
        folder: RunDir,
        rollouts: Rollouts,
        collector: GroupCollector,
        learner: LearnerGroup,
        weights: WeightSync,
    ) -> None:
        self.config, self.folder, self.learner = config, folder, learner
        self.steps = config.train.steps
        self.clock = Clock()
        self.stopped_after: int | None = None
        self._collector, self._weights = collector, weights
        self._progress = ProgressBar(config.run.name, self.steps)
        self._evaluator = Evaluator(config, folder, rollouts, learner, "train", self._progress.note)
        self._monitor = Monitor(config, folder, self._progress.note)
        self._recovery = Recovery(learner, folder, self._progress, config.learner.restarts)
        self._collected = CollectedGroups(())
        found = folder.latest_checkpoint()
        self.start = self._pushed = self._ended = found.step if found else 0

    async def attempts(self) -> AsyncGenerator[Attempt, None]:
        """See `Recovery.attempts`; the replicas have the weights of the attempt's first step.

        A learner that was lost learns again from the same batches what it had learned.
        """
        async for attempt in self._recovery.attempts():
            with attempt:
                self._weights.reset()
                self._collector.rewind(attempt.start, attempt.state)
                self._monitor.rewind()
                if attempt.start == self._pushed:
                    await self._weights.push(attempt.start)
                self._collector.advance(self._pushed)
                if attempt.start == 0 and self._evaluator.is_due(0):
                    await self.evaluate(-1)
                ended = attempt.state.get("stopped_at") == self.steps
                if attempt.start and (ended or self._evaluator.is_over(attempt.start)):
                    self.stopped_after = attempt.start  # killed before it had finished
            if attempt.lost is None:
                yield attempt

    async def collect(self, step: int) -> CollectedGroups:
        """Wait until nobody pauses the run, then for the groups of `step`.

        Raises:
            RunFailed: an alarm stops the run, or playing failed too often.
        """
        await self._monitor.pause_or_stop()
        self.clock = Clock()
        with self.clock("collect"):
            self._collected = await self._collector.collect(step)
            await self._weights.sleep_replicas()
        return self._collected

    async def push(self, version: int) -> None:
        """Bring the learner's weights to every replica as `version`: steps that they have learned.

        Raises:
            InfraError: not every replica confirmed them in time.
        """
        with self.clock("push"):
            if version >= self._pushed:  # else replicas have newer ones: the learner was lost
                await self._weights.push(version)
                self._pushed = version
        self._collector.advance(version)

    async def end_step(
        self,
        step: int,
        batch: Batch,
        learned: Mapping[str, float],
        on_step: Callable[[StepControl], object] | None = None,
    ) -> None:
        """Log a step, watch its metrics, and make the checkpoint that is due.

        Args:
            learned: the learner's metrics, and any others to be logged.
            on_step: called with what it may ask for before the next step.
        """
        config, folder, collected = self.config, self.folder, self._collected
        metrics = step_metrics(step, collected, batch, learned, self.clock, tuple(config.env.mix))
        control = StepControl(
            step,
            metrics,
            folder.path,
            self._evaluator.by_step(step + 1),
            evaluate=self._evaluator.is_due(step + 1),
        )
        if on_step is not None and inspect.isawaitable(answer := on_step(control)):
            await answer
        if control.evaluate or (control.stop and config.eval.every):
            with self.clock("evaluate"):
                metrics |= await self.evaluate(step)
            metrics |= self.clock.metrics()
            control.stop |= self._evaluator.is_over(step + 1)
        if step == 0:
            metrics |= self._evaluator.start_metrics()
        folder.log(step, metrics)
        self._monitor.observe(step, metrics, self.clock, collected)
        self._ended = step + 1
        self.stopped_after = step + 1 if control.stop else None
        last = step + 1 == self.steps or control.stop
        if step % config.run.episodes_every == 0 or last:
            others = (*collected.dropped, *collected.rejected)
            folder.write_episodes(step, (*collected.groups, *others))
        due = (step + 1) % config.run.checkpoint_every == 0 or last or self._monitor.will_halt
        if due or control.checkpoint:
            await self.checkpoint(step + 1)
        self._progress.update(step + 1, headline(metrics))
        for warning in warnings(metrics):
            self._progress.note(f"step {step + 1}: {warning}")

    async def evaluate(self, step: int) -> dict[str, float]:
        """Play `eval.cells` with the weights that the replicas hold, at `eval.temperature`.

        The best model so far, by `run.keep_best`, is exported.

        Args:
            step: the one that has made these weights; -1: none.

        Returns:
            See `eval_metrics`; nothing if the replicas have newer weights already, because the
            learner was lost.

        Raises:
            ConfigError: `run.keep_best` or `train.stop_when` names no metric of the evaluation.
            RunFailed: the environment failed too often (`env.failure_budget`).
        """
        return await self._evaluator.evaluate(step + 1, self._pushed)

    async def checkpoint(self, step: int) -> None:
        """Save what a run needs to resume with `step`.

        Raises:
            RunFailed: the disk is full. The previous checkpoint is intact.
        """
        state = self._collector.begin_checkpoint(step)
        if self.stopped_after == step:
            state["stopped_at"] = self.steps  # more steps than that are made all the same
        with self.folder.checkpoint(step, state) as path:
            await self.learner.save(path)
        self._collector.log.delete_others(step)
        self._recovery.checkpointed()

    async def finish(self) -> None:
        """Write the model to RUN/model, a Hugging Face directory, and mark the run as finished.

        A run that ended before its last step goes on when it is started again, unless a callback or
        `train.stop_when` ended it.
        """
        with self.folder.whole(MODEL) as path:
            await self.learner.export(path)
        stopped = self.stopped_after is not None
        result = {"steps": self._ended, "model": MODEL, "stopped": stopped}
        self.folder.finish(result | self._evaluator.result(self._ended))


class Attempt(AbstractContextManager["Attempt"]):
    """One try at the remaining steps; used in a `with` block, it notes a learner that is lost.

    Attributes:
        start: the first step to make.
        state: what the checkpoint of that step holds besides the learner's.
        lost: how the learner was lost in the block, or None.
    """

    def __init__(self) -> None:
        self.start = 0
        self.state: Mapping[str, Any] = {}
        self.lost: LearnerLost | None = None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self.lost = error if isinstance(error, LearnerLost) else None
        return self.lost is not None


class Recovery:
    """Brings a learner to a run's newest checkpoint, at first and whenever it was lost.

    Args:
        limit: times it may be lost between two checkpoints (`learner.restarts`).
    """

    def __init__(
        self, learner: LearnerGroup, folder: RunDir, progress: ProgressBar, limit: int
    ) -> None:
        self._learner, self._folder, self._progress, self._limit = learner, folder, progress, limit
        self._left = limit

    def checkpointed(self) -> None:
        """Allow all restarts again: there is a new checkpoint."""
        self._left = self._limit

    async def attempts(self) -> AsyncIterator[Attempt]:
        """One attempt at a run's steps, and another whenever the learner was lost in the last.

            async for attempt in recovery.attempts():
                with attempt:
                    for step in range(attempt.start, steps):
                        ...

        Raises:
            LearnerLost: too often.
            RunFailed: after a loss, the newest checkpoint is damaged.
        """
        lost: LearnerLost | None = None
        while True:
            if lost is not None and not self._left:
                raise lost
            attempt = Attempt()
            with attempt:
                found = await self._load_newest(again=lost is not None)
                if found:
                    attempt.start, attempt.state = found.step, found.state
            if attempt.lost is None:
                yield attempt
            lost = attempt.lost
            if lost is None:
                return

    async def _load_newest(self, *, again: bool) -> Checkpoint | None:
        """Bring the learner to the newest checkpoint and return it; None: there is none."""
        made = self._folder.checkpoints()
        found = self._folder.latest_checkpoint()
        step = found.step if found else 0
        if again:
            if found and found.path != made[-1]:
                raise RunFailed(
                    f"{made[-1]} is damaged, and the learner was lost. The same command resumes "
                    f"from the checkpoint of step {step}."
                )
            self._left -= 1
            self._progress.note(f"a learner process died; restarting it from step {step}")
            await self._learner.restart()
            self._folder.rewind()
        elif found:
            self._progress.note(f"resumed at step {step}")
        if found:
            await self._learner.load(found.path)
        return found


@asynccontextmanager
async def open_training(config: Config, folder: RunDir) -> AsyncIterator[Training]:
    """Start the processes of a training run, or resume it.

    Args:
        folder: of the run; nothing is written before all processes have started.

    Raises:
        ConfigError: no seat is the policy's.
        DataError: rows of a data file cannot be read, are trained on and evaluated, or are not
            those that the run began with.
    """
    environments: dict[str, Environment] = {}
    seats: list[str] = []
    evaluated: dict[str, Environment] = {}
    for name, own in components(config).items():
        with named_keys(name):
            environment = make_environment(own, name)
            environments[name] = environment.training(own.env.held_out, own.env.duplicates)
            evaluated[name] = environment.evaluation(own.env.held_out, own.env.duplicates)
    for name, own in components(config).items():
        with named_keys(name):
            for other in evaluated.keys() - {name}:  # what one evaluates, no other trains on
                environments[name] = environments[name].without(
                    evaluated[other], own.env.duplicates
                )
            log_dropped(environments[name])
            check_trained(environments[name], own)
            seats += seats_of(environments[name], own, "model").values()
    rows = _rows_of(environments, evaluated)
    _check_rows(rows, folder)
    check_metrics(config, environments, "train")
    log_template_notes(config, seats)
    log = GroupLog(folder.path / "groups")
    found = folder.latest_checkpoint()
    start, state = (found.step, found.state) if found else (0, {})
    if folder.went_back:
        log.go_back(start)
    if start < config.train.steps:
        folder.reopen()
    async with open_cluster(config, config.train.steps, log.turns) as (rollouts, learner, weights):
        folder.begin()
        if rows:
            folder.write_json(ROWS, rows)
        sampler = run_sampler(environments, config)
        async with GroupCollector(rollouts, sampler, config, log) as collector:
            collector.restore(start, state)
            training = Training(config, folder, rollouts, collector, learner, weights)
            with training._progress, training._monitor:
                yield training


def _rows_of(
    trained: Mapping[str, Environment], evaluated: Mapping[str, Environment]
) -> dict[str, list[str]]:
    """File and digest of what each environment draws from a data file."""
    return {
        f"{part} {name}".strip(): [environment.source.path, environment.source.digest()]
        for part, environments in (("train", trained), ("eval", evaluated))
        for name, environment in environments.items()
        if isinstance(environment.source, Rows)
    }


def _check_rows(rows: Mapping[str, list[str]], folder: RunDir) -> None:
    """Raise DataError where a run that resumes would go on with other rows."""
    before = folder.read_json(ROWS) or rows
    for part, (path, digest) in rows.items():
        if before.get(part, [path, digest])[1] != digest:
            raise DataError(
                f"{path}: its rows are not those that {folder.path} began with. Put them back, or "
                "start anew with another run.name."
            )
