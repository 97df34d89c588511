"""A function of the user's reaches a process that does not have its code."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rayrl.cluster import by_value
from rayrl.errors import ConfigError
from rayrl.learner.loss import cispo
from tests.runs import ROOT

OWN = """
FACTOR = 3

def times(value, by=FACTOR):
    return helper(value) * by

def helper(value):
    return Number(value).value

class Number:
    def __init__(self, value):
        self.value = value

    def __call__(self, value):
        return self.value * value
"""
LOAD = "import sys; from rayrl.cluster import by_value; "
LOAD += "print(by_value.loads(sys.stdin.buffer.read())(7))"
SCRIPT = """
import sys
from rayrl.cluster import by_value

bound = 6
def of_a_cell(value):
    return value * bound

sys.stdout.buffer.write(by_value.dumps("algo.loss", of_a_cell))
"""


def run(code: str, sent: bytes, folder: Path) -> bytes:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    return subprocess.run(
        words, input=sent, cwd=folder, env=env, stdout=subprocess.PIPE, check=True
    ).stdout


def test_what_is_the_users_travels_with_what_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    for name in ("zz_own.py", "file.py"):
        (tmp_path / "here" / name).write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    import zz_own  # type: ignore[import-not-found]

    sent = [
        by_value.dumps("algo.loss", "zz_own:times"),
        by_value.dumps("algo.loss", f"{tmp_path}/here/file.py:times"),
        by_value.dumps("algo.loss", functools.partial(zz_own.times, by=2)),
        by_value.dumps("algo.loss", zz_own.Number(5)),
        run(SCRIPT, b"", tmp_path),
    ]
    del sys.modules["zz_own"]
    found = [int(run(LOAD, one, tmp_path)) for one in sent if isinstance(one, bytes)]
    assert found == [21, 21, 14, 35, 42]


def test_what_the_package_has_goes_by_name() -> None:
    assert by_value.loads(by_value.dumps("algo.loss", "cispo")) == "cispo"
    assert by_value.loads(by_value.dumps("algo.loss", cispo)) is cispo
    with pytest.raises(ConfigError, match=r"algo\.loss='os:nothing': os has no function"):
        by_value.dumps("algo.loss", "os:nothing")


def test_what_cannot_be_sent_says_so() -> None:
    lock = threading.Lock()

    def held(value: int) -> int:
        with lock:
            return value

    with pytest.raises(ConfigError, match=r"algo\.loss: .*held cannot be sent .*lock.*file\.py:fu"):
        by_value.dumps("algo.loss", held)
