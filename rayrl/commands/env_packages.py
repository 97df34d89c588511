"""`rayrl env list`: what is installed; `rayrl env new NAME`: begin an environment of your own."""

from __future__ import annotations

import json
import keyword
import re
import sys
import textwrap
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, metadata
from importlib.util import find_spec
from pathlib import Path
from string import Template

from packaging.requirements import Requirement

from rayrl.environment.registry import ENV_GROUP, SCHEME_GROUP, extra_of
from rayrl.errors import ConfigError

__all__ = ["list_environments", "new_environment"]

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$name"
version = "0.1.0"
description = "An environment for rayrl: sums of two numbers."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["rayrl"]

[project.optional-dependencies]
dev = ["pytest>=9"]

[project.entry-points."rayrl.envs"]
$name = "$module:$module"

[tool.hatch.build.targets.wheel]
packages = ["$module"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["."]
"""

_MODULE = '''\
"""Sums of two numbers. Replace the task, the conversation and the scores with your own."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import rayrl
from rayrl import Agent, ConfigError, Message, Scores, Task

__all__ = $exported


@dataclass(frozen=True, kw_only=True)
class Sum(Task):
    """What an episode starts from: frozen, and the same whenever it is made from the same seed."""

    a: int
    b: int


def sums(seed: int, u: float, *, digits: int = 2) -> Sum:
    """The task of a seed; u in [0, 1) is how hard it is, `digits` the setting env.args.digits."""
    if digits < 1:
        raise ConfigError(f"digits={digits}: a number has at least one")
    most = 10 ** (1 + int(u * digits)) - 1
    rng = Task(seed=seed).rng("numbers")
    return Sum(seed=seed, a=rng.randint(0, most), b=rng.randint(0, most))


def score(task: Sum, reply: str) -> dict[str, float]:
    """Whether the last number of a reply is the sum, and whether the reply is nothing else."""
    numbers = re.findall(r"\\d+", reply)
    right = bool(numbers) and numbers[-1] == str(task.a + task.b)
    return {"right": float(right), "short": float(reply.strip().isdecimal())}


@rayrl.env(tasks=sums, rewards={"right": 1.0, "short": 0.1})
async def $module(task: Sum, agent: Agent) -> Scores:
    """Play one episode: talk to the model, return the scores."""
    reply = await agent(f"What is {task.a} + {task.b}? Answer with the number only.")
    return score(task, reply)


@$module.player("perfect")
def perfect(messages: Sequence[Message], rng: random.Random) -> str:
    """A scripted player that knows the answer: a teacher, and a check that it can be reached."""
    return str(sum(map(int, re.findall(r"\\d+", messages[-1].content))))
'''

_TEST = '''\
from __future__ import annotations

import asyncio

import pytest
import rayrl

from $module import $imported


def test_it_is_ready_to_train_on() -> None:
    """Deterministic, scored, and its tasks are read back as they were written."""
    assert rayrl.check_env($module) == []


@pytest.mark.parametrize(
    ("reply", "right", "short"),
    [("15", 1.0, 1.0), ("It is 15.", 1.0, 0.0), ("16", 0.0, 1.0), ("", 0.0, 0.0)],
)
def test_scores(reply: str, right: float, short: float) -> None:
    assert score(Sum(a=7, b=8), reply) == {"right": right, "short": short}


def test_the_perfect_player_gets_every_reward() -> None:
    player = rayrl.ScriptedPlayer($module.players["perfect"])
    players = {"agent": player}
    for task in $module.tasks(seed=0, n=20):
        episode = asyncio.run(rayrl.play_episode($module, task, players, id="e"))
        assert episode.failure is None, episode.failure
        assert episode.rewards == {"agent": 1.1}
'''

_README = """\
# $name

An environment for rayrl: sums of two numbers.

```bash
pip install -e '.[dev]'
pytest
rayrl env check $name
rayrl train env.name=$name train.steps=50
```

| score | value | weight |
| --- | --- | --- |
| `right` | 1 if the last number of the reply is the sum | 1.0 |
| `short` | 1 if the reply is a number and nothing else | 0.1 |

| setting | default | meaning |
| --- | --- | --- |
| `env.args.digits` | 2 | most digits of a number |

The scripted player `perfect` knows the answer.
"""


def list_environments() -> str:
    """The environments and schemes that are installed, with what their packages say of them."""
    lines = ["environments, for env.name:"]
    for point in sorted(entry_points(group=ENV_GROUP), key=lambda point: point.name):
        lines += _line(point.name, _summary(point))
    lines.append("\nother libraries' environments, for env.name=SCHEME:ID:")
    for point in sorted(entry_points(group=SCHEME_GROUP), key=lambda point: point.name):
        doc = find_spec(point.module)
        about = "" if doc is None or doc.origin is None else _first_sentence(Path(doc.origin))
        needs = f" Needs pip install '{extra_of(point)}'." if _is_missing(point) else ""
        lines += _line(f"{point.name}:", about + needs)
    lines.append(
        "\nAlso a file (path/to/file.py), module:attribute, or rows of data (path/to/rows.jsonl)."
        "\nrayrl env check NAME says more about one; rayrl env new NAME begins one of your own."
    )
    return "\n".join(lines)


def _line(name: str, about: str) -> list[str]:
    return textwrap.wrap(f"{name:20} {about}", 98, initial_indent="  ", subsequent_indent=" " * 23)


def _summary(point: EntryPoint) -> str:
    summary = point.dist.metadata["Summary"] if point.dist else None
    return summary or point.value


def _first_sentence(file: Path) -> str:
    """Of a module's docstring, which is read without importing the library behind a scheme."""
    found = re.match(r'"""(.*?)\.?(?:(?<=\.)\s|"""|\n\n)', file.read_text("utf-8"), re.DOTALL)
    return f"{' '.join(found[1].split())}." if found else ""


def _is_missing(scheme: EntryPoint) -> bool:
    """Whether a package of the extra that a scheme needs is not installed."""
    wanted = Requirement(extra_of(scheme) or "none")
    for text in (scheme.dist.requires if scheme.dist else None) or ():
        marker = Requirement(text).marker
        if marker is None or marker.evaluate({"extra": ""}):  # whatever the extra
            continue
        if any(marker.evaluate({"extra": extra}) for extra in wanted.extras):
            try:
                metadata(Requirement(text).name)
            except PackageNotFoundError:
                return True
    return False


def new_environment(name: str, folder: str = "") -> str:
    """Write a package with an environment that can be trained on, its tests and a README.

    Args:
        name: of the environment and of its project.
        folder: where to; by default a folder of that name.

    Returns:
        What to do with it.

    Raises:
        ConfigError: the name cannot be that of an environment, or something is in the way.
    """
    module = name.replace("-", "_")
    place = Path(folder or name)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"env new {name}: write a name of small letters, digits and hyphens, as word-chain"
        )
    if keyword.iskeyword(module):
        raise ConfigError(f"env new {name}: {module} is a word of Python; choose another name")
    if taken := [one for one in entry_points(group=ENV_GROUP) if one.name == name]:
        raise ConfigError(f"env new {name}: {taken[0].value} is installed under that name already")
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        raise ConfigError(
            f"env new {name}: `import {module}` finds another module already; choose another name"
        )
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"env new {name}: {place} exists already; name another folder behind it")
    files = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{module}/__init__.py": _MODULE,
        f"tests/test_{module}.py": _TEST,
    }
    exported, imported = ["Sum", "score", "sums", module], ["Sum", "score", module]
    words = {
        "name": name,
        "module": module,
        "exported": json.dumps(sorted(exported)),  # as ruff sorts them
        "imported": ", ".join(sorted(imported)),
    }
    for path, text in files.items():
        file = place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(words), encoding="utf-8")
    (place / module / "py.typed").touch()
    return (
        f"{place}: an environment that asks for sums; replace them with your own in "
        f"{module}/__init__.py.\n"
        f"  pip install -e {place}\n  pytest {place}\n  rayrl env check {name}\n"
        f"  rayrl train env.name={name} train.steps=50"
    )
