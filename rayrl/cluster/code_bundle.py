"""The code that a run needs, in one folder: what a cluster's nodes get instead of a clone.

    rayrl/ conf/                the code that runs here, the embedded base included
    rayrl_tictactoe/ ...        environments: of the clone, and whatever else is installed
    NAME-VERSION.dist-info/     by which they are found by name
    env_files/                  environments that are single files, by a number for their path
    config-dir/                 the folder of --config-dir
    start.py                    what a submitted job runs (`job_start.py`)
    rayrl-code.json             who sent it, and where the files came from

Ray puts its copy of the folder first on the path of every process, before what is installed there.
Python's libraries do not travel: every node needs those that `pyproject.toml` names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, distribution, distributions, version
from pathlib import Path

from rayrl.config import Config, stage_config
from rayrl.config.registry import CODE_FILE, OBJECT, split_reference
from rayrl.config.yaml_files import conf_dir
from rayrl.environment.registry import ENV_GROUP
from rayrl.errors import ConfigError
from rayrl.types import derive_seed

__all__ = [
    "CONFIG_DIR",
    "LIMIT_MB",
    "START",
    "env_names",
    "function_references",
    "stage",
    "variables",
]

LIMIT_MB = 100  # Ray would take 512 in one request, and keeps it in the memory of the head
START = "start.py"
CONFIG_DIR = "config-dir"
ENV_FILES = "env_files"
_LEFT_OUT = re.compile(r"\..*|__pycache__|node_modules|.*\.py[co]|.*\.egg-info")
_PREFIXES = ("RAYRL_", "VLLM_", "NCCL_", "GLOO_")
_NAMES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_OF_HERE = ("RAYRL_VENV",)


def env_names(config: Config) -> list[str]:
    """Every environment that a configuration names, those of a recipe's stages included."""
    return list(dict.fromkeys(one.env.name for one in _with_stages(config) if one.env.name))


def function_references(config: Config) -> dict[str, str]:
    """Every loss and advantage from outside the package that a configuration names -> its key."""
    named: dict[str, str] = {}
    for one in _with_stages(config):
        named |= {one.algo.loss: "algo.loss", one.algo.advantage: "algo.advantage"}
    return {reference: key for reference, key in named.items() if ":" in reference}


