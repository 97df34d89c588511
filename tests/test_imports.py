"""Imports go downwards only. Read from the source, so that a lazy import counts as well."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rayrl"

# From the bottom up. Families on one line are neighbours: they do not import each other.
LAYERS: list[dict[str, str]] = [
    {"words": "types errors hints terminal"},
    {
        "ground": "config conffiles env groups registry bundle gymnasium intervals models "
        "randomness loading weights buckets records tasks encoding engine.protocol"
    },
    {
        "act": "tokenizer templates chat agent players tools textcalls durable deadline rollout "
        "episodes isolation endpoint refusals limits checker live",
        "learn": "advantage batch packing loss",
    },
    {"engine": "engine", "learner": "learner", "server": "openai"},
    {"cluster": "cluster"},
    {
        "output": "files seal checkpoints rundir figures results show report_page stage journal "
        "bar boards progress memory alarms timeline watch feed grouplog recovery"
    },
    {
        "programs": "synth sft train evaluate play report recipe plan envcheck fetch serve replay",
    },
    {"command": "cli foldernames helppages submit jobstart __main__"},
]
PLACE = {
    f"rayrl.{module}": (height, family)
    for height, layer in enumerate(LAYERS)
    for family, modules in layer.items()
    for module in modules.split()
}
PLACE["rayrl"] = (2, "act")  # the public names: what an environment needs

ONLY = {
    "ray": ("rayrl/cluster/",),
    "hydra": ("rayrl/cli.py",),
    "deepspeed": ("rayrl/learner/deepspeed.py",),
    "peft": ("rayrl/learner/lora.py",),
    "vllm": ("rayrl/engine/vllm",),
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


def place(module: str) -> tuple[int, str]:
    while module not in PLACE and "." in module:
        module = module.rsplit(".", 1)[0]
        if module == "rayrl":
            break
    return PLACE[module]


def complaints(importer: str, imported: str) -> str:
    """What is wrong with one import inside the package; empty if nothing is."""
    (high, family), (low, other) = place(importer), place(imported)
    if low > high:
        return f"{importer} imports {imported}, which is above it"
    if low == high and family != other:
        return f"{importer} ({family}) imports {imported} ({other}), its neighbour"
    if imported == "rayrl" and importer != "rayrl":
        return f"{importer} imports the package itself: import from the module"
    return ""


def test_every_module_has_a_place() -> None:
    missing = [
        module
        for module in known_modules()
        if module != "rayrl"
        and module.split(".")[1] not in {p.split(".")[1] for p in PLACE if "." in p}
    ]
    assert not missing, f"give {missing} a place in LAYERS"


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_imports_go_down(file: Path) -> None:
    wrong = [
        f"line {line}: {what}"
        for imported, line in imports_of(file)
        if imported.split(".")[0] == "rayrl" and (what := complaints(name_of(file), imported))
    ]
    assert not wrong, "\n".join(wrong)


def test_rule_can_fail() -> None:
    assert "above" in complaints("rayrl.batch", "rayrl.learner.step")
    assert "neighbour" in complaints("rayrl.rollout", "rayrl.loss")
    assert "neighbour" in complaints("rayrl.loss", "rayrl.agent")
    assert "neighbour" in complaints("rayrl.engine.embedded", "rayrl.learner.step")
    assert not complaints("rayrl.players", "rayrl.engine.protocol")
    assert not complaints("rayrl.train", "rayrl.batch")
    tree = ast.parse("from . import step\nfrom ..batch import make_batch")
    found = [name for name, _ in imports(tree, "rayrl.learner.reference", False)]
    assert found == ["rayrl.learner.step", "rayrl.batch"]


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
