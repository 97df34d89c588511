"""Functions of the user's, sent with their code to processes that cannot import it."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle

from rayrl.config.registry import function_name, load_function
from rayrl.errors import ConfigError, describe_error

__all__ = ["dumps", "loads"]

_PATHS = sysconfig.get_paths()
_LIBRARIES = [Path(_PATHS[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def dumps(key: str, function: str | Callable[..., Any]) -> str | bytes:
    """What to send of a function: a name of the package as it is, anything else by value.

    By value are functions, classes and globals of the package, file, script or notebook cell that
    defines it, as far as it uses them. Installed libraries and rayrl go by name: every node has
    them. So do *other* modules of the user's: on one machine Ray's processes find those that the
    driver finds.

    Args:
        key: the setting that `function` is a value of.
        function: a function, a reference to one (`module:function`, `path/to/file.py:function`), or
            a name of the package.

    Raises:
        ConfigError: the reference names nothing, or the function uses what cannot be sent.
    """
    if isinstance(function, str):
        if ":" not in function:
            return function
        function = load_function(key, function)
    called: Any = function
    while isinstance(called, functools.partial):
        called = called.func
    module = sys.modules.get(getattr(called, "__module__", ""))
    if module is None or not _is_users(module.__name__, getattr(module, "__file__", None)):
        return _pickled(key, function)
    package = sys.modules.get(module.__name__.partition(".")[0], module)
    cloudpickle.register_pickle_by_value(package)
    try:
        return _pickled(key, function)
    finally:
        cloudpickle.unregister_pickle_by_value(package)


def _pickled(key: str, function: Any) -> bytes:
    try:
        return bytes(cloudpickle.dumps(function))
    except Exception as error:
        raise ConfigError(
            f"{key}: {function_name(function)} cannot be sent to other processes: "
            f"{describe_error(error)}. Create what cannot be sent (a lock, a file, a connection) "
            "inside the function, or move it to a file and name it: path/to/file.py:function."
        ) from error


def loads(sent: str | bytes) -> Any:
    """The name or the function that `dumps` was given."""
    return sent if isinstance(sent, str) else cloudpickle.loads(sent)


def _is_users(name: str, file: str | None) -> bool:
    """Whether a module must be registered; without a file, or as `__main__`, it need not."""
    if file is None or name.partition(".")[0] in ("__main__", "rayrl"):
        return False
    return not any(Path(file).is_relative_to(folder) for folder in _LIBRARIES)