def _with_stages(config: Config) -> list[Config]:
    return [config, *(stage_config(config, one) for one in config.recipe)]


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that are meant for every process of a run, wherever it is."""
    return {
        name: value
        for name, value in environ.items()
        if (name.startswith(_PREFIXES) or name in _NAMES) and name not in _OF_HERE
    }


def stage(
    folder: Path,
    envs: Iterable[str] = (),
    config_dir: Path | None = None,
    functions: Mapping[str, str] | None = None,
) -> None:
    """Fill an empty folder with the code.

    Args:
        envs: as `env.name`; those that are installed by name travel whether named or not.
        functions: see `function_references`.

    Raises:
        ConfigError: there is no such file or module, or all of it is too large.
    """
    here = Path(__file__).resolve().parents[1]
    files: dict[str, Path] = {START: here / "commands" / "job_start.py"}
    texts: dict[str, str] = {}
    _add(files, here.name, here)
    _add(files, "conf", conf_dir())
    if config_dir is not None:
        _add(files, CONFIG_DIR, config_dir)
    projects = [here.parent / "pyproject.toml", *here.parent.glob("envs/*/pyproject.toml")]
    known = {_add_project(files, texts, one) for one in sorted(projects) if one.is_file()}
    for dist in _installed(known):
        _add_distribution(files, texts, dist)
    written, moved = {}, {}
    for name, key in [*((name, "env.name") for name in envs), *(functions or {}).items()]:
        place, attribute = split_reference(name)
        if place == OBJECT:  # travels by value
            continue
        if place.endswith(".py"):
            path = Path(place).expanduser().resolve()
            if path.is_file():
                written[place] = str(path)
                moved[str(path)] = f"{ENV_FILES}/{derive_seed(path):x}/{path.name}"
                files[moved[str(path)]] = path
            elif not Path(place).is_absolute():  # else it may be on the nodes
                raise ConfigError(f"{key}={place!r}: there is no file {path}.")
        elif attribute and not _add_module(files, place.split(".")[0]):
            raise ConfigError(f"{key}={name!r}: there is no module {place.split('.')[0]!r}.")
    texts[CODE_FILE] = json.dumps(
        {
            "python": ".".join(platform.python_version_tuple()[:2]),
            "ray": version("ray"),
            "written": written,
            "files": moved,
        }
    )
    _check_size(files)
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")


def _add(files: dict[str, Path], name: str, source: Path) -> None:
    """Plan to copy a file or a folder as `name`, but for what is made from the rest of it."""
    if source.is_file():
        files[name] = source
        return
    for parent, folders, found in os.walk(source):
        folders[:] = sorted(one for one in folders if not _LEFT_OUT.fullmatch(one))
        place = Path(name) / Path(parent).relative_to(source)
        for one in sorted(found):
            if not _LEFT_OUT.fullmatch(one):
                files[str(place / one)] = Path(parent, one)


def _add_project(files: dict[str, Path], texts: dict[str, str], pyproject: Path) -> str:
    """A project of this clone; returns its name."""
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    points = project.get("entry-points", {}).get(ENV_GROUP, {})
    for package in pyproject.parent.iterdir():
        if (package / "__init__.py").is_file() and package.name != "tests":
            _add(files, package.name, package)
    for value in points.values():
        module = pyproject.parent / f"{value.partition(':')[0]}.py"
        if module.is_file():
            _add(files, module.name, module)
    head = [
        "Metadata-Version: 2.1",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        *(f"Requires-Dist: {one}" for one in project.get("dependencies", ())),
    ]
    entries = [f"[{ENV_GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
    _describe(texts, project["name"], project["version"], "\n".join(head), "\n".join(entries))
    return _normal(project["name"])


def _installed(known: set[str]) -> Iterator[Distribution]:
    """Distributions with environments, and rayrl itself, that are none of `known`."""
    if "rayrl" not in known:
        yield distribution("rayrl")
    seen = {*known, "rayrl"}
    for dist in distributions():
        name = _normal(dist.metadata["Name"] or "")
        if name not in seen and any(point.group == ENV_GROUP for point in dist.entry_points):
            yield dist
        seen.add(name)  # the first on the path counts


def _add_distribution(files: dict[str, Path], texts: dict[str, str], dist: Distribution) -> None:
    points = [point for point in dist.entry_points if point.group == ENV_GROUP]
    modules = {point.module.split(".")[0] for point in points}
    if any(file.suffix == ".py" for file in dist.files or ()):  # not an editable install
        tops = {file.parts[0] for file in dist.files or () if file.suffix == ".py"}
        modules |= {top.removesuffix(".py") for top in tops if top != ".."} - {"rayrl", "tests"}
    for module in sorted(modules):
        _add_module(files, module)
    entries = [f"[{ENV_GROUP}]", *(f"{point.name} = {point.value}" for point in points)]
    head = "\n".join(
        line
        for line in (dist.read_text("METADATA") or "").splitlines()
        if line.startswith(("Metadata-Version:", "Name:", "Version:", "Requires-Dist:"))
    )
    _describe(texts, dist.metadata["Name"], dist.version, head, "\n".join(entries))


def _describe(texts: dict[str, str], name: str, version: str, head: str, entries: str) -> None:
    folder = f"{_normal(name).replace('-', '_')}-{version}.dist-info"
    texts[f"{folder}/METADATA"] = f"{head}\n"
    texts[f"{folder}/entry_points.txt"] = f"{entries}\n"


def _add_module(files: dict[str, Path], name: str) -> bool:
    """Plan to copy a top-level package or module, unless it is there; whether it was found."""
    if f"{name}.py" in files or any(one.startswith(f"{name}/") for one in files):
        return True
    spec = importlib.util.find_spec(name)
    if spec is None:
        return False
    for place in spec.submodule_search_locations or ():
        _add(files, name, Path(place))
    if spec.submodule_search_locations is None and spec.has_location and spec.origin:
        _add(files, Path(spec.origin).name, Path(spec.origin))
    return True


def _check_size(files: Mapping[str, Path]) -> None:
    sizes = {source: source.stat().st_size for source in files.values()}
    total = sum(sizes.values())
    if total > LIMIT_MB << 20:
        largest = sorted(sizes, key=lambda one: -sizes[one])[:3]
        which = ", ".join(f"{one} ({sizes[one] / 2**20:.0f} MiB)" for one in largest)
        raise ConfigError(
            f"the code comes to {total / 2**20:.0f} MiB, and at most {LIMIT_MB} travel to a "
            f"cluster. The largest files: {which}. Keep data and models outside of packages, on "
            "storage that all nodes share, and name them by path."
        )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
