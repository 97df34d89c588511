"""Each kind of protection that there is, where the machine offers it."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from rayrl import EnvError, Protection
from rayrl.rollout.sandbox import protection
from rayrl.rollout.sandbox.protection import Isolation

Kind = Literal["namespaces", "bubblewrap", "limits"]
TRIED: dict[Kind, Protection] = {}


@pytest.fixture
def hold_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kind], Isolation]:
    """Choose what holds code; returns the `isolation` that means it."""

    def choose(kind: Kind) -> Isolation:
        if kind != "namespaces" and os.geteuid() == 0:
            monkeypatch.setattr(sys, "executable", python_for_others())
            monkeypatch.setattr(sys, "prefix", "/usr")
            monkeypatch.setattr(sys, "base_prefix", "/usr")
            monkeypatch.setattr(tempfile, "tempdir", "/tmp")
        if kind == "bubblewrap" and not shutil.which("bwrap"):
            pytest.skip("bubblewrap is not installed here")
        try:
            held = TRIED[kind] = TRIED.get(kind) or protection._try(kind)
        except EnvError as error:
            pytest.skip(f"this machine offers no {kind}: {error}")
        monkeypatch.setattr(protection, "_limits" if kind == "limits" else "_full", lambda: held)
        return "limits" if kind == "limits" else "full"

    return choose


def python_for_others() -> str:
    """A Python that every user may run: when root runs the tests, code is some other user's."""
    for name in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        path = Path(os.path.realpath(name))
        if path.is_file() and all(
            one.stat().st_mode & stat.S_IXOTH for one in (path, *path.parents)
        ):
            return name
    pytest.skip("root runs the tests, and no other user may run a Python here")
