"""The Python API on Ray, and the examples as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
IN_PROCESS = Path(__file__).with_name("in_process.py")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ("own_environment", r"reward 0\.\d\d to 0\.\d\d\n.*\| perfect \| 1\.000"),
        ("endpoint", r"10 of 100, held out.*'What is \d \+ \d\? .*'calculator|server calls"),
        ("own_loop", r"reward: "),
    ],
)
def test_an_example_runs(example: str, says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{example}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout, re.DOTALL), done.stdout
    if example == "own_loop":  # and it learns
        first, *_, last = map(float, done.stdout.rpartition("reward: ")[2].split())
        assert last > first + 0.3


@pytest.mark.parametrize(
    "program", re.findall(r"^async def (test_\w+)", IN_PROCESS.read_text(), re.MULTILINE)
)
def test_a_program_that_opens_ray_itself(program: str, tmp_path: Path) -> None:
    """In a process of its own: one that loses its Ray is ended, and what it says is read here."""
    options = ["-q", "-s", "-p", "no:xdist", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/own"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"{IN_PROCESS}::{program}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
