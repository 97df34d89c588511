"""What docs/ shows works: its code runs, its commands and settings exist, its lists are whole."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rayrl
from rayrl import Agent, Environment, ScriptedPlayer, check_env, cli, load_env, play_group
from rayrl.api import configure
from rayrl.cluster.rollouts import CollectedGroups
from rayrl.cluster.workers.worker_pool import Load
from rayrl.config import from_dict, leaves, validate
from rayrl.config.registry import load_module
from rayrl.environment.registry import SCHEME_GROUP
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import batch_of, make_batch
from rayrl.learner.reference import ReferenceLearner
from rayrl.run.metrics import Clock, step_metrics
from tests.act import instant
from tests.documents import ROOT, blocks, commands, settings, understand
from tests.learner_rows import make_model, make_rows

DOCS = (
    "docs/environments.md",
    "docs/training.md",
    "docs/cluster.md",
    "docs/evaluation.md",
    "docs/models.md",
    "docs/serving.md",
    "docs/python.md",
    "docs/data.md",
    "docs/programs.md",
    "docs/mcp.md",
    "docs/sandbox.md",
    "docs/rllib.md",
    *sorted(f"docs/schemes/{page.name}" for page in (ROOT / "docs/schemes").iterdir()),
)
PYTHON = [text for kind, text in blocks(DOCS[0]) if kind == "python"]
OWN_ALGORITHM = [text for kind, text in blocks(DOCS[1]) if kind == "python"]
COMMANDS = [line for file in DOCS for line in commands(blocks(file))]
SETTINGS = settings(COMMANDS)
OTHERS = (
    "ray start",
    "ray job submit",
    "eval ",
    "jobs/local_cluster",
    "source ",
    "docker ",
    "pip install 'rayrl[",
    "pip install openai-agents",
    "pip install openenv",
    "uvicorn ",
    "kubectl ",
    "export",
    "scripts/setup",
    "python benchmarks/",
    "python -c",
    "python -m venv ",
    ".venv-verifiers/bin/pip install 'verifiers>=",
    "python examples/",
    "tensorboard",
)


def name_of(block: str) -> str:
    """The file a block of Python is to be saved as: its first line says it."""
    found = re.fullmatch(r"# (\w+\.py)", block.splitlines()[0])
    assert found, f"a block of Python must begin with the name of its file: {block[:60]!r}"
    return found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    for block in PYTHON:
        (folder / name_of(block)).write_text(block)
    return folder


def test_the_python_page_calls_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its modules run, and its calls have settings that pass every check; tests/e2e run them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind, text in blocks("docs/python.md"):
        if kind == "python":
            Path(name_of(text)).write_text(text)
    called = []

    def stand_in(verb: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(**given: Any) -> Any:
            inspect.signature(real).bind(**given)
            known = {key: given[key] for key in ("env", "name") if key in given}
            config = configure(verb, None, known["env"], known.get("name"), {})
            validate(config, verb)
            called.append((verb, config.run.name, config.env.name))
            raise StopIteration

        return call

    for verb in ("train", "open_training"):
        monkeypatch.setattr(rayrl, verb, stand_in("train", getattr(rayrl, verb)))
    functions = {
        "letters": "train_it",
        "watched": "train_it",
        "own_loop": "loop",
        "choosy": "choose",
    }
    for module, function in functions.items():
        made = getattr(importlib.import_module(module), function)
        with pytest.raises((StopIteration, RuntimeError)):
            asyncio.run(made()) if inspect.iscoroutinefunction(made) else made()
    rivals = importlib.import_module("rivals")
    assert rivals.echo([rayrl.user("Say c")], random.Random(0)) in "cccccc"
    for module in (*functions, "rivals"):
        del sys.modules[module]
    names = ("letters", "watched", "own-loop", "choosy")
    assert called == [("train", name, "letters:repeat") for name in names]


def test_the_page_on_programs_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = [text for kind, text in blocks("docs/programs.md") if kind == "python"]
    Path(name_of(text)).write_text(text)
    env = load_env(name_of(text))
    player = ScriptedPlayer(env.players["knows"])
    (task,) = env.tasks(0, 1)
    episode = asyncio.run(rayrl.play_episode(env, task, {"agent": player}, id="e"))
    assert episode.rewards == {"agent": 1.0}
    assert [len(turn.prompt) for turn in episode.turns] == [1, 1]


def test_the_page_on_sandboxes_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is right is rewarded, and no forger is."""
    try:
        rayrl.sandbox_protection()
    except rayrl.EnvError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    _, *modules = [text for kind, text in blocks("docs/sandbox.md") if kind == "python"]
    for text in modules:
        Path(name_of(text)).write_text(text)
    functions, shell = (load_env(name_of(text)) for text in modules)
    expected = {"gold": (functions, 1.0), "forger": (functions, 0.0), "grep": (shell, 1.0)}
    for name, (env, reward) in expected.items():
        for task in env.tasks(0, 4):
            player = ScriptedPlayer(env.players[name])
            group = asyncio.run(play_group(env, task, {"agent": player}, id="docs", size=2))
            assert [one.rewards for one in group.episodes] == [{"agent": reward}] * 2, name


