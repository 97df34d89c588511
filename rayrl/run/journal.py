"""Episodes written to the disk as they end, so that a stopped evaluation can resume.

A journal is a JSONL file of episodes in the order in which they ended. A killed process may leave a
torn last line, which is truncated. On resume, episodes that have a score or were refused by a
server are not played again; other failures are, and the later line of an episode replaces the
earlier one. When all episodes are played, the file is rewritten in the order of the plans, so that
its contents do not depend on interruptions.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from rayrl.cluster.rollouts import CollectedGroups, Rollouts
from rayrl.cluster.workers.env_worker import trainable_seats
from rayrl.environment.tasks import same_task, task_from_json, task_to_json
from rayrl.errors import DataError, RunFailed
from rayrl.rollout.episode_io import episode_to_line, read_checked
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.files import fsync, write_atomic
from rayrl.run.progress_bar import ProgressBar
from rayrl.types import Episode, Group, Task, Usage, sum_usage

__all__ = ["Journal", "JournaledRollouts"]

SYNC_EVERY_S = 1.0  # a power cut may lose this much; a killed process loses nothing


class Journal:
    """Journal of the episodes of `plans`, one episode each.

    Args:
        file: path of the journal; None writes nothing.
        plans: all episodes to play.
        seats: what plays each seat, by component of the mixture.

    Attributes:
        known: groups that need not be played again, by id.
        usage: token usage at a server of every line in the file, failed episodes included.

    Raises:
        DataError: a line other than a torn last one is not an episode.
        RunFailed: an episode's task differs from its plan's.
    """

    def __init__(
        self,
        file: Path | None,
        plans: Sequence[GroupPlan],
        seats: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.file, self.plans = file, plans
        self.known: dict[str, Group] = {}
        self.usage: Usage | None = None
        self._last: dict[str, Usage | None] = {}  # of an episode's latest line
        self._lost: dict[str, Usage | None] = {}  # of its earlier lines
        self._out: TextIO | None = None
        self._synced = time.monotonic()
        if file is not None and file.is_file():
            data = file.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(file, whole)
                fsync(file)
            try:
                self._read(read_checked(file), seats)
            except DataError as error:
                raise DataError(
                    f"{error}. Remove the line, and its episode is played again."
                ) from error

    def _read(
        self, episodes: Iterable[tuple[Episode, str]], seats: Mapping[str, Mapping[str, str]]
    ) -> None:
        by_id = {plan.id: plan for plan in self.plans}
        for episode, problem in episodes:
            plan = by_id.get(episode.id.rpartition("/")[0])
            if plan is None or not same_task(_through_json(plan.task), episode.task):
                raise RunFailed(
                    f"{self.file}: episode {episode.id} is of another task than this run plays; "
                    "has the environment's code changed? Use another run.name for a new run."
                )
            if problem:
                raise DataError(problem)
            self._count(episode)
            if _is_final(episode):
                own = (replace(episode, task=plan.task),)
                trainable = trainable_seats(seats[plan.component])
                self.known[plan.id] = Group(plan.id, plan.task, own, trainable)

    def add(self, group: Group) -> None:
        """Append the episodes of a finished group."""
        for episode in group.episodes:
            self._count(episode)
        if self.file is None:
            return
        if self._out is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._out = self.file.open("a", encoding="utf-8")
        self._out.write("".join(map(episode_to_line, group.episodes)))
        self._out.flush()
        if time.monotonic() - self._synced >= SYNC_EVERY_S:
            os.fsync(self._out.fileno())
            self._synced = time.monotonic()

    def _count(self, episode: Episode) -> None:
        self.usage = sum_usage([self.usage, episode.usage])
        if episode.id in self._last:
            lost = [self._lost.get(episode.id), self._last[episode.id]]
            self._lost[episode.id] = sum_usage(lost)
        self._last[episode.id] = episode.usage

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        if self._out is not None:
            os.fsync(self._out.fileno())
            self._out.close()
            self._out = None

    def seal(self, groups: Sequence[Group]) -> None:
        """Rewrite the file with these groups in the order of the plans.

        The usage of earlier lines of an episode is added to its `retried_usage`.
        """
        self.close()
        if self.file is not None:
            position = {plan.id: k for k, plan in enumerate(self.plans)}
            ordered = sorted(groups, key=lambda group: position[group.id])
            self.file.parent.mkdir(parents=True, exist_ok=True)
            episodes = [self._with_lost(e) for group in ordered for e in group.episodes]
            write_atomic(self.file, "".join(map(episode_to_line, episodes)).encode())

    def _with_lost(self, episode: Episode) -> Episode:
        usage = sum_usage([episode.retried_usage, self._lost.get(episode.id)])
        return replace(episode, retried_usage=usage)


class JournaledRollouts:
    """Play the missing episodes of journals within a token budget, and show progress.

    Args:
        journals: all journals of the run; progress and budget are over all of them.
        progress: shows episodes per minute, tokens and errors.
        max_tokens: no episode starts once so many tokens are spent; 0: no limit.
    """

    def __init__(
        self, journals: Sequence[Journal], progress: ProgressBar, max_tokens: int = 0
    ) -> None:
        self.journals, self.progress, self.max_tokens = journals, progress, max_tokens
        self.total = sum(len(journal.plans) for journal in journals)
        self.done = sum(len(journal.known) for journal in journals)
        self._began, self._played, self._errors = 0.0, 0, 0
        if self.done:
            progress.update(self.done)
            progress.note(f"{self.done} of {self.total} episodes were played before")

    @property
    def spent(self) -> int:
        """Tokens spent so far, including those of earlier processes."""
        usage = sum_usage(journal.usage for journal in self.journals)
        return usage.total if usage else 0

    def check_budget(self) -> None:
        """Raise RunFailed if episodes are missing and the budget is spent."""
        if self.max_tokens and self.spent >= self.max_tokens and self.done < self.total:
            raise RunFailed(
                f"endpoint.max_tokens_total={self.max_tokens} is spent: {self.spent} tokens for "
                f"{self.done} of {self.total} episodes, which are kept. Raise it and run the same "
                "command again to resume."
            )

    async def collect(self, rollouts: Rollouts, journal: Journal) -> CollectedGroups:
        """Play the missing episodes of one journal.

        Raises:
            RunFailed: the budget is spent, or `rollouts.collect` failed.
        """
        if len(journal.known) < len(journal.plans):
            self.check_budget()
        self._began = self._began or time.monotonic()

        def record(group: Group) -> None:
            journal.add(group)
            self.done += all(map(_is_final, group.episodes))
            self._errors += any(episode.failure is not None for episode in group.episodes)
            self._played += 1
            minutes = (time.monotonic() - self._began) / 60
            metrics: dict[str, float | int | str] = {
                "per minute": self._played / max(minutes, 1e-9)
            }
            if journal.usage is not None:
                metrics["tokens"] = f"{self.spent:,}"
            if self._errors:
                metrics["errors"] = self._errors
            self.progress.update(self.done, metrics)
            if self.max_tokens and self.spent >= self.max_tokens:
                rollouts.wind_down()

        try:
            played = await rollouts.collect(journal.plans, on_group=record, known=journal.known)
        finally:
            journal.close()
        if len(played.groups) + len(played.dropped) < len(journal.plans):
            self.check_budget()
        return played


def _is_final(episode: Episode) -> bool:
    """Tell whether an episode need not be played again."""
    return episode.failure is None or episode.failure.kind == "refused"


def _through_json(task: Task) -> Task:
    """Return the task as it is read from a file."""
    return task_from_json(json.loads(json.dumps(task_to_json(task))))
