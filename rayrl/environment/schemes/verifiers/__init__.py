"""Environments written for verifiers, `env.name=verifiers:ID`.

Those of its v0 interface are played in this process (`v0`), tasksets of its v1 interface by a
process of the interpreter that has it (`taskset`, `process`, `worker`). That may be another virtual
environment: no release with v1 can be installed beside vLLM.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import TYPE_CHECKING

from rayrl.errors import ConfigError

if TYPE_CHECKING:
    from rayrl.environment.environment import Environment

__all__ = ["load"]

_NO_VERSION = (0, 0)
_V1, _V1_ONLY = (0, 3), (0, 4)  # first versions


def load(name: str) -> Environment:
    """The environment of a module with `load_environment`, or of a taskset.

    Args:
        name: `NAME` of an installed package, `OWNER/NAME[@VERSION]` as on a hub, a Python file, or
            a folder with a file of its name. `PYTHON:NAME` is a taskset in the virtual environment
            PYTHON, or of that interpreter; `ENV+NAME` is a taskset that another environment plays.

    Raises:
        ConfigError: there is none, or it cannot be loaded with its default arguments.
    """
    from rayrl.environment.schemes.verifiers.ids import is_builtin, is_taskset
    from rayrl.environment.schemes.verifiers.taskset import TasksetEnvironment

    python, _, taskset = name.rpartition(":")
    if python:
        return TasksetEnvironment(name, python, taskset)
    where, version = f"env.name=verifiers:{name}", _version()
    if version >= _V1:
        if version >= _V1_ONLY or "+" in name or is_taskset(name) or is_builtin(name):
            return TasksetEnvironment(name, sys.executable, name)
    elif "+" in name or is_taskset(name):
        here = "verifiers is not installed here"
        if version != _NO_VERSION:
            here = f"verifiers {importlib.metadata.version('verifiers')} has no tasksets"
        raise ConfigError(
            f"{where} is a taskset of verifiers' v1 interface, and {here}. Install "
            "verifiers>=0.3.1 in a virtual environment of its own (python -m venv VENV; "
            f"VENV/bin/pip install 'verifiers>=0.4' uv) and name that: verifiers:VENV:{name}"
        )
    try:
        from rayrl.environment.schemes.verifiers import v0
    except ImportError as error:
        raise ConfigError(
            f"{where}: the library behind verifiers could not be imported ({error}): pip install "
            "'rayrl[verifiers]'. A taskset of its v1 interface is played in another virtual "
            f"environment: verifiers:VENV:{name}"
        ) from error
    return v0.VerifiersEnvironment(name)


def _version() -> tuple[int, ...]:
    """Major and minor version of the verifiers that is installed here."""
    try:
        version = importlib.metadata.version("verifiers")
    except importlib.metadata.PackageNotFoundError:
        return _NO_VERSION
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
