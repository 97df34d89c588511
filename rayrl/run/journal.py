"""Episodes that are on the disk as soon as they end, so that a stopped evaluation goes on.

A journal is a JSONL file of episodes in the order they ended. A process killed while it wrote
leaves a torn last line, which is cut off. Opened again, what has a score is known and is not played
again, nor is what a server refuses; what failed otherwise is played again, and a later line counts
instead of an earlier one of the same episode. When all is played the file is written anew in the
order of the plans, so that it does not tell whether the run was stopped on its way.
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
from rayrl.run.files import sync, write_atomic
from rayrl.run.progress_bar import ProgressBar
from rayrl.types import Episode, Group, Task, Usage, sum_usage

__all__ = ["Journal", "Play"]

SYNC_EVERY_S = 1.0  # what a power cut may lose; a killed process loses nothing


class Journal:
    """The episodes of some plans, one episode each.

    Args:
        file: where they are kept; None keeps none.
        plans: what is to be played.

    Attributes:
        known: groups that were played before and need not be played again, by id.
        usage: tokens that every episode in the file cost at a server, failed ones included.

    Raises:
        DataError: a line that is not an episode, other than a torn last one.
        RunFailed: an episode is of another task than its plan.
    """

    def __init__(
        self, file: Path | None, plans: Sequence[GroupPlan], seats: Mapping[str, str]
    ) -> None:
        self.file, self.plans = file, plans
        self.known: dict[str, Group] = {}
        self.usage: Usage | None = None
        self._last: dict[str, Usage | None] = {}  # of an episode's last line
        self._lost: dict[str, Usage | None] = {}  # of its lines before
        self._out: TextIO | None = None
        self._synced = time.monotonic()
        if file is not None and file.is_file():
            _cut_torn_line(file)
            try:
                self._read(read_checked(file), trainable_seats(seats))
            except DataError as error:
                raise DataError(
                    f"{error}. Remove the line, and its episode is played again."
                ) from error

    def _read(self, episodes: Iterable[tuple[Episode, str]], trainable: tuple[str, ...]) -> None:
        by_id = {plan.id: plan for plan in self.plans}
        for episode, problem in episodes:
            plan = by_id.get(episode.id.rpartition("/")[0])
            if plan is None or not same_task(_read_again(plan.task), episode.task):
                raise RunFailed(
                    f"{self.file}: episode {episode.id} is of another task than this run plays; "
                    "has the environment's code changed? Use another run.name to start anew."
                )
            if problem:
                raise DataError(problem)
            self._count(episode)
            if _is_over(episode):
                own = (replace(episode, task=plan.task),)
                self.known[plan.id] = Group(plan.id, plan.task, own, trainable)

    def add(self, group: Group) -> None:
        """Append the episodes of a group that has ended."""
        for episode in group.episodes:
            self._count(episode)
        if self.file is None:
            return
        if self._out is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._out = self.file.open("a", encoding="utf-8")
        self._out.write(_lines(group.episodes))
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
        """All that was added is on the disk."""
        if self._out is not None:
            os.fsync(self._out.fileno())
            self._out.close()
            self._out = None

    def seal(self, groups: Sequence[Group]) -> None:
        """Write the file anew: these episodes, in the order of the plans.

        The usage of earlier lines of an episode is added to its `retried_usage`.
        """
        self.close()
        if self.file is not None:
            place = {plan.id: k for k, plan in enumerate(self.plans)}
            ordered = sorted(groups, key=lambda group: place[group.id])
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(_lines(map(self._with_lost, group.episodes)) for group in ordered)
            write_atomic(self.file, text.encode())

    def _with_lost(self, episode: Episode) -> Episode:
        usage = sum_usage([episode.retried_usage, self._lost.get(episode.id)])
        return replace(episode, retried_usage=usage)


class Play:
    """Plays what journals lack, within a budget of tokens, and says how it goes.

    Args:
        journals: all that is to be played, so that progress and budget are of the whole.
        bar: told episodes per minute, tokens and errors.
        max_tokens: nothing new is begun once so many are spent; 0 is no limit.
    """

    def __init__(self, journals: Sequence[Journal], bar: ProgressBar, max_tokens: int = 0) -> None:
        self.journals, self.bar, self.max_tokens = journals, bar, max_tokens
        self.total = sum(len(journal.plans) for journal in journals)
        self.done = sum(len(journal.known) for journal in journals)
        self._began, self._played, self._errors = 0.0, 0, 0
        if self.done:
            bar.update(self.done)
            bar.note(f"{self.done} of {self.total} episodes were played before")

    @property
    def spent(self) -> int:
        """Tokens so far, those of earlier processes included."""
        usage = sum_usage(journal.usage for journal in self.journals)
        return usage.total if usage else 0

    def check_budget(self) -> None:
        """Raise RunFailed if there is more to play and nothing left to spend."""
        if self.max_tokens and self.spent >= self.max_tokens and self.done < self.total:
            raise RunFailed(
                f"endpoint.max_tokens_total={self.max_tokens} is spent: {self.spent} tokens for "
                f"{self.done} of {self.total} episodes, which are kept. Raise it, and the same "
                "command goes on from there."
            )

    async def collect(self, rollouts: Rollouts, journal: Journal) -> CollectedGroups:
        """Play what one journal lacks.

        Raises:
            RunFailed: the budget is spent, or `rollouts.collect` cannot go on.
        """
        if len(journal.known) < len(journal.plans):
            self.check_budget()
        self._began = self._began or time.monotonic()

        def ended(group: Group) -> None:
            journal.add(group)
            self.done += all(map(_is_over, group.episodes))
            self._errors += any(episode.failure is not None for episode in group.episodes)
            self._played += 1
            minutes = (time.monotonic() - self._began) / 60
            figures: dict[str, float | int | str] = {
                "per minute": self._played / max(minutes, 1e-9)
            }
            if journal.usage is not None:
                figures["tokens"] = f"{self.spent:,}"
            if self._errors:
                figures["errors"] = self._errors
            self.bar.update(self.done, figures)
            if self.max_tokens and self.spent >= self.max_tokens:
                rollouts.wind_down()

        try:
            played = await rollouts.collect(journal.plans, on_group=ended, known=journal.known)
        finally:
            journal.close()
        if len(played.groups) + len(played.dropped) < len(journal.plans):
            self.check_budget()
        return played


def _is_over(episode: Episode) -> bool:
    """Whether playing it again could change nothing."""
    return episode.failure is None or episode.failure.kind == "refused"


def _lines(episodes: Iterable[Episode]) -> str:
    return "".join(map(episode_to_line, episodes))


def _read_again(task: Task) -> Task:
    """The task as a file gives it back."""
    return task_from_json(json.loads(json.dumps(task_to_json(task))))


def _cut_torn_line(file: Path) -> None:
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)
        sync(file)
