"""Load environments: installed ones by name, others by file or module."""

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
CODE_FILE = "rayrl-code.json"  # next to rayrl/ in a copy uploaded to a cluster, see `code_bundle`


def installed_envs() -> list[str]:
    """Return the names of environments installed as packages (entry-point group `rayrl.envs`)."""
    return sorted({point.name for point in entry_points(group=ENV_GROUP)})


def load_env(name: str) -> Environment:
    """Load an environment.

    Args:
        name: an installed environment, `path/to/file.py[:attribute]` or `module:attribute`. Without
            an attribute the file must define exactly one environment.

    Raises:
        ConfigError: it does not exist (names the nearest known name) or cannot be loaded.
    """
    if not name:
        raise ConfigError("env.name is empty: name an environment, a file or module:attribute")
    source, _, attribute = name.rpartition(":") if ":" in name else (name, "", "")
    if source.endswith(".py"):
        env = _select(_import_file(source), source, attribute)
        env.ref = f"{_original_path(source)}:{attribute}"
        return env
    if attribute:
        try:
            module = importlib.import_module(source)
        except Exception as error:
            raise ConfigError(
                f"env.name={name!r}: module {source!r} could not be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
        env = _select(module, source, attribute)
        env.ref = name
        return env
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
    raise ConfigError(
        f"env.name={name!r}: no such environment is installed."
        + suggestion(name, installed_envs())
        + " Give a file as path/to/file.py, an importable environment as module:attribute."
    )


@functools.cache
def _uploaded() -> Mapping[str, Mapping[str, str]]:
    """Map the original names of uploaded code files to paths, and those to their copies."""
    file = Path(__file__).resolve().parents[2] / CODE_FILE
    return json.loads(file.read_text("utf-8")) if file.is_file() else {"written": {}, "files": {}}


def _original_path(file: str) -> Path:
    """Return the path of a file on the machine that started the run; equal in all its processes."""
    return Path(_uploaded()["written"].get(file) or Path(file).expanduser().resolve())


def _import_file(file: str) -> ModuleType:
    path = _original_path(file)
    copy = _uploaded()["files"].get(str(path))
    readable = Path(__file__).resolve().parents[2] / copy if copy else path
    if not readable.is_file():
        near = suggestion(path.name, [p.name for p in path.parent.glob("*.py")])
        raise ConfigError(f"env.name={file!r}: there is no file {path}.{near}")
    # a stable name, so that the file's task classes unpickle in any process that loaded it
    name = f"rayrl_env_{path.stem}_{derive_seed(path):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, readable)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"env.name={file!r}: {path} could not be run: {type(error).__name__}: {error}"
        ) from error
    return module


def _select(module: ModuleType, source: str, attribute: str) -> Environment:
    known = {key: value for key, value in vars(module).items() if isinstance(value, Environment)}
    if not attribute:
        distinct = {id(value): value for value in known.values()}
        if len(distinct) == 1:
            return next(iter(distinct.values()))
        raise ConfigError(
            f"{source} defines {len(distinct)} environments "
            f"({', '.join(sorted(known)) or 'none'}): name one, e.g. "
            f"{source}:{next(iter(known), 'attribute')}"
        )
    value: object = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if value is None:
        raise ConfigError(f"{source} has no {attribute!r}.{suggestion(attribute, list(known))}")
    return _checked(value, f"{source}:{attribute}")


def _checked(value: object, where: str) -> Environment:
    if not isinstance(value, Environment):
        raise ConfigError(
            f"{where} is {value!r}, not an environment: decorate its coroutine with @rayrl.env"
        )
    return value
