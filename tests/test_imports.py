"""Imports go downwards only, in no circle. Read from the source, so that a lazy one counts too."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rayrl"

# From the bottom up; folders on one line are neighbours, which do not import each other.
FLOORS = [
    "types errors terminal conversations",  # where one may use another
    "config",
    "environment",
    "weights native",
    "chat",
    "engine.protocol",
    "rollout",
    "engine learner rllib",
    "server",
    "cluster",
    "run",
    "report",
    "loop",
    "commands",
    "cli",
    "api",
    "commands.job_start",  # what a job runs
    "commands.submit __main__",
]
HEIGHT = {f"rayrl.{name}": height for height, line in enumerate(FLOORS) for name in line.split()}
HEIGHT["rayrl"] = len(FLOORS)  # the public names: nothing inside imports them

ONLY = {
    "ray": ("rayrl/cluster/", "rayrl/rllib/"),
    "hydra": ("rayrl/cli.py",),
    "deepspeed": ("rayrl/learner/deepspeed.py",),
    "mcp": ("rayrl/rollout/mcp/",),
    "peft": ("rayrl/learner/lora.py",),
    "vllm": ("rayrl/engine/vllm/",),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every module that is imported, anywhere in the file, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in known_modules() else base), node.lineno


@functools.cache
def known_modules() -> set[str]:
    return {name_of(file) for file in modules()}


@functools.cache
def imports_of(file: Path) -> list[tuple[str, int]]:
    tree = ast.parse(file.read_text("utf-8"))
    return list(imports(tree, name_of(file), file.name == "__init__.py"))


def folder_of(module: str) -> str:
    """The longest name in `FLOORS` that the module has or lies in."""
    while module not in HEIGHT:
        module = module.rpartition(".")[0]
    return module


def complaint(importer: str, imported: str) -> str:
    """What is wrong with one import inside the package; empty if nothing is."""
    if imported == "rayrl" and importer != "rayrl":
        return f"{importer} imports the package itself: import from the module"
    high, low = folder_of(importer), folder_of(imported)
    if HEIGHT[low] > HEIGHT[high]:
        return f"{importer} imports {imported}, which is above it"
    if HEIGHT[low] == HEIGHT[high] and low != high and HEIGHT[low] > 0:
        return f"{importer} imports {imported}, its neighbour"
    return ""


def test_every_module_has_a_floor() -> None:
    missing = [m for m in known_modules() if m != "rayrl" and folder_of(m) == "rayrl"]
    assert not missing, f"give {missing} a place in FLOORS"


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_imports_go_down(file: Path) -> None:
    wrong = [
        f"line {line}: {what}"
        for imported, line in imports_of(file)
        if imported.split(".")[0] == "rayrl" and (what := complaint(name_of(file), imported))
    ]
    assert not wrong, "\n".join(wrong)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What stays when modules that import nothing that stays are taken away, again and again."""
    left = dict(graph)
    while free := [module for module, to in left.items() if not to & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        name_of(file): {to for to, _ in imports_of(file) if to in known_modules() - {"rayrl"}}
        for file in modules()
    }
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


# vLLM loads the first by its name, users import the second
USED_OUTSIDE = {"rayrl.engine.vllm.worker:Worker", "rayrl.rllib.masked:MaskedPPO"}


def test_what_a_module_offers_is_used() -> None:
    """A feature that nothing reaches any more, after a merge say, still has settings and tests."""
    used: set[str] = set()
    offered: list[tuple[str, str]] = []
    for file in [*modules(), *sorted(ROOT.glob("envs/*/rayrl_*/**/*.py"))]:
        tree, module = ast.parse(file.read_text("utf-8")), name_of(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.decorator_list:
                used.add(node.name)  # registered
            elif isinstance(node, ast.ImportFrom) and module == "rayrl":
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                offered += [(module, name) for name in ast.literal_eval(node.value)]
    assert {f"{module}:{name}" for module, name in offered if name not in used} == USED_OUTSIDE


def test_rule_can_fail() -> None:
    assert "above" in complaint("rayrl.weights.flat", "rayrl.learner.forward")
    assert "above" in complaint("rayrl.rollout.rollout", "rayrl.learner.loss")
    assert "neighbour" in complaint("rayrl.engine.embedded.engine", "rayrl.learner.forward")
    assert "the package itself" in complaint("rayrl.loop", "rayrl")
    assert not complaint("rayrl.rollout.players", "rayrl.engine.protocol")
    assert not complaint("rayrl.loop", "rayrl.learner.batch")
    tree = ast.parse("from . import forward\nfrom ..chat import tools")
    found = [name for name, _ in imports(tree, "rayrl.learner.reference", False)]
    assert found == ["rayrl.learner.forward", "rayrl.chat.tools"]


@pytest.mark.parametrize("library", ONLY)
def test_one_importer(library: str) -> None:
    importers = {
        file.relative_to(ROOT).as_posix()
        for file in modules()
        for imported, _ in imports_of(file)
        if imported.split(".")[0] == library
    }
    assert all(importer.startswith(ONLY[library]) for importer in importers), importers


def third_party() -> dict[str, set[str]]:
    """Import name -> files that import it."""
    found: dict[str, set[str]] = {}
    for file in modules():
        for imported, _ in imports_of(file):
            top = imported.split(".")[0]
            if top not in sys.stdlib_module_names and top not in ("rayrl", "__future__"):
                found.setdefault(top, set()).add(file.relative_to(ROOT).as_posix())
    return found


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for name, extra in project["optional-dependencies"].items():
        wanted += extra if name != "dev" else []
    names = {re.split(r"[\[<>=!~; ]", one)[0].lower().replace("-", "_") for one in wanted}
    return names | {"hydra"} if "hydra_core" in names else names


def test_every_import_is_a_declared_dependency() -> None:
    """So `envs/` is never imported either."""
    undeclared = {name: files for name, files in third_party().items() if name not in declared()}
    assert not undeclared


def test_environments_use_the_public_names_only() -> None:
    wrong = []
    for file in sorted((ROOT / "envs").rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            wrong += [f"{file.name}: {name}" for name in names if name.startswith("rayrl.")]
    assert not wrong


def names_in(tree: ast.Module) -> set[str]:
    """Whatever a module defines, assigns or imports, at its top or further down."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def test_scripts_import_what_there_is() -> None:
    """Benchmarks and jobs, which nobody runs after every change."""
    wrong = []
    names = {name_of(file): names_in(ast.parse(file.read_text("utf-8"))) for file in modules()}
    for file in (f for folder in ("benchmarks", "jobs") for f in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "rayrl":
                module = str(node.module)
                wrong += [
                    f"{file.name}:{node.lineno}: {module} has no {name}"
                    for name in (alias.name for alias in node.names)
                    if name not in names.get(module, ()) and f"{module}.{name}" not in names
                ]
    assert not wrong


def test_actors_that_do_not_serve_start_without_serve() -> None:
    """It takes half a second, in every process of theirs."""
    words = ["learner_group", "workers.turn_log", "weight_sync.weight_store"]
    line = f"import sys, {', '.join(f'rayrl.cluster.{word}' for word in words)}"
    line += "; print('ray.serve' in sys.modules, 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", line], capture_output=True, check=True, text=True)
    assert said.stdout.split() == ["False", "False"]