def test_the_page_on_mcp_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, text in blocks("docs/mcp.md"):
        if kind == "python":
            Path(name_of(text)).write_text(text)
    env = load_env("shop.py")
    for player, right in ((env.players["clerk"], 1.0), (lambda messages, rng: "Done.", 0.0)):
        (task,) = env.tasks(0, 1)
        players = {"agent": ScriptedPlayer(player)}
        group = asyncio.run(play_group(env, task, players, id="docs", size=1))
        assert group.episodes[0].rewards == {"agent": right}


def test_the_page_on_rllib_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, text in blocks("docs/rllib.md"):
        if kind == "python":
            Path(name_of(text)).write_text(text)
    env = load_env("higher.py")
    assert check_env(env) == []
    half = ScriptedPlayer(env.players["half"])
    group = asyncio.run(play_group(env, env.tasks(0, 1)[0], {"agent": half}, id="docs", size=1))
    assert group.episodes[0].rewards == {"agent": 1.0}
    world = rayrl.to_gymnasium(env)
    observation, _ = world.reset(seed=0)
    assert observation["observations"].tolist() == [0.0, 7.0]
    world.close()
    world = load_module("env.name", "guessing.py").tictactoe()
    assert world.reset(seed=0)[0]["action_mask"].sum() >= 8
    world.close()


def test_the_data_page_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its modules run, its checks pass, and its rewards and players judge the rows it names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    for kind, text in blocks("docs/data.md"):
        if kind == "python":
            Path(name_of(text)).write_text(text)
            load_module("env.name", name_of(text))
    assert check_env(load_env("two_tries.py")) == []
    checks = [words for words, line in settings(commands(blocks("docs/data.md"))) if "env" in words]
    assert len(checks) == 2
    for words in checks:
        assert cli.main(words) == 0
        assert "player gold: reward 1.00 (1.00 to 1.00)" in capsys.readouterr().out
    (train,) = [line for line in commands(blocks("docs/data.md")) if "own_rewards" in line]
    config = cli.configuration(cli.parse(shlex.split(train)[1:]))
    env = load_env(config.env.name).configure(config.env.args, config.env.rewards)
    (task,) = env.tasks(0, 1)
    gold = {"agent": ScriptedPlayer(env.players["gold"])}
    group = asyncio.run(play_group(env, task, gold, id="docs", size=1))
    assert group.episodes[0].rewards == {"agent": 1.2}


def test_the_example_data_is_what_its_program_makes(tmp_path: Path) -> None:
    made = tmp_path / "sums.jsonl"
    program = [sys.executable, ROOT / "examples" / "make_sums.py", made]
    subprocess.run(program, check=True, timeout=600)
    assert made.read_bytes() == (ROOT / "examples" / "sums.jsonl").read_bytes()


def environments(module: ModuleType) -> list[Environment]:
    return [value for value in vars(module).values() if isinstance(value, Environment)]


