"""The turns of live episodes, kept in a process that survives the env workers.

Each worker sends its turns to the recorder, an actor beside the driver; when a worker has died, the
driver asks the recorder for the turns from which its episodes resume.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import ray

from rayrl.cluster.actors import ACTOR_DIED, beside_driver
from rayrl.cluster.serving.streams import PAUSE_S
from rayrl.cluster.workers.scheduler import is_broken
from rayrl.rollout.records import Records, turn_to_bytes
from rayrl.rollout.resume import PartialEpisode, TurnLog, TurnRecord
from rayrl.types import Group, Turn

__all__ = ["RecordedTurns", "Recorder", "TurnSender", "start_recorder"]

COMPACT_AT = 64 << 20  # bytes of its file, from which on it is rewritten when most has ended


class Recorder:
    """Keeps the turns of live episodes until their groups have ended.

    Args:
        file: a copy on the disk, for the recorder that replaces this one after it has died, alone
            or with the driver. Created with the first turn. None: in memory only.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._log = TurnLog()
        self._file = file
        self._records = Records(file) if file is not None and file.is_file() else None
        self._compact = COMPACT_AT
        for turns, ended in () if self._records is None else self._records.read():
            self._apply(turns, ended)

    def _apply(self, turns: Sequence[TurnRecord], ended: Sequence[str]) -> None:
        for episode, attempt, turn in turns:
            self._log.add(episode, attempt, turn)
        for group in ended:
            self._log.remove(group)

    def add(self, turns: Sequence[TurnRecord]) -> None:
        """Record turns, as bytes, in the order in which they were made."""
        self._apply(turns, ())
        self._write(turns, ())

    def discard(self, groups: Sequence[str]) -> None:
        """Drop all turns of groups that have ended."""
        self._apply((), groups)
        self._write((), groups)

    def groups(self) -> set[str]:
        """Ids of the groups that have recorded turns."""
        return self._log.groups

    def partial_episodes(self, groups: Sequence[str]) -> dict[str, PartialEpisode]:
        """The recorded turns of these groups, by id of the episode."""
        return self._log.partial_episodes(groups)

    def _write(self, turns: Sequence[TurnRecord], ended: Sequence[str]) -> None:
        if self._file is None:
            return
        try:
            self._records = self._records or Records(self._file)
            if ended and not self._log.groups:
                self._records.truncate(0)
            elif self._records.size > self._compact:
                self._rewrite(self._records)
            else:
                self._records.add((_plain(turns), ended))
        except OSError as error:  # the turns are lost only if the driver dies as well
            print(f"{self._file}: {error}; live turns are kept in memory only.")
            self._records = self._file = None

    def _rewrite(self, records: Records) -> None:
        """Write the file anew, without what has ended."""
        anew = records.file.with_suffix(".new")
        anew.unlink(missing_ok=True)
        self._records = Records(anew)
        self._records.add((_plain(self._log.records()), ()))
        self._compact = max(COMPACT_AT, 3 * self._records.size)
        records.close()
        anew.replace(records.file)
        self._records.file = records.file


def _plain(turns: Sequence[TurnRecord]) -> list[TurnRecord]:
    return [
        (e, n, turn if isinstance(turn, bytes) else turn_to_bytes(turn)) for e, n, turn in turns
    ]


class TurnSender:
    """The worker's side of the recorder: sends turns in batches.

    A call costs the recorder as much as a hundred turns; so turns that are made during a call and
    the pause after it are sent together. A turn that a worker has not sent when it dies is
    generated again.

    Args:
        recorder: the actor. Turns that are sent while it is away are lost; their episodes start
            over if their worker dies as well.

    Attributes:
        pause_s: seconds between two calls.
    """

    def __init__(self, recorder: Any) -> None:
        self.pause_s = PAUSE_S
        self._recorder = recorder
        self._unsent: dict[str, list[TurnRecord]] = {}  # by group
        self._sending: asyncio.Task[None] | None = None

    def add(self, episode: str, attempt: int, turn: Turn) -> None:
        """Send a turn soon; the `on_turn` of `play_groups`."""
        # as bytes already: the recorder only keeps it, and Ray's pickling takes five times as long
        record = episode, attempt, turn_to_bytes(turn)
        self._unsent.setdefault(episode.rpartition("/")[0], []).append(record)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())

    def drop_ended(self, group: Group) -> None:
        """Do not send the turns of a group that has ended, unless it is to be played again.

        They might reach the recorder after the driver has discarded the group, and stay there.
        """
        if not is_broken(group):
            self._unsent.pop(group.id, None)

    async def _send(self) -> None:
        while self._unsent:
            now, self._unsent = self._unsent, {}
            with suppress(*ACTOR_DIED):
                await self._recorder.add.remote(list(chain.from_iterable(now.values())))
            await asyncio.sleep(self.pause_s)


class RecordedTurns:
    """The driver's side of the recorder: finds the turns from which episodes resume.

    Args:
        recorder: the actor.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._inherited: set[str] = set()  # groups that began with an earlier driver

    async def open(self) -> None:
        """Learn which groups began with an earlier driver; before any begins with this one."""
        self._inherited = await self._recorder.groups.remote()

    async def find(
        self, interrupted: Sequence[str], groups: Sequence[str], version: int
    ) -> dict[str, PartialEpisode]:
        """Find the episodes of groups that begin now.

        Args:
            interrupted: ids of those of the groups that have begun with this driver before.
            groups: all ids. Those that began with an earlier driver resume as well.
            version: of the weights. Turns that an earlier driver had from newer ones are left out.

        Returns:
            Episodes with recorded turns, by id.
        """
        found = await self._partial_episodes(interrupted) if interrupted else {}
        inherited = [group for group in groups if group in self._inherited]
        if not inherited:
            return found
        self._inherited.difference_update(inherited)

        def old(turn: Turn) -> bool:
            return all(span.version <= version for span in turn.versions)

        return found | {
            name: replace(episode, turns=tuple(takewhile(old, episode.turns)))
            for name, episode in (await self._partial_episodes(inherited)).items()
        }

    def discard(self, groups: Sequence[str]) -> None:
        """Drop all turns of these groups, by id."""
        self._inherited.difference_update(groups)
        self._recorder.discard.remote(groups)

    async def _partial_episodes(self, groups: Sequence[str]) -> dict[str, PartialEpisode]:
        try:
            found: dict[str, PartialEpisode] = await self._recorder.partial_episodes.remote(groups)
        except ACTOR_DIED:  # its replacement has no turns in memory: the episodes start over
            return {}
        return found


def start_recorder(file: Path | None = None) -> Any:
    """Start the recorder's actor, on the driver's node.

    Raises:
        DataError: the file is damaged, or was not written by a recorder.
    """
    if file is not None:  # read here as well, so that the driver raises what is wrong with it
        records = Records(file)
        try:
            records.read()
        finally:
            records.close()
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Recorder)
    return actor.options(scheduling_strategy=beside_driver()).remote(file)
