"""Convert tasks to JSON and back, following the type hints of their class (with pydantic)."""

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
    "roundtrip_problem",
    "same_task",
    "task_fields",
    "task_from_fields",
    "task_from_json",
    "task_key",
    "task_to_json",
]

TYPE = "type"  # key of the class name, next to the fields


@dataclass(frozen=True, kw_only=True)
class LoggedTask(Task):
    """A task read from a file whose class is not loaded; its fields are plain data."""

    type: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the original task's fields."""
        return dict(self.fields)


def task_to_json(task: Task) -> dict[str, Any]:
    """Convert a task to plain data: its class name and its fields.

    Raises:
        TypeError: JSON cannot represent a field; names the field.
    """
    if isinstance(task, LoggedTask):
        return {TYPE: task.type, **task.fields}
    return {TYPE: _name(type(task)), **task_fields(task)}


def task_fields(task: Task) -> dict[str, Any]:
    """Convert the fields of a task to plain data.

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
    """Restore a task from `task_to_json`; a `LoggedTask` if its class is not loaded.

    Raises:
        TypeError: the fields do not fit the class; names the field.
    """
    fields = {key: value for key, value in data.items() if key != TYPE}
    kind = _loaded_classes().get(data[TYPE])
    if kind is None:
        return LoggedTask(seed=fields.get("seed", 0), type=data[TYPE], fields=fields)
    return task_from_fields(fields, kind)


def task_from_fields(fields: Mapping[str, Any], kind: Any) -> Task:
    """Create a task of class `kind` from the fields that `task_to_json` wrote.

    Raises:
        TypeError: the fields do not fit the class; names the field.
    """
    names = {key: name for name, key in _keys(kind).items()}
    given = {names.get(key, key): value for key, value in fields.items()}
    text = json.dumps(given)
    try:
        if "\\ud" in text:  # possibly a lone surrogate, which pydantic's JSON parser rejects
            task: Task = _adapter(kind).validate_python(given)
        else:
            task = _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise TypeError(_explain(kind, error)) from None
    return task


def roundtrip_problem(task: Task) -> str:
    """Describe the first field that changes when written and read back; empty if none does.

    Raises:
        TypeError: the task cannot be written, or not read back; names the field.
    """
    restored = task_from_fields(task_fields(task), type(task))
    for path, value, read in _differences(task, restored):
        hint = next((f.type for f in dataclasses.fields(task) if f.name == path[0]), "?")
        name = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
        return (
            f"field {'.'.join(path)!r} (type hint {name}) holds {value!r}, but would be read from "
            f"a file as {read!r}: give it a type hint that matches its values"
        )
    return ""


def same_task(first: Task, second: Task) -> bool:
    """Whether two tasks have equal fields; unlike with `==`, NaN equals NaN."""
    return not any(_differences(first, second))


def task_key(task: Task) -> str:
    """Return a key that is equal for equal tasks, whether generated or read from a file."""
    return json.dumps(task.to_dict(), default=repr)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Build the pydantic adapter of a task class.

    Raises:
        TypeError: a type hint is unsupported or cannot be resolved.
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
    """Return the key in a file of every field; they differ if a field is called `type`."""
    names = [item.name for item in dataclasses.fields(kind) if item.init]
    taken = TYPE in names
    return {name: f"{name}_" if taken and name.rstrip("_") == TYPE else name for name in names}


def _name(kind: type[Task]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _loaded_classes() -> dict[str, type[Task]]:
    """Return the loaded task classes by name (the newest of each name).

    Others are not imported: reading a file must not run code.
    """
    loaded: dict[str, type[Task]] = {}
    queue = deque([Task])
    while queue:
        kind = queue.popleft()
        # One without fields of its own may be the skeleton of a class that came by value
        if _name(kind) not in loaded or "__dataclass_fields__" in vars(kind):
            loaded[_name(kind)] = kind
        queue += kind.__subclasses__()
    return loaded


def _plain_number(value: Any) -> Any:
    """Convert a numpy or torch scalar, which pydantic does not know."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not plain data")


def _unwritable(task: Task) -> str:
    """Describe the field that cannot be written."""
    for item in dataclasses.fields(task):
        value = getattr(task, item.name)
        try:
            plain = TypeAdapter(Any).dump_python(value, mode="json", fallback=_plain_number)
            json.dumps(plain)
        except (ValueError, TypeError, AttributeError, RecursionError):
            kind = type(value).__name__
            return f"field {item.name!r} holds {value!r} of {kind}, which is not plain data"
    return f"{type(task).__name__} does not match its type hints"


def _explain(kind: type[Task], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "unexpected_keyword_argument" and len(path) == 1:
        near = did_you_mean(path[0], [item.name for item in dataclasses.fields(kind)])
        return f"{kind.__name__} has no field {path[0]!r}.{near}"
    where = f"field {'.'.join(path)!r}: " if path else ""
    expected = first["msg"].replace("Input should be", "expected")
    if first["type"] == "needs_python_object":
        expected = "expected a type that cannot be read from a file"
    return f"{where}{expected}, got {first['input']!r}"


def _differences(a: Any, b: Any) -> Iterator[tuple[list[str], Any, Any]]:
    """Yield path and both values wherever `a` and `b` differ; numpy scalars count as numbers."""
    if hasattr(a, "dtype") and hasattr(a, "item"):
        a = a.item()
    if type(a) is not type(b):
        yield [], a, b
    elif dataclasses.is_dataclass(a):
        for item in dataclasses.fields(a):
            for path, *values in _differences(getattr(a, item.name), getattr(b, item.name)):
                yield [item.name, *path], *values
    elif isinstance(a, Mapping):
        if [*a] != [*b] or [*map(type, a)] != [*map(type, b)]:
            yield [], a, b
        for key in a.keys() & b.keys():
            for path, *values in _differences(a[key], b[key]):
                yield [str(key), *path], *values
    elif isinstance(a, Sequence) and not isinstance(a, str | bytes):
        if len(a) != len(b):
            yield [], a, b
        for k, pair in enumerate(zip(a, b, strict=False)):
            for path, *values in _differences(*pair):
                yield [str(k), *path], *values
    elif isinstance(a, AbstractSet):
        if a != b or {*map(type, a)} != {*map(type, b)}:
            yield [], a, b
    elif a != b and not (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
        yield [], a, b
