"""Learning through the loss of the learner: from its run's newest checkpoint it goes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from rayrl.cluster.learner_group import LearnerGroup
from rayrl.errors import LearnerLost, RunFailed
from rayrl.run.folder import RunDir
from rayrl.run.progress_bar import ProgressBar

__all__ = ["Recovery"]


class Recovery:
    """Brings a learner to a run's newest checkpoint, at first and whenever it was lost.

    Args:
        limit: times it may be lost between two checkpoints, `learner.restarts`.
    """

    def __init__(self, learner: LearnerGroup, folder: RunDir, bar: ProgressBar, limit: int) -> None:
        self.learner, self.folder, self.bar, self.limit = learner, folder, bar, limit
        self._left = limit

    def checkpointed(self) -> None:
        """There is a new checkpoint: it has come on, and all attempts are there again."""
        self._left = self.limit

    async def through(
        self,
        total: int,
        step: Callable[[int], Awaitable[None]],
        end: Callable[[], Awaitable[None]],
        begin: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """All steps up to `total`, then the end; again from the newest checkpoint after a loss.

        Args:
            step: makes one step, given its number.
            end: what the learner is needed for when all steps are made.
            begin: called with the first step, whenever the learner has loaded a checkpoint or, with
                step 0, is new.

        Raises:
            LearnerLost: too often.
            RunFailed: after a loss, the newest checkpoint is damaged.
        """
        lost: LearnerLost | None = None
        while True:
            if lost is not None and not self._left:
                raise lost
            try:
                at = await self._load(lost is not None)
                if begin is not None:
                    await begin(at)
                while at < total:
                    await step(at)
                    at += 1
                await end()
            except LearnerLost as error:
                lost = error
            else:
                return

    async def _load(self, again: bool) -> int:
        """Bring the learner to the newest checkpoint; returns the step to go on with."""
        made = self.folder.checkpoints()
        found = self.folder.latest_checkpoint()
        at = found.step if found else 0
        if again:
            if found and found.path != made[-1]:
                raise RunFailed(
                    f"{made[-1]} is damaged, and the learner was lost. The same command goes on "
                    f"from the checkpoint of step {at}."
                )
            self._left -= 1
            self.bar.note(f"a learner process died; it starts again from step {at}")
            await self.learner.restart()
            self.folder.rewind()
        elif found:
            self.bar.note(f"resumed at step {at}")
        if found:
            await self.learner.load(found.path)
        return at
