"""Finding environments: installed ones by name, others by file or module."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from rayrl.environment.environment import Environment
from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError
from rayrl.types import derive_seed

__all__ = ["CODE_FILE", "ENV_GROUP", "installed_envs", "load_env"]

ENV_GROUP = "rayrl.envs"
CODE_FILE = "rayrl-code.json"  # beside rayrl/ in a copy that was sent to a cluster: `code_bundle`


def installed_envs() -> list[str]:
    """Names of the environments installed as packages (entry-point group `rayrl.envs`)."""
    return sorted({point.name for point in entry_points(group=ENV_GROUP)})


def load_env(name: str) -> Environment:
    """The environment called `name`.

    Args:
        name: an installed environment, `path/to/file.py[:attribute]` or `module:attribute`. Without
            an attribute the file must define exactly one environment.

    Raises:
        ConfigError: there is none of that name; the message names the nearest or what is wrong.
    """
    if not name:
        raise ConfigError("env.name is empty: name an environment, a file or module:attribute")
    place, _, attribute = name.rpartition(":") if ":" in name else (name, "", "")
    if place.endswith(".py"):
        return _named(_pick(_from_file(place), place, attribute), f"{_absolute(place)}:{attribute}")
    if attribute:
        return _named(_pick(_import(place, name), place, attribute), name)
    for point in entry_points(group=ENV_GROUP):
        if point.name == name:
            try:
                found = point.load()
            except Exception as error:
                raise ConfigError(
                    f"environment {name!r} is installed but {point.value!r} could not be loaded: "
                    f"{type(error).__name__}: {error}"
                ) from error
            return _named(_checked(found, point.value), name)
    raise ConfigError(
        f"env.name={name!r}: no such environment is installed."
        + suggestion(name, installed_envs())
        + " A file is given as path/to/file.py, an importable one as module:attribute."
    )


def _named(env: Environment, ref: str) -> Environment:
    env.ref = ref
    return env


@functools.cache
def _sent() -> Mapping[str, Mapping[str, str]]:
    """Of code that was sent here: what the sender called its files, and where their copies are."""
    file = Path(__file__).resolve().parents[2] / CODE_FILE
    return json.loads(file.read_text("utf-8")) if file.is_file() else {"written": {}, "files": {}}


def _absolute(place: str) -> Path:
    """Where a file is, or was on the machine that sent it: the same for every process of a run."""
    return Path(_sent()["written"].get(place) or Path(place).expanduser().resolve())


def _copy(path: Path) -> Path:
    """What is there to be read of the file."""
    copy = _sent()["files"].get(str(path))
    return Path(__file__).resolve().parents[2] / copy if copy else path


def _from_file(place: str) -> ModuleType:
    path = _absolute(place)
    source = _copy(path)
    if not source.is_file():
        near = suggestion(path.name, [p.name for p in path.parent.glob("*.py")])
        raise ConfigError(f"env.name={place!r}: there is no file {path}.{near}")
    # a stable name, so that the file's task classes unpickle in any process that loaded it
    name = f"rayrl_env_{path.stem}_{derive_seed(path):x}"
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
            f"env.name={place!r}: {path} could not be run: {type(error).__name__}: {error}"
        ) from error
    return module


def _import(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise ConfigError(
            f"env.name={name!r}: module {place!r} could not be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _pick(module: ModuleType, place: str, attribute: str) -> Environment:
    known = {key: value for key, value in vars(module).items() if isinstance(value, Environment)}
    if not attribute:
        distinct = {id(value): value for value in known.values()}
        if len(distinct) == 1:
            return next(iter(distinct.values()))
        raise ConfigError(
            f"{place} defines {len(distinct)} environments ({', '.join(sorted(known)) or 'none'}): "
            f"name one, e.g. {place}:{next(iter(known), 'attribute')}"
        )
    found: object = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise ConfigError(f"{place} has no {attribute!r}.{suggestion(attribute, list(known))}")
    return _checked(found, f"{place}:{attribute}")


def _checked(found: object, where: str) -> Environment:
    if not isinstance(found, Environment):
        raise ConfigError(
            f"{where} is {found!r}, not an environment: decorate its coroutine with @rayrl.env"
        )
    return found