@pytest.mark.parametrize("file", [name_of(block) for block in PYTHON])
def test_python_runs(file: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    module = load_module("env.name", file)
    tests = [one for name, one in vars(module).items() if name.startswith("test_")]
    assert tests or environments(module)
    for test in tests:
        test()
    if not tests:
        asyncio.run(play(load_env(file)))


async def play(env: Environment) -> None:
    """A group by a model that answers at once, and every check by every scripted player."""
    (task,) = env.tasks(0, 1)
    policy = instant()["agent"]
    group = await play_group(env, task, dict.fromkeys(env.seats, policy), id="docs", size=4)
    assert group.complete, group.episodes[0].failure
    assert group.trainable == env.seats
    for check in env.checks.values():
        for function in env.players.values():
            player = ScriptedPlayer(function)
            figures = await check(lambda player=player: Agent(player), env.args)
            assert sum(figures.values()) > 0


@pytest.mark.parametrize("file", [name for name in map(name_of, PYTHON) if "test_" not in name])
def test_environments_have_no_problems(
    file: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert check_env(load_env(file)) == []


def test_the_scripted_players_do_what_they_are_for(folder: Path) -> None:
    nim, till = (load_env(str(folder / name)) for name in ("nim.py", "till.py"))
    for env, name, best in ((nim, "perfect", 1.2), (till, "clerk", 1.0)):
        players = {"agent": ScriptedPlayer(env.players[name])}
        (task,) = env.tasks(0, 1)
        group = asyncio.run(play_group(env, task, players, id="docs", size=2))
        assert [episode.rewards["agent"] for episode in group.episodes] == [best, best]
    assert group.episodes[0].scores["agent"] == {"right": 1, "tool_errors": 0, "tool_calls": 1}


def test_each_heap_size_is_there_once(folder: Path) -> None:
    tasks = load_env(str(folder / "nim.py")).tasks(seed=7, n=8)
    assert [task.stones for task in tasks] == list(range(5, 13))  # type: ignore[attr-defined]


def test_the_package_is_valid() -> None:
    text, scheme = [text for kind, text in blocks(DOCS[0]) if kind == "toml"]
    assert SCHEME_GROUP in tomllib.loads(scheme)["project"]["entry-points"]
    assert "rayrl.envs" in tomllib.loads(text)["project"]["entry-points"]


@pytest.mark.parametrize("words", [words for words, _ in SETTINGS], ids=" ".join)
def test_command_is_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    understand(words)


def test_every_other_command_is_known() -> None:
    for line in set(COMMANDS) - {line for _, line in SETTINGS}:
        assert line.startswith(OTHERS), line
        for word in shlex.split(line):
            assert not word.startswith(("benchmarks/", "examples/")) or (ROOT / word).is_file(), (
                line
            )


@pytest.mark.parametrize("file", DOCS)
def test_blocks_are_of_a_known_kind_and_parse(file: str) -> None:
    for kind, text in blocks(file):
        assert kind in ("python", "bash", "text", "toml", "yaml")
        if kind == "bash":
            subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=600)


@pytest.mark.parametrize("file", [*DOCS, "README.md", "CONTRIBUTING.md"])
def test_files_of_this_project_that_are_named_exist(file: str) -> None:
    folders = "rayrl|tests|benchmarks|conf|docs|envs"
    named = re.findall(rf"`((?:{folders})/[\w/]+\.\w+)`", (ROOT / file).read_text("utf-8"))
    assert [one for one in named if not (ROOT / one).is_file()] == []


@pytest.mark.parametrize("file", DOCS)
def test_lines_links_and_settings(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 100
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        place, _, anchor = target.partition("#")
        if place and "://" not in place:
            assert (ROOT / file).parent.joinpath(place).exists(), target
        elif not place:
            assert anchor in anchors, target
    keys = dict(leaves())
    sections = {key.split(".")[0] for key in keys if "." in key}
    for key in re.findall(r"`([a-z]+\.[a-z_*]+(?:\.\w+)?)[`=]", text):
        section, name, *_ = key.split(".")
        if section in sections and name not in ("py", "*", "json", "jsonl", "html"):
            assert f"{section}.{name}" in keys, f"{file}: there is no setting {key}"


def test_every_metric_of_a_step_is_explained_and_the_algorithm_of_ones_own_runs(
    tmp_path: Path,
) -> None:
    (block,) = OWN_ALGORITHM
    own = tmp_path / name_of(block)
    own.write_text(block)
    env = load_env("copyword")
    (task,) = env.tasks(0, 1)
    group = asyncio.run(play_group(env, task, instant(), id="docs", size=2))
    algo = {"loss": f"{own}:reinforce", "advantage": f"{own}:best_only", "kl_coef": 0.1}
    config = from_dict({"algo": algo})
    scored = advantages([group], config.algo)
    assert scored == [{(0, "agent"): (1.0,), (1, "agent"): (1.0,)}]
    batch = make_batch([group], scored)
    learner = ReferenceLearner(config, make_model(tmp_path / "model"))
    rows, totals = make_rows(0), batch_of(make_rows(0)).totals
    learned = {**learner.step(rows, totals, "cispo"), **learner.step(rows, totals)}
    learned["loss/NAME"] = learned.pop("loss/moved")
    clock = Clock()
    text = "".join((ROOT / f"rayrl/{f}.py").read_text() for f in ("loop", "run/training"))
    for stage in re.findall(r'clock\("(\w+)"\)', text):
        with clock(stage):
            pass
    played = CollectedGroups((group,), stale_groups=(group,), idle_s=0.0, load=Load(1, 0, 0))
    metrics = step_metrics(0, played, batch, learned, clock)
    text = (ROOT / "docs/training.md").read_text("utf-8")
    rows = set(re.findall(r"`([\w/]+)`", "".join(re.findall(r"^\| `.*?\|", text, re.M))))
    names = {name for name in metrics if not name.startswith("score/")}
    assert names <= rows, f"not explained: {sorted(names - rows)}"
