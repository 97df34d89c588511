"""`rayrl env list` and `rayrl env new`: what is installed, and packages that pass their tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points
from pathlib import Path

import pytest

from rayrl import cli
from rayrl.commands import env_packages
from rayrl.environment.registry import extra_of, installed_envs, installed_schemes, load_env
from tests.documents import ROOT


def test_what_is_installed_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "list"]) == 0
    text = capsys.readouterr().out
    names = re.findall(r"^  (\S+)", text, re.MULTILINE)
    assert names == [*installed_envs(), *(f"{scheme}:" for scheme in installed_schemes())]
    assert "Tic-tac-toe against an opponent" in text, "from the package"
    assert "Procedural datasets of reasoning-gym" in text, "from the scheme"
    assert "Needs" not in text


def test_a_scheme_whose_library_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        if name == "reasoning-gym":
            raise PackageNotFoundError(name)

    monkeypatch.setattr(env_packages, "metadata", missing)
    text = " ".join(env_packages.list_environments().split())
    assert text.count("Needs") == 1
    assert "one reply. Needs pip install 'rayrl[reasoning-gym]'." in text


@pytest.mark.parametrize(
    ("value", "extra"),
    [("a.b:load", ""), ("a.b:load [x]", "rayrl[x]"), ("a.b:load [x-y.z_1]", "rayrl[x-y.z_1]")],
)
def test_the_extra_of_a_scheme(value: str, extra: str) -> None:
    assert extra_of(EntryPoint("s", value, "rayrl.env_schemes")) == extra


def test_every_extra_of_a_scheme_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {extra_of(point) for point in entry_points(group="rayrl.env_schemes")} - {""}
    assert named <= {f"rayrl[{extra}]" for extra in project["optional-dependencies"]}
    assert named


@pytest.mark.parametrize("name", ["word-chain", "a1_b-c"])
def test_a_new_package_passes_its_tests(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["env", "new", name]) == 0
    module = name.replace("-", "_")
    project = tomllib.loads((tmp_path / name / "pyproject.toml").read_text())["project"]
    assert project["name"] == name
    assert project["entry-points"]["rayrl.envs"] == {name: f"{module}:{module}"}
    package = tmp_path / name
    monkeypatch.syspath_prepend(str(package))
    assert load_env(project["entry-points"]["rayrl.envs"][name]).seats == ("agent",)
    checks = [
        [sys.executable, "-m", "ruff", "check", "."],
        [sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-W", "error"],
    ]
    for words in checks:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=package, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert name in (package / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["new"], "write rayrl env new NAME"),
        (["new", "Word"], "a name of small letters"),
        (["new", "../up"], "a name of small letters"),
        (["new", "json"], "`import json` finds another module already"),
        (["new", "class"], "class is a word of Python"),
        (["new", "tictactoe"], "rayrl_tictactoe:tictactoe is installed under that name"),
        (["new", "mine", "full"], "full exists already"),
        (["new", "mine", "full", "more"], "more: not understood"),
        (["new", "mine", "a=1"], "env new has no settings: a=1"),
        (["list", "tictactoe"], "rayrl env check tictactoe says more about it"),
        (["lst"], "Did you mean 'list'"),
        (["check", "a", "b"], "write rayrl env check [NAME]"),
    ],
)
def test_what_is_refused(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert cli.main(["env", *words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]
