"""Load environments: installed ones by name, others by file or module, or through a scheme.

A scheme gives another library's environment for its ID: `env.name=SCHEME:ID`. It is a function
`(id) -> Environment`, installed as an entry point of the group `rayrl.env_schemes`.
"""

from __future__ import annotations

import re
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from rayrl.config.registry import (
    OBJECT,
    absolute,
    attribute_of,
    bind,
    bound,
    load_module,
    split_reference,
)
from rayrl.environment.data_files import is_data_file
from rayrl.environment.environment import Environment, EnvSpec
from rayrl.environment.row_env import RowEnvironment
from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError, describe_error, did_you_mean

__all__ = [
    "ENV_GROUP",
    "SCHEME_GROUP",
    "environment_of",
    "extra_of",
    "installed_envs",
    "installed_schemes",
    "load_env",
    "load_scheme",
    "reference_of",
    "scheme_of",
]

ENV_GROUP = "rayrl.envs"
SCHEME_GROUP = "rayrl.env_schemes"


def installed_envs() -> list[str]:
    """Return the names of environments installed as packages (entry-point group `rayrl.envs`)."""
    return sorted({point.name for point in entry_points(group=ENV_GROUP)})


def installed_schemes() -> list[str]:
    """Return the names of the schemes that are installed (entry-point group `rayrl.env_schemes`).

    The library behind one may not be.
    """
    return sorted({point.name for point in entry_points(group=SCHEME_GROUP)})


def scheme_of(name: str) -> EntryPoint | None:
    """The installed scheme that an environment's name begins with, if any."""
    scheme, colon, _ = name.partition(":")
    points = entry_points(group=SCHEME_GROUP, name=scheme) if colon else ()
    return next(iter(points), None)


def extra_of(scheme: EntryPoint) -> str:
    """What to install for the library behind a scheme, as `rayrl[reasoning-gym]`; empty: nothing.

    That is the extra in brackets of its entry point; `EntryPoint.extras` splits it at hyphens.
    """
    found = re.search(r"\[(.+)\]", scheme.value)
    return f"{scheme.dist.name if scheme.dist else 'rayrl'}[{found[1]}]" if found else ""


def load_env(name: str) -> Environment:
    """Load an environment.

    Args:
        name: an installed environment, `path/to/file.py[:attribute]`, `module:attribute`,
            `SCHEME:ID`, or a data file whose rows are the tasks (`row_env.py`). Without an
            attribute a Python file must define exactly one environment.

    Raises:
        ConfigError: it does not exist (names the nearest known name) or cannot be loaded.
    """
    if not name:
        raise ConfigError("env.name is empty: name an environment, a file or module:attribute")
    if point := scheme_of(name):
        return _named(_by_scheme(point, name), name)
    if is_data_file(name):
        return RowEnvironment(name)
    place, attribute = split_reference(name)
    if place == OBJECT:
        return _checked(bound("env.name", name), name)
    if place.endswith(".py") or attribute:
        try:
            module = load_module("env.name", name)
        except ConfigError as error:
            scheme = did_you_mean(name.partition(":")[0], installed_schemes())
            raise ConfigError(f"{error}.{scheme}" if scheme else str(error)) from error.__cause__
        found = _pick(module, place, attribute)
        return _named(found, f"{absolute(place)}:{attribute}" if place.endswith(".py") else name)
    for point in entry_points(group=ENV_GROUP):
        if point.name == name:
            try:
                value = point.load()
            except Exception as error:
                raise ConfigError(
                    f"environment {name!r} is installed but {point.value!r} could not be loaded: "
                    f"{type(error).__name__}: {error}"
                ) from error
            env = _checked(value, point.value)
            env.ref = name
            return env
    if Path(name).is_dir():
        return RowEnvironment(f"{name}/")
    raise ConfigError(
        f"env.name={name!r}: no such environment is installed."
        + suggestion(name, installed_envs())
        + " Give a file as path/to/file.py, an importable environment as module:attribute, rows of "
        "data as path/to/rows.jsonl or hf:OWNER/NAME, another library's as SCHEME:ID with one of "
        f"the schemes {', '.join(installed_schemes())}."
    )


