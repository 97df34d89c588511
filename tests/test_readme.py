"""What the README shows works: its commands are understood and its code runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rayrl import cli
from rayrl.commands.env_check import run as check_env
from tests.documents import ROOT, blocks, commands, settings, understand

BLOCKS = blocks("README.md")
COMMANDS = commands(BLOCKS)
SETTINGS = settings(COMMANDS)


def test_blocks_say_what_they_are() -> None:
    kinds = {kind for kind, _ in BLOCKS}
    assert kinds <= {"bash", "python", "text"}
    assert {"bash", "python"} <= kinds


def test_every_command_is_one_that_is_checked_here() -> None:
    others = [line for line in COMMANDS if line not in [known for _, known in SETTINGS]]
    assert others == ["scripts/run", "scripts/test"]


@pytest.mark.parametrize("words", [words for words, _ in SETTINGS], ids=" ".join)
def test_command_is_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    understand(words)


def test_example_is_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = [text for kind, text in BLOCKS if kind == "python"]
    Path("addition.py").write_text(examples[0])
    check_env(cli.compose(["env.name=addition.py"]))
    assert "ready to train on" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["scripts/run", "scripts/test", "scripts/setup", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=600)


def test_the_two_commands_do_what_the_readme_says() -> None:
    assert "rayrl recipe experiment=tictactoe" in (ROOT / "scripts/run").read_text()
    test = (ROOT / "scripts/test").read_text()
    for step in ('ruff" check', 'ruff" format --check', 'mypy" --strict', 'pytest"'):
        assert step in test
    assert "scripts/test" in (ROOT / ".ci/run").read_text()


def test_setup_does_nothing_when_it_is_up_to_date(tmp_path: Path) -> None:
    """The stamp is what scripts/setup itself would write; no Python is looked for."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (venv / "bin" / "python").chmod(0o755)
    script = (ROOT / "scripts/setup").read_text()
    functions = script[script.index("state() {") : script.index("# An environment with")]
    stamp = f'cd {ROOT}\n{functions}\nprintf "%s\\n%s\\n" "$(digest dev)" dev'
    text = subprocess.run(["bash", "-c", stamp], capture_output=True, text=True, check=True).stdout
    (venv / ".rayrl-stamp").write_text(text)
    env = {**os.environ, "RAYRL_VENV": str(venv), "PYTHON": "/nowhere/python"}
    for extras in (["dev"], []):
        done = subprocess.run(
            [ROOT / "scripts/setup", *extras], env=env, capture_output=True, text=True, timeout=600
        )
        assert (done.returncode, done.stdout) == (0, f"{venv}\n")
    done = subprocess.run(
        [ROOT / "scripts/setup", "wandb"], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "PYTHON=/nowhere/python is not a Python of at least 3.11" in done.stderr
