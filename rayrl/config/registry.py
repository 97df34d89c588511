"""What a setting names: a function of the package by its name, or one from anywhere else.

`module:attribute` is imported; `path/to/file.py:attribute` is run once per process, as a module
whose name depends on the path only. A file that was sent to a cluster is found by the path it had
on the machine that sent it (`rayrl/cluster/code_bundle.py`). `object:NAME` is an object that a
Python program has passed (`bind`); only that process knows it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from rayrl.errors import ConfigError, did_you_mean
from rayrl.types import derive_seed

__all__ = [
    "CODE_FILE",
    "OBJECT",
    "PLAYER_GROUP",
    "Registry",
    "absolute",
    "attribute_of",
    "before_colon",
    "bind",
    "bound",
    "from_outside",
    "function_name",
    "is_object",
    "load_function",
    "load_module",
    "local_copy",
    "player_scheme",
    "split_reference",
]

CODE_FILE = "rayrl-code.json"  # beside rayrl/ in a copy that was sent to a cluster: `code_bundle`

OBJECT = "object"
NOT_PLACES = ("player", "model")  # what else stands before a colon, in `env.seats`
PLAYER_GROUP = "rayrl.player_schemes"
"""Entry points of other libraries' players, `SCHEME:ID`: functions `(id, environment) -> player`.
"""
_bound: dict[tuple[str, str], Any] = {}  # by setting and name: what was bound last in this program
# the same of one call of the API, of which several may run at once
_own: ContextVar[Mapping[tuple[str, str], Any]] = ContextVar("rayrl_bound", default={})  # noqa: B039

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """Functions of the package by name; `resolve` also takes those from outside.

    Args:
        key: the setting that names one, for errors.
        functions: those there are from the start, by name.
    """

    def __init__(self, key: str, functions: Mapping[str, F] | None = None) -> None:
        self.key = key
        self._functions: dict[str, F] = dict(functions or {})

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator: add a function under `name`."""

        def add(function: F) -> F:
            self._functions[name] = function
            return function

        return add

    def __iter__(self) -> Iterator[str]:
        """Names in the order of registration."""
        return iter(self._functions)

    def resolve(self, value: str | F) -> F:
        """The function that `value` is or names.

        Args:
            value: a registered name, `module:function`, `path/to/file.py:function`, or a function.

        Raises:
            ConfigError: there is none; names key, value and the nearest registered name.
        """
        if not isinstance(value, str):
            if not callable(value):
                raise ConfigError(f"{self.key}={value!r} is neither a name nor a function")
            return value
        if value in self._functions:
            return self._functions[value]
        if ":" in value:
            function: F = load_function(self.key, value)
            return function
        raise self.unknown(value)

    def unknown(self, value: str) -> ConfigError:
        """The error for a name that is not registered, with the nearest that is."""
        return ConfigError(
            f"{self.key}={value!r} is not one of {', '.join(self) or 'none'}, and names no "
            f"function as module:function or path/to/file.py:function.{did_you_mean(value, self)}"
        )


def from_outside(who: str) -> bool:
    """Whether who plays a seat is a function from outside the environment.

    It may also be `player:NAME`, of the environment, `model:PATH` or another library's.
    """
    place, colon, _ = who.partition(":")
    return bool(colon) and place not in NOT_PLACES and player_scheme(who) is None


def before_colon() -> list[str]:
    """What may stand before the colon of a player, apart from a module or file."""
    return [*NOT_PLACES, *sorted({point.name for point in entry_points(group=PLAYER_GROUP)})]


def player_scheme(who: str) -> EntryPoint | None:
    """The installed scheme of players that `who` begins with, if any: that of `rllib:CHECKPOINT`.

    The library behind it may not be installed.
    """
    scheme, colon, _ = who.partition(":")
    points = entry_points(group=PLAYER_GROUP, name=scheme) if colon else ()
    return next(iter(points), None)


def is_object(value: str) -> bool:
    """Whether a setting's value names an object of this program."""
    return value.startswith(f"{OBJECT}:")


