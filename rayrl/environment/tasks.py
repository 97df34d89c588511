"""Tasks as JSON and back: what pydantic makes of a task class's type hints."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from rayrl.errors import did_you_mean
from rayrl.types import Task

__all__ = [
    "LoggedTask",
    "as_kind",
    "fields_of",
    "misread",
    "same",
    "task_from_json",
    "task_to_json",
]

TYPE = "type"  # key of the class's name, beside the fields


@dataclass(frozen=True, kw_only=True)
class LoggedTask(Task):
    """A task read from a file whose class is not loaded here: its fields as plain data."""

    type: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The original task's fields."""
        return dict(self.fields)


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as plain data: its class's name, and its fields.

    Raises:
        TypeError: a field holds something that JSON has no word for; names the field.
    """
    if isinstance(task, LoggedTask):
        return {TYPE: task.type, **task.fields}
    return {TYPE: _name(type(task)), **fields_of(task)}


def fields_of(task: Task) -> dict[str, Any]:
    """The fields of a task as plain data.

    Raises:
        TypeError: as `task_to_json`.
    """
    kind: Any = type(task)
    try:
        fields = _adapter(kind).dump_python(
            task, mode="json", warnings=False, fallback=_plain_number
        )
        json.dumps(fields)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TypeError(f"{_unwritable(task)} ({error})") from error
    return {key: fields[name] for name, key in _keys(kind).items()}


def task_from_json(data: Mapping[str, Any]) -> Task:
    """The task `task_to_json` was given; a `LoggedTask` where its class is not loaded.

    Raises:
        TypeError: the fields do not fit the class; names the field.
    """
    fields = {key: value for key, value in data.items() if key != TYPE}
    kind = _loaded().get(data[TYPE])
    if kind is None:
        return LoggedTask(seed=fields.get("seed", 0), type=data[TYPE], fields=fields)
    return as_kind(fields, kind)


def as_kind(fields: Mapping[str, Any], kind: Any) -> Task:
    """A task of that class with the fields that `task_to_json` wrote.

    Raises:
        TypeError: the fields do not fit the class; names the field.
    """
    names = {key: name for name, key in _keys(kind).items()}
    given = {names.get(key, key): value for key, value in fields.items()}
    text = json.dumps(given)
    try:
        if "\\ud" in text:  # perhaps half of a surrogate pair, which pydantic's JSON refuses
            task: Task = _adapter(kind).validate_python(given)
        else:
            task = _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise TypeError(_in_words(kind, error)) from None
    return task


def misread(task: Task) -> str:
    """The first field that a file does not give back as it was, in words; empty if all are.

    Raises:
        TypeError: it cannot be written, or not be read again; names the field.
    """
    again = as_kind(fields_of(task), type(task))
    for path, one, other in _differences(task, again):
        hint = next((f.type for f in dataclasses.fields(task) if f.name == path[0]), "?")
        name = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
        return (
            f"field {'.'.join(path)!r} (type hint {name}) holds {one!r}, but would be read from a "
            f"file as {other!r}: give it a type hint that says what it holds"
        )
    return ""


def same(one: Task, other: Task) -> bool:
    """Whether they hold the same; unlike `==`, also where that is not a number."""
    return not any(_differences(one, other))


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Pydantic's view of a task class.

    Raises:
        TypeError: it has none, as of a hint that names nothing.
    """
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        adapter.rebuild(_types_namespace=kind.__names__, raise_errors=True)
    except (PydanticUserError, NameError) as error:
        why = str(error).split("\n")[0]
        raise TypeError(f"{kind.__name__}: {why}") from error
    return adapter


@functools.cache
def _keys(kind: Any) -> dict[str, str]:
    """Names of the fields and their keys in a file: other ones where a field is called `type`."""
    names = [one.name for one in dataclasses.fields(kind) if one.init]
    taken = TYPE in names
    return {name: f"{name}_" if taken and name.rstrip("_") == TYPE else name for name in names}


def _name(kind: type[Task]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _loaded() -> dict[str, type[Task]]:
    """Only classes that are loaded, the newest of a name: reading a file must not import any."""
    loaded: dict[str, type[Task]] = {}
    left = deque([Task])
    while left:
        kind = left.popleft()
        loaded[_name(kind)] = kind
        left += kind.__subclasses__()
    return loaded


def _plain_number(value: Any) -> Any:
    """A scalar of numpy or torch, which pydantic does not know."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not data")


def _unwritable(task: Task) -> str:
    """Which field cannot be written."""
    for one in dataclasses.fields(task):
        value = getattr(task, one.name)
        try:
            any_value = TypeAdapter(Any).dump_python(value, mode="json", fallback=_plain_number)
            json.dumps(any_value)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return f"field {one.name!r} holds {value!r} of {type(value).__name__}, which is no data"
    return f"{type(task).__name__} does not hold what its type hints say"


def _in_words(kind: type[Task], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "unexpected_keyword_argument" and len(path) == 1:
        near = did_you_mean(path[0], [one.name for one in dataclasses.fields(kind)])
        return f"{kind.__name__} has no field {path[0]!r}.{near}"
    where = f"field {'.'.join(path)!r}: " if path else ""
    expected = first["msg"].replace("Input should be", "expected")
    if first["type"] == "needs_python_object":
        expected = "expected what no file can hold"
    return f"{where}{expected}, got {first['input']!r}"


def _differences(one: Any, other: Any) -> Iterator[tuple[list[str], Any, Any]]:
    """Where two values differ, by path; a number of numpy is the number it is."""
    if hasattr(one, "dtype") and hasattr(one, "item"):
        one = one.item()
    if type(one) is not type(other):
        yield [], one, other
    elif dataclasses.is_dataclass(one):
        for item in dataclasses.fields(one):
            for path, *values in _differences(getattr(one, item.name), getattr(other, item.name)):
                yield [item.name, *path], *values
    elif isinstance(one, Mapping):
        if [*one] != [*other] or [*map(type, one)] != [*map(type, other)]:
            yield [], one, other
        for key in one.keys() & other.keys():
            for path, *values in _differences(one[key], other[key]):
                yield [str(key), *path], *values
    elif isinstance(one, Sequence) and not isinstance(one, str | bytes):
        if len(one) != len(other):
            yield [], one, other
        for k, pair in enumerate(zip(one, other, strict=False)):
            for path, *values in _differences(*pair):
                yield [str(k), *path], *values
    elif isinstance(one, AbstractSet):
        if one != other or {*map(type, one)} != {*map(type, other)}:
            yield [], one, other
    elif one != other and not (isinstance(one, float) and math.isnan(one) and math.isnan(other)):
        yield [], one, other
