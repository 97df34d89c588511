"""What is sent to a cluster: all that a run needs, little else, and it wins over what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrl.cluster import code_bundle
from rayrl.cluster.code_bundle import (
    env_names,
    forwarded_variables,
    function_references,
    played_code,
    write_bundle,
)
from rayrl.config import from_dict
from rayrl.errors import ConfigError
from tests.documents import ROOT

GAME = """\
import dataclasses
import rayrl

@dataclasses.dataclass(frozen=True, kw_only=True)
class Move(rayrl.Task):
    where: int = 3

@rayrl.env(tasks=[Move(seed=1)], rewards={"won": 1.0})
async def game(task, agent):
    return {"won": 1.0}
"""


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    folder = tmp_path / "sent"
    folder.mkdir()
    return folder


@pytest.fixture
def absent(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH, after which nothing that is installed can be imported."""
    for name in ("rayrl", "rayrl_copyword"):
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text("raise ImportError('not sent')")
    return tmp_path / "absent"


def there(sent: Path, absent: Path, code: str, *words: str) -> Any:
    """What `code` prints, as JSON, in a process that has been sent the folder."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=absent.parent,
        env={**os.environ, "PYTHONPATH": f"{sent}{os.pathsep}{absent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_node_without_the_clone_has_all_of_it(sent: Path, absent: Path) -> None:
    write_bundle(sent)
    code = """
import json, sys, rayrl, importlib.metadata
from rayrl.cli import compose
from rayrl.weights.model_dir import model_dir
from rayrl.environment.registry import load_env, installed_envs, installed_schemes
assert "reasoning_gym" in installed_schemes()
names = installed_envs()
modules = {type(load_env(name).tasks(0, 1)[0]).__module__ for name in names}
files = {sys.modules[module].__file__ for module in modules}
print(json.dumps([names, [rayrl.__file__, str(model_dir("embedded")), *files],
    compose(["experiment=tictactoe"]).run.name, importlib.metadata.version("rayrl")]))
"""
    names, files, run, version = there(sent, absent, code)
    assert set(names) >= {"copyword", "double_check", "reverse_text", "tictactoe", "tools"}
    assert all(file.startswith(str(sent)) for file in files), files
    assert (run, version) == ("tictactoe", "0.1.0")


def test_small_and_without_what_is_not_code(sent: Path) -> None:
    write_bundle(sent)
    files = [file for file in sent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10 << 20
    parts = {part for file in files for part in file.relative_to(sent).parts}
    assert not parts & {"__pycache__", ".git", ".venv", "runs", "models", "tests", "docs"}


def test_a_file_is_the_same_module_for_the_sender_and_on_the_nodes(
    sent: Path, absent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or tasks could not be unpickled; found by what was written and by its absolute path."""
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "my-game.py"
    file.write_text(GAME)
    monkeypatch.chdir(tmp_path)
    write_bundle(sent, ["mine/my-game.py"])
    written = "mine/my-game.py"
    load = f"import json, rayrl; env = rayrl.load_env('{written}')"
    tell = "print(json.dumps([type(env.tasks(0, 1)[0]).__module__, env.ref]))"
    here, ref = there(ROOT, absent, f"import os; os.chdir({str(tmp_path)!r}); {load}; {tell}")
    file.unlink()
    assert there(sent, absent, f"{load}; {tell}") == [here, ref]
    assert ref == f"{file}:"
    assert there(sent, absent, f"{load.replace(written, ref)}; {tell}")[0] == here


def test_a_package_of_ones_own(
    sent: Path, absent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "elsewhere" / "zz_mine"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "games.py").write_text(GAME)
    (package / "data" / "words.txt").write_text("a b c")
    monkeypatch.syspath_prepend(str(package.parent))
    write_bundle(sent, ["zz_mine.games:game"])
    code = "import json, rayrl; print(json.dumps(rayrl.load_env('zz_mine.games:game').seats))"
    assert there(sent, absent, code) == ["agent"]
    assert (sent / "zz_mine" / "data" / "words.txt").read_text() == "a b c"
    with pytest.raises(ConfigError, match=r"env.name='zz_nobody:game'.*no module 'zz_nobody'"):
        write_bundle(sent, ["zz_nobody:game"])


@pytest.mark.parametrize("editable", [True, False])
def test_a_package_that_is_installed_from_elsewhere(
    editable: bool, sent: Path, absent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, source = tmp_path / "site", tmp_path / ("source" if editable else "site")
    info = site / "zz_theirs-2.0.dist-info"
    info.mkdir(parents=True)
    source.mkdir(exist_ok=True)
    (source / "zz_theirs.py").write_text("from zz_rules import game\n")
    (source / "zz_rules.py").write_text(GAME)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zz-theirs\nVersion: 2.0\n\nLong.")
    (info / "entry_points.txt").write_text("[rayrl.envs]\ntheirs = zz_theirs:game\n")
    files = ["zz_theirs.pth"] if editable else ["zz_theirs.py", "zz_rules.py"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(source))
    write_bundle(sent, [] if not editable else ["zz_rules:game"])
    code = "import json, rayrl; print(json.dumps(rayrl.load_env('theirs').name))"
    assert there(sent, absent, code) == "game"


def test_what_is_too_large_is_named(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "zz_large"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "corpus.bin").write_bytes(bytes(6 << 20))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code_bundle, "LIMIT_MB", 9)
    with pytest.raises(ConfigError, match=r"at most 9 .*corpus\.bin \(6 MiB\).*by path"):
        write_bundle(sent, ["zz_large:game"])
    assert not list(sent.iterdir())