def bind(key: str, value: object, name: str = "") -> str:
    """Let setting `key` name an object of this program; returns the reference, `object:NAME`.

    An object that is bound to the same name later, as by a notebook cell that is run again,
    replaces it; not for calls that run in other tasks or threads meanwhile.
    """
    called: Any = value
    while isinstance(called, functools.partial):
        called = called.func
    name = re.sub(r"\W+", "_", name or getattr(called, "__name__", type(called).__name__))
    _bound[key, name] = value
    _own.set({**_own.get(), (key, name): value})
    return f"{OBJECT}:{name}"


def bound(key: str, reference: str) -> Any:
    """The object that was bound as `object:NAME`.

    Raises:
        ConfigError: this program has bound none of that name.
    """
    _, name = split_reference(reference)
    if (key, name) not in _bound:
        raise ConfigError(
            f"{key}={reference!r} is an object that a Python program has passed; only a program "
            "that passes it again, as rayrl.train does, can use it."
        )
    return _own.get().get((key, name), _bound[key, name])


def load_function(key: str, reference: str) -> Any:
    """The function `module:function` or `path/to/file.py:function`, the value of setting `key`.

    Raises:
        ConfigError: there is no such module, file or function, or it cannot be imported.
    """
    place, attribute = split_reference(reference)
    if place == OBJECT:
        return bound(key, reference)
    module = load_module(key, reference)
    known = [name for name, value in vars(module).items() if callable(value)]
    found = attribute_of(module, attribute) if attribute else None
    if found is None:
        near = did_you_mean(attribute, known)
        raise ConfigError(f"{key}={reference!r}: {place} has no function {attribute!r}.{near}")
    if not callable(found):
        raise ConfigError(f"{key}={reference!r} is {found!r}, not a function")
    return found


def function_name(function: Callable[..., Any]) -> str:
    """What errors call a function: its module and name, of a partial one those of what it calls."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}.{name}" if name else repr(function)


def split_reference(reference: str) -> tuple[str, str]:
    """Module or file, and attribute, of `place:attribute`; the attribute is "" without a colon."""
    place, _, attribute = reference.rpartition(":") if ":" in reference else (reference, "", "")
    return place, attribute


def attribute_of(module: ModuleType, attribute: str) -> Any:
    """What a dotted attribute of a module is; None where there is none."""
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    return found


def load_module(key: str, reference: str) -> ModuleType:
    """The module of `module[:attribute]` or `path/to/file.py[:attribute]`, the value of `key`.

    Raises:
        ConfigError: it is not there, or its code raises.
    """
    place, _ = split_reference(reference)
    if place.endswith(".py"):
        return _from_file(key, place)
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise ConfigError(
            f"{key}={reference!r}: module {place!r} could not be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


@functools.cache
def _sent() -> Mapping[str, Mapping[str, str]]:
    """Of code that was sent here: what the sender called its files, and where their copies are."""
    file = Path(__file__).resolve().parents[2] / CODE_FILE
    return json.loads(file.read_text("utf-8")) if file.is_file() else {"written": {}, "files": {}}


def absolute(place: str) -> Path:
    """Where a file is, or was on the machine that sent it: the same for every process of a run."""
    return Path(_sent()["written"].get(place) or Path(place).expanduser().resolve())


def local_copy(place: str) -> Path:
    """What this machine reads of a file, which may have been sent here with the code."""
    return _copy(absolute(place))


def _copy(path: Path) -> Path:
    """What is there to be read of the file."""
    copy = _sent()["files"].get(str(path))
    return Path(__file__).resolve().parents[2] / copy if copy else path


def _from_file(key: str, place: str) -> ModuleType:
    path = absolute(place)
    source = _copy(path)
    if not source.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.py")])
        raise ConfigError(f"{key}={place!r}: there is no file {path}.{near}")
    # a stable name, so that the file's task classes unpickle in any process that loaded it
    name = f"rayrl_file_{path.stem}_{derive_seed(path):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{key}={place!r}: {path} could not be run: {type(error).__name__}: {error}"
        ) from error
    return module
