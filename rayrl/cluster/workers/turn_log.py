"""The turns of live episodes, in a process that env workers do not take along when they die."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import ray

from rayrl.cluster.gone import ACTOR_DIED
from rayrl.cluster.serving.streams import PAUSE_S
from rayrl.cluster.session import beside_driver
from rayrl.rollout.encoding import turn_to_bytes
from rayrl.rollout.records import Records
from rayrl.rollout.resume import PartialEpisode, TurnLog, TurnRecord
from rayrl.types import Group, Turn

__all__ = ["Recorder", "Telling", "start_recorder"]

COMPACT_AT = 64 << 20  # bytes of its file, when it begins to be worth writing anew


class Recorder:
    """Keeps what workers tell, until their groups have ended.

    Args:
        file: where it keeps it, for a recorder that comes after this one has died, alone or with
            the driver, made when there is something to keep; None: in memory only.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._log = TurnLog()
        self._file = file
        self._records = Records(file) if file is not None and file.is_file() else None
        self._compact = COMPACT_AT
        for turns, over in () if self._records is None else self._records.read():
            self._take(turns, over)

    def _take(self, turns: Sequence[TurnRecord], over: Sequence[str]) -> None:
        for episode, attempt, turn in turns:
            self._log.add(episode, attempt, turn)
        for group in over:
            self._log.remove(group)

    def add(self, turns: Sequence[TurnRecord]) -> None:
        """What happened, in its order; turns come as bytes."""
        self._take(turns, ())
        self._write(turns, ())

    def forget(self, groups: Sequence[str]) -> None:
        """These have ended."""
        self._take((), groups)
        self._write((), groups)

    def known(self) -> set[str]:
        """The groups of which there is something."""
        return self._log.groups

    def begun(self, groups: Sequence[str]) -> dict[str, PartialEpisode]:
        """What there is of the episodes of these groups, by id."""
        return self._log.partial_episodes(groups)

    def _write(self, turns: Sequence[TurnRecord], over: Sequence[str]) -> None:
        if self._file is None:
            return
        try:
            self._records = self._records or Records(self._file)
            if over and not self._log.groups:
                self._records.truncate(0)
            elif self._records.size > self._compact:
                self._rewrite(self._records)
            else:
                self._records.add((_plain(turns), over))
        except OSError as error:  # what is lost now is lost only if the driver dies, too
            print(f"{self._file}: {error}; live turns are kept in memory only.")
            self._records = self._file = None

    def _rewrite(self, records: Records) -> None:
        """Leave out what has ended."""
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


class Telling:
    """A worker's side. Turns made while it waits, and while a call is under way, travel together.

    A call costs the recorder as much as a hundred turns. What a lost worker had not told is asked
    for again.

    Args:
        recorder: the actor. While it is away turns are lost; their episodes start over then, if
            their worker is lost as well.

    Attributes:
        pause_s: between two calls.
    """

    def __init__(self, recorder: Any) -> None:
        self.pause_s = PAUSE_S
        self._recorder = recorder
        self._waiting: dict[str, list[TurnRecord]] = {}  # by group
        self._sending: asyncio.Task[None] | None = None

    def add(self, episode: str, attempt: int, turn: Turn) -> None:
        """For `on_turn` of `play_groups`."""
        # as bytes already: the recorder only keeps it, and Ray's pickling takes five times as long
        told = episode, attempt, turn_to_bytes(turn)
        self._waiting.setdefault(episode.rpartition("/")[0], []).append(told)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())

    def ended(self, group: Group) -> None:
        """What was not told of it yet need not be: told late, it would never be forgotten."""
        if not any(e.failure is not None and e.failure.kind == "infra" for e in group.episodes):
            self._waiting.pop(group.id, None)

    async def _send(self) -> None:
        while self._waiting:
            now, self._waiting = self._waiting, {}
            with suppress(*ACTOR_DIED):
                await self._recorder.add.remote(list(chain.from_iterable(now.values())))
            await asyncio.sleep(self.pause_s)


def start_recorder(file: Path | None = None) -> Any:
    """Start the actor, beside the driver.

    Raises:
        DataError: the file is damaged, or was not written by a recorder.
    """
    if file is not None:  # here, so that what is wrong with it is said by the driver
        records = Records(file)
        try:
            records.read()
        finally:
            records.close()
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Recorder)
    return actor.options(scheduling_strategy=beside_driver()).remote(file)