def environment_of(spec: EnvSpec) -> Environment:
    """The environment that `spec` describes, with its settings.

    Raises:
        ConfigError: see `load_env`.
    """
    env = spec.value or load_env(spec.ref)
    return env.configure(spec.args, spec.rewards).labelled(spec.label)


def reference_of(env: Environment, name: str = "") -> str:
    """What `load_env` finds this environment by, here and in other processes.

    One that no other process could import, as of a script or a notebook cell, is bound as
    `object:NAME` and travels by value.

    Args:
        name: to bind it as; empty: its own.

    Raises:
        ConfigError: it cannot travel.
    """
    if env.ref and _is_found(env):
        return env.ref
    env.ref = ""
    try:
        cloudpickle.dumps(env)
    except Exception as error:
        raise ConfigError(
            f"environment {env.name!r} cannot be sent to other processes: {describe_error(error)}. "
            "Create what cannot be sent (a lock, a file, a connection) inside the coroutine, or "
            "move the environment to a file and name it: path/to/file.py:attribute."
        ) from error
    return bind("env.name", env, name or env.name)


def _is_found(env: Environment) -> bool:
    """Whether another process finds this very environment by its reference."""
    place, attribute = split_reference(env.ref)
    home = env.play.__module__.partition(".")[0]
    if any(one.__module__.partition(".")[0] != home for one in env.players.values()):
        return False  # a player was added elsewhere
    if not attribute or place.endswith(".py") or scheme_of(env.ref):  # installed, or a file
        return True
    if PathFinder.find_spec(place.partition(".")[0]) is None:
        return False
    found = attribute_of(load_module("env.name", env.ref), attribute)
    if not isinstance(found, Environment):
        return False
    _, rewards = env.configured
    same = (found.play, found.source, found.eval_source) == (env.play, env.source, env.eval_source)
    return same and {**found.rewards, **rewards} == {**env.rewards, **rewards}


def load_scheme(scheme: EntryPoint, setting: str) -> Any:
    """The function of a scheme.

    Args:
        setting: that asks for it, `KEY=VALUE`, for errors.

    Raises:
        ConfigError: the library behind it is not installed.
    """
    try:
        return scheme.load()
    except ImportError as error:
        extra = extra_of(scheme)
        needs = f": pip install '{extra}'" if extra else ""
        raise ConfigError(
            f"{setting}: the library behind {scheme.name} could not be imported ({error}){needs}"
        ) from error


def _by_scheme(scheme: EntryPoint, name: str) -> Environment:
    load = load_scheme(scheme, f"env.name={name!r}")
    try:
        found = load(name.partition(":")[2])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"env.name={name!r}: the scheme {scheme.name} raised {describe_error(error)}"
        ) from error
    return _checked(found, name)


def _named(env: Environment, ref: str) -> Environment:
    env.ref = ref
    return env


def _pick(module: ModuleType, place: str, attribute: str) -> Environment:
    known = {key: value for key, value in vars(module).items() if isinstance(value, Environment)}
    if not attribute:
        distinct = {id(value): value for value in known.values()}
        if len(distinct) == 1:
            return next(iter(distinct.values()))
        raise ConfigError(
            f"{place} defines {len(distinct)} environments "
            f"({', '.join(sorted(known)) or 'none'}): name one, e.g. "
            f"{place}:{next(iter(known), 'attribute')}"
        )
    found = attribute_of(module, attribute)
    if found is None:
        raise ConfigError(f"{place} has no {attribute!r}.{suggestion(attribute, list(known))}")
    return _checked(found, f"{place}:{attribute}")


def _checked(value: object, where: str) -> Environment:
    if not isinstance(value, Environment):
        raise ConfigError(
            f"{where} is {value!r}, not an environment: decorate its coroutine with @rayrl.env"
        )
    return value
