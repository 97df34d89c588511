"""Every setting is read somewhere: one that nobody reads is a promise that nobody keeps."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from rayrl.config import leaves

PACKAGE = Path(__file__).resolve().parents[2] / "rayrl"
# they define, check and print settings
NOT_READERS = [PACKAGE / "config", PACKAGE / "commands" / "plan.py"]
SECTIONS = {key.split(".")[0] for key, _ in leaves() if "." in key}


def attributes(source: str) -> set[str]:
    """Dotted attribute chains read in `source`, from any length: `a.b.c` gives `b.c` and `c`.

    A section bound to a name counts as its section: after `cfg = config.train`, `cfg.steps` is
    `train.steps` as well. So does a parameter or field annotated with the section's class. What
    lies deeper counts as its class: `rule.setting.patience` is `AlarmConfig.patience`.
    """
    tree = ast.parse(source)
    found: set[str] = set()
    known = sections_by_name(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            chain = dotted(node)
            found.add(node.attr)
            for start in range(1, len(chain)):
                found.add(".".join(chain[start:]))
            head = chain[-2] if len(chain) > 1 else ""
            for section in known.get(head, ()):
                found.add(f"{section}.{node.attr}")
    return found


def dotted(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else ["?"]


def sections_by_name(tree: ast.AST) -> dict[str, set[str]]:
    """Names that stand for a section of the config, such as `cfg` after `cfg = config.train`."""
    classes = {f"{section.capitalize()}Config": section for section in SECTIONS}
    classes |= {"AlarmConfig": "AlarmConfig"}
    known: dict[str, set[str]] = {}

    def bind(target: ast.expr, value: ast.expr) -> None:
        name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", None)
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                bind(one, other)
        elif name and isinstance(value, ast.Attribute) and value.attr in SECTIONS:
            known.setdefault(name, set()).add(value.attr)

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                bind(target, node.value)
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else getattr(node.target, "id", None)
            for word in ast.unparse(node.annotation).replace("|", " ").split():
                if name and word.strip("'\"") in classes:
                    known.setdefault(name, set()).add(classes[word.strip("'\"")])
    return known


@functools.cache
def all_read() -> set[str]:
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        if not any(file.is_relative_to(one) for one in NOT_READERS):
            found |= attributes(file.read_text("utf-8"))
    return found


@pytest.mark.parametrize("key", [key for key, _ in leaves()])
def test_key_is_read(key: str) -> None:
    assert is_read(key), f"nothing in rayrl/ reads {key}: read it or remove it"


def is_read(key: str) -> bool:
    if key.count(".") == 2:  # one of several sections of a kind, as alarms.mismatch.threshold
        section, _, name = key.rpartition(".")
        return section in all_read() and f"AlarmConfig.{name}" in all_read()
    return key in all_read()


def test_reader_is_found_and_missed() -> None:
    assert all(one.exists() for one in NOT_READERS), "else they would count as readers"
    source = (
        "def f(config: Config, algo: AlgoConfig):\n"
        "    cfg = config.train\n"
        "    a, b = config.run, config.sft\n"
        "    use(cfg.steps, algo.gamma, config.engine.threads, b.data, self.cfg.nothing)\n"
    )
    found = attributes(source)
    assert {"train.steps", "algo.gamma", "engine.threads", "sft.data"} <= found
    assert "sft.steps" not in found
    assert "run.data" not in found
    assert "learner.threads" not in found
    assert "train.groups" not in attributes("cfg.train.groups = 3")
    assert "AlarmConfig.patience" in attributes("def f(one: AlarmConfig): return one.patience")
    assert not is_read("alarms.mismatch.nothing")
    assert not is_read("alarms.nothing.patience")
