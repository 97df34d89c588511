"""Groups on disk between two checkpoints: played once, they are never lost or trained on twice.

RUN/groups/step_000010.log belongs to the checkpoint of step 10. It begins with the groups that were
ready then; each group is appended when it ends, and each batch as the indices of its groups. A run
that resumes from the checkpoint trains on the same batches again and plays only what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrl.errors import DataError
from rayrl.rollout.records import Records, group_from_bytes, group_to_bytes
from rayrl.run.files import explain_full_disk
from rayrl.types import Group

__all__ = ["Batched", "Begun", "GroupLog", "Played", "Record", "Undone"]


@dataclass(frozen=True, slots=True)
class Begun:
    """Groups whose tasks were drawn by what had been played, before they began.

    Attributes:
        draws: what `TaskSampler.draws` says, by index.
    """

    draws: Mapping[int, Any]


@dataclass(frozen=True, slots=True)
class Played:
    """A group that ended.

    Attributes:
        index: of the group in the run.
    """

    index: int
    group: Group


@dataclass(frozen=True, slots=True)
class Batched:
    """What a step was given.

    Attributes:
        taken: indices of the groups it trains on, in order.
        dropped: indices of groups that are never trained on.
        restarted: indices of groups that began anew since the last batch: they were too old.
        rejected: indices of complete groups that taught nothing and are not trained on.
        replaced: for how many groups that taught nothing others were played.
    """

    step: int
    taken: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    restarted: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()
    replaced: int = 0

    @property
    def ended(self) -> tuple[int, ...]:
        """Indices of all groups that left with the batch."""
        return *self.taken, *self.dropped, *self.rejected


@dataclass(frozen=True, slots=True)
class Undone:
    """A batch that the run could not go on with: its failed groups are to be played again.

    Attributes:
        step: of the batch.
    """

    step: int


Record = Begun | Played | Batched | Undone


class GroupLog:
    """The log of one checkpoint; opened to append.

    Attributes:
        turns: file beside it for the turns of groups that have not ended.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.turns = folder.resolve() / "turns.log"
        self._records: Records | None = None

    def read(self, step: int) -> list[Record]:
        """Everything logged since the checkpoint of `step`; `add` appends after it.

        Raises:
            DataError: the file is damaged in front of its tail, or was not written by this class.
        """
        records = self._open(step).read()
        try:
            return [_from_data(*record) for record in records]
        except (TypeError, ValueError, DataError) as error:
            raise DataError(
                f"{self._at(step)}: {error}; remove the file, and what it held is played again."
            ) from error

    def begin(self, step: int, records: Sequence[Record]) -> None:
        """Begin the log of the checkpoint of `step`, which is about to be made, with these records.

        The log before it stays until `delete_others`.
        """
        self.close()
        self._at(step).unlink(missing_ok=True)
        self._open(step)
        for one in records:
            self.add(one)

    def delete_others(self, step: int) -> None:
        """Delete the logs of all checkpoints but that of `step`, which is there now."""
        for file in self._folder.glob("step_*.log"):
            if file != self._at(step):
                file.unlink()

    def go_back(self, step: int) -> None:
        """Delete what was played with weights after the checkpoint of `step`: those are lost."""
        self.delete_others(step)
        self.turns.unlink(missing_ok=True)

    def add(self, record: Record) -> None:
        """Append a record; it survives the death of this process."""
        assert self._records is not None
        then = "it goes on from the last checkpoint and what was played since"
        with explain_full_disk(self._folder, "a group that was played", then):
            self._records.add(_to_data(record))

    def close(self) -> None:
        """Close the file."""
        if self._records is not None:
            self._records.close()
            self._records = None

    def _at(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}.log"

    def _open(self, step: int) -> Records:
        self.close()
        self._records = Records(self._at(step))
        return self._records


def _to_data(record: Record) -> tuple[Any, ...]:
    if isinstance(record, Undone):
        return "undone", record.step
    if isinstance(record, Begun):
        return "begun", dict(record.draws)
    if isinstance(record, Played):
        return "played", record.index, group_to_bytes(record.group)
    lists = record.taken, record.dropped, record.restarted, record.rejected
    return "batched", record.step, *lists, record.replaced


def _from_data(kind: str, *rest: Any) -> Record:
    if kind == "undone":
        return Undone(*rest)
    if kind == "begun":
        return Begun(*rest)
    if kind == "played":
        index, data = rest
        return Played(index, group_from_bytes(data))
    step, *lists, replaced = rest
    taken, dropped, restarted, rejected = map(tuple, lists)
    return Batched(step, taken, dropped, restarted, rejected, replaced)