def test_losses_and_advantages_from_outside_travel(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zz_losses.py").write_text("def mine(inputs): ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = [{"name": "rl", "verb": "train", "set": {"algo.loss": "zz_losses.py:mine"}}]
    algo = {"advantage": "zz_losses:mine"}
    found = function_references(from_dict({"env": {"name": "a"}, "algo": algo, "recipe": recipe}))
    assert found == {"zz_losses:mine": "algo.advantage", "zz_losses.py:mine": "algo.loss"}
    write_bundle(sent, functions=found)
    assert (sent / "zz_losses.py").is_file()
    assert len(list((sent / "env_files").rglob("zz_losses.py"))) == 1
    with pytest.raises(ConfigError, match=r"algo\.loss='zz_loses:mine': there is no module"):
        write_bundle(sent, functions={"zz_loses:mine": "algo.loss"})


def test_a_file_that_is_nowhere(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no file .*nim\.py"):
        write_bundle(sent, ["nim.py:nim"])
    write_bundle(sent, ["/shared/nim.py"])  # the nodes may have it


def test_data_and_its_rewards_travel(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.csv", "own.py"):
        (tmp_path / name).write_text("")
    args = {"eval_rows": "test.csv", "reward": ["number", "own.py:brief"]}
    names = env_names(from_dict({"env": {"name": "train.jsonl", "args": args}}))
    assert names == ["train.jsonl", "test.csv", "own.py:brief"]
    write_bundle(sent, names)
    copies = {path.name for path in (sent / "env_files").rglob("*.*")}
    assert copies == {"train.jsonl", "test.csv", "own.py"}
    written = json.loads((sent / "rayrl-code.json").read_text())["written"]
    assert written["train.jsonl"] == str(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"there is no file .*trai\.jsonl"):
        write_bundle(sent, ["trai.jsonl"])


def test_large_data_is_read_from_storage_that_nodes_share(sent: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    write_bundle(sent, [str(tmp_path / "train.jsonl")])
    assert not list(sent.rglob("train.jsonl"))


def test_environments_of_all_stages() -> None:
    config = from_dict(
        {
            "env": {"name": "a"},
            "recipe": [
                {"name": "one", "verb": "eval", "set": {"env.name": "b.py"}},
                {"name": "two", "verb": "train"},
            ],
        }
    )
    assert env_names(config) == ["a", "b.py"]


def test_players_from_outside_travel(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zz_rivals.py").write_text("def best(messages, rng): ...")
    monkeypatch.chdir(tmp_path)
    seats = {"x": "policy", "o": "zz_rivals.py:best", "p": "player:a", "q": "model:b"}
    recipe = [{"name": "one", "verb": "eval", "set": {"eval.player": "object:mine"}}]
    config = from_dict({"env": {"name": "a", "seats": seats}, "recipe": recipe})
    assert function_references(config) == {
        "zz_rivals.py:best": "env.seats.o",
        "object:mine": "eval.player",
    }
    assert played_code(config) == ["a", "zz_rivals.py:best", "object:mine"]
    write_bundle(sent, played_code(config))
    assert len(list((sent / "env_files").rglob("zz_rivals.py"))) == 1


def test_variables_of_a_run_and_not_of_a_machine() -> None:
    here = {"RAYRL_DEBUG": "1", "RAYRL_VENV": "/x", "HOME": "/root", "HF_HUB_OFFLINE": "1"}
    here |= {"NCCL_DEBUG": "INFO", "OPENAI_API_KEY": "secret", "HF_TOKEN": "secret"}
    assert forwarded_variables(here) == {
        "RAYRL_DEBUG": "1",
        "HF_HUB_OFFLINE": "1",
        "NCCL_DEBUG": "INFO",
    }


def test_a_program_travels_with_the_python_beside_it(
    sent: Path, absent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(absent.parent)
    files = {
        "agent.py": "import tools.add, words; print(words.SAID, tools.add.SUM)",
        "words.py": "SAID = 'x'",
        "tools/__init__.py": "",
        "tools/add.py": "SUM = 5",
        "grade.py": "def grade(output): return float(output == 'x 5\\n')",
        "notes.txt": "",
        "sums.csv": "question\n2+3?\n",
        "runs/agent/config.py": "",
    }
    for name, text in files.items():
        Path("bot", name).parent.mkdir(parents=True, exist_ok=True)
        Path("bot", name).write_text(text)
    args = {"score": "bot/grade.py:grade", "preload": ["decimal"], "rows": "bot/sums.csv"}
    names = env_names(from_dict({"env": {"name": "program:bot/agent.py", "args": args}}))
    assert names == ["program:bot/agent.py", "bot/grade.py:grade", "bot/sums.csv"]
    write_bundle(sent, names)
    copies = {path.name for path in (sent / "env_files").rglob("*.*")}
    assert copies == {"agent.py", "words.py", "__init__.py", "add.py", "grade.py", "sums.csv"}
    Path("bot").rename("elsewhere")
    code = """
import asyncio, json, sys, rayrl
env = rayrl.load_env("program:bot/agent.py").configure(json.loads(sys.argv[1]))
(task,) = env.tasks(0, 1)
player = rayrl.ScriptedPlayer(lambda messages, rng: "ok")
print(json.dumps(asyncio.run(rayrl.play_episode(env, task, {"agent": player}, id="e")).scores))
"""
    assert there(sent, absent, code, json.dumps(args)) == {"agent": {"score": 1.0, "failed": 0.0}}
    with pytest.raises(ConfigError, match=r"there is no file .*bat/agent\.py"):
        write_bundle(sent, ["program:bat/agent.py"])
    write_bundle(sent, ["program:/shared/agent.py"])  # the nodes may have it
