"""Surviving the loss of the learner: its processes start again from the run's newest checkpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager

from rayrl.cluster.learner_group import LearnerGroup
from rayrl.errors import LearnerLost, RunFailed
from rayrl.run.folder import RunDir
from rayrl.run.progress_bar import ProgressBar

__all__ = ["Attempt", "Recovery"]


class Attempt(AbstractContextManager["Attempt"]):
    """One try at the remaining steps; used in a `with` block, it notes a learner that is lost.

    Attributes:
        start: the first step to make.
        lost: how the learner was lost in the block, or None.
    """

    def __init__(self) -> None:
        self.start = 0
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
                attempt.start = await self._load_newest(again=lost is not None)
            if attempt.lost is None:
                yield attempt
            lost = attempt.lost
            if lost is None:
                return

    async def _load_newest(self, *, again: bool) -> int:
        """Bring the learner to the newest checkpoint; returns the step to go on with."""
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
        return step
