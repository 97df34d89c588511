"""Rows of a data file as tasks: read when first needed, drawn in shuffled epochs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from rayrl.environment.data_files import DataRow, read_data
from rayrl.environment.tasks import task_from_fields, task_key
from rayrl.errors import DataError, did_you_mean
from rayrl.types import Task, derive_seed

__all__ = ["Row", "Rows", "disjoint", "missing_column", "rows"]

_NAMED = 3  # rows that a message about many names


@dataclass(frozen=True, kw_only=True)
class Row(Task):
    """A row of a data file: `row["question"]` is what it has in that column.

    Attributes:
        place: file and line it comes from.
        columns: plain data by column.
    """

    place: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, column: str) -> Any:
        """What the row has in a column.

        Raises:
            DataError: there is no such column; names file and line.
        """
        if column not in self.columns:
            raise DataError(missing_column(self.place, column, self.columns))
        return self.columns[column]


T_co = TypeVar("T_co", bound=Task, covariant=True)
T = TypeVar("T", bound=Task)


class Rows(Sequence[T_co], Generic[T_co]):
    """The tasks of a data file, in its order; `rows` makes them.

    An environment draws them in epochs: all of them in an order that the seed shuffles, then all in
    another order. Which task a place in a run has is a function of the seed and that place, so that
    a run resumes where it was. The file is read when a task is first needed; a process that only
    plays needs no file.

    Attributes:
        path: the file.
        dropped: what `disjoint` left out, as "train.jsonl:19 repeats test.jsonl:2".
    """

    def __init__(
        self,
        path: str,
        make: Callable[[DataRow, int], T_co],
        key: Callable[[T_co], Hashable],
    ) -> None:
        self.path = path
        self.key = key
        self.dropped: tuple[str, ...] = ()
        self._make = make
        self._chosen: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"Rows({self.path!r})"

    @functools.cached_property
    def _tasks(self) -> Sequence[T_co]:
        tasks = [self._make(row, number) for number, row in enumerate(read_data(self.path))]
        if not tasks:
            raise DataError(f"{self.path}: there are no rows in it")
        return tasks if self._chosen is None else [tasks[place] for place in self._chosen]

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | Sequence[T_co]:
        return self._tasks[index]

    def digest(self) -> str:
        """SHA-256 of the tasks in their order."""
        return hashlib.sha256("\n".join(map(task_key, self._tasks)).encode()).hexdigest()

    def select(self, places: Sequence[int]) -> Rows[T_co]:
        """The tasks at these places."""
        new = Rows(self.path, self._make, self.key)
        before = range(len(self)) if self._chosen is None else self._chosen
        new._chosen = tuple(before[place] for place in places)
        new._tasks = [self._tasks[place] for place in places]
        return new

    def remade(self, make: Callable[[DataRow, int], T], key: Callable[[T], Hashable]) -> Rows[T]:
        """The same rows of the file, made into tasks by another function."""
        new = Rows(self.path, make, key)
        new._chosen = self._chosen
        return new

    def drawn(self, seed: int, index: int) -> T_co:
        """The task at place `index` of a run's draws."""
        return self._tasks[self.place(seed, index)]

    def place(self, seed: int, index: int) -> int:
        """Where in the file's order that task is."""
        epoch, within = divmod(index, len(self))
        return _order(len(self), seed, epoch)[within]


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(n))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order


@overload
def rows(path: str | Path) -> Rows[Row]: ...
@overload
def rows(path: str | Path, task: type[T]) -> Rows[T]: ...
def rows(path: str | Path, task: type[Task] = Row) -> Rows[Any]:
    """The rows of a data file as tasks for an environment of your own.

        @rayrl.env(tasks=rayrl.rows("sums.jsonl"), rewards={"right": 1.0})
        async def sums(task: rayrl.Row, agent: rayrl.Agent) -> rayrl.Scores:
            reply = await agent(task["question"])
            return {"right": float(reply.strip() == task["answer"])}

    Args:
        path: a .jsonl, .json, .csv or .parquet file, a folder that `Dataset.save_to_disk` wrote, or
            `hf:OWNER/NAME` of the Hugging Face hub. It is read when the first task is needed.
        task: a class of tasks whose fields have the names of columns; other columns are left out,
            and values must fit the fields' type hints. A task's seed is the number of its row.

    Raises:
        DataError: when the file is read: it is missing or malformed, or a row does not fit `task`;
            names file and line.
    """
    if task is Row:
        return Rows(str(path), _row, _columns_key)
    return Rows(str(path), functools.partial(_own_task, task), _fields_key)


def _row(row: DataRow, number: int) -> Row:
    return Row(seed=number, place=row.place, columns=row.columns)


def _own_task(kind: type[Task], row: DataRow, number: int) -> Task:
    fields = {item.name: item for item in dataclasses.fields(kind) if item.init}
    del fields["seed"]  # the row's number, whatever a column is called
    given = {name: row.columns[name] for name in fields if name in row.columns}
    for name, item in fields.items():
        if name not in given and item.default is item.default_factory is dataclasses.MISSING:
            missing = missing_column(row.place, name, row.columns)
            raise DataError(f"{missing} {kind.__name__} needs it.")
    try:
        return task_from_fields({"seed": number, **given}, kind)
    except TypeError as error:
        raise DataError(f"{row.place}: {error}") from None


def missing_column(place: str, column: str, columns: Sequence[str] | dict[str, Any]) -> str:
    """The message for a column that a row does not have."""
    near = did_you_mean(column, columns)
    return f"{place}: there is no column {column!r}, only {', '.join(columns) or 'none'}.{near}"


def _columns_key(row: Row) -> Hashable:
    return json.dumps(row.columns, sort_keys=True)


def _fields_key(task: Task) -> Hashable:
    return repr(dataclasses.replace(task, seed=0))


def disjoint(training: Rows[T], evaluation: Rows[Any], duplicates: str) -> Rows[T]:
    """The training rows, of which evaluation may have none.

    Args:
        duplicates: what becomes of a row that both have: "refuse" or "drop" (`env.duplicates`).

    Raises:
        DataError: both have some, or there are no others; names the rows.
    """
    asked = {evaluation.key(task): task for task in reversed(evaluation)}
    kept = [place for place, task in enumerate(training) if training.key(task) not in asked]
    if len(kept) == len(training):
        return training
    pairs = [(task, asked[key]) for task in training if (key := training.key(task)) in asked]
    if duplicates == "drop" and kept:
        rest = training.select(kept)
        rest.dropped = training.dropped + tuple(
            f"{_place(training, ours)} repeats {_place(evaluation, theirs)}"
            for ours, theirs in pairs
        )
        return rest
    named = "; ".join(
        f"{_place(evaluation, theirs)} repeats {_place(training, ours)}"
        for ours, theirs in pairs[:_NAMED]
    )
    more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
    remedy = "or train without them: env.duplicates=drop" if kept else "none other is left to train"
    raise DataError(
        f"rows that evaluation plays are in the training data too: {named}{more}. Remove one of "
        f"each, so that evaluation measures what was not trained on; {remedy}."
    )


def _place(tasks: Rows[Any], task: Task) -> str:
    return task.place if isinstance(task, Row) else f"{tasks.path}: row {task.seed + 1}"
