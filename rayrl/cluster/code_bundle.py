"""Bundle of the code of a run, one folder that is sent to a cluster's nodes.

    rayrl/ conf/                the driver's code, the embedded base model included
    rayrl_tictactoe/ ...        environments: those of the clone and installed ones
    NAME-VERSION.dist-info/     makes them available by name
    env_files/                  environments and data that are single files, and programs with the
                                Python beside them, by a hash of their path
    config-dir/                 the folder of --config-dir
    start.py                    entry point of a submitted job (`job_start.py`)
    rayrl-code.json             versions of the sender, and where files came from

Ray puts its copy of the folder first on the path of every process, before installed packages. The
bundle has no other libraries: every node needs those that `pyproject.toml` names.
"""

from __future__ import annotations

import importlib.util
import itertools
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
from rayrl.config.mix import components
from rayrl.config.registry import CODE_FILE, OBJECT, PLAYER_GROUP, from_outside, split_reference
from rayrl.config.yaml_files import conf_dir
from rayrl.environment.data_files import HUB, SUFFIXES, is_data_file
from rayrl.environment.registry import ENV_GROUP, SCHEME_GROUP, scheme_of
from rayrl.errors import ConfigError
from rayrl.types import derive_seed

__all__ = [
    "CONFIG_DIR",
    "LIMIT_MB",
    "START",
    "env_names",
    "forwarded_variables",
    "function_references",
    "played_code",
    "write_bundle",
]

LIMIT_MB = 100  # Ray accepts 512 in one request, and keeps them in the head's memory
START = "start.py"
CONFIG_DIR = "config-dir"
ENV_FILES = "env_files"
PROGRAM = "program:"  # what the names of environments that are programs begin with
_EXCLUDED = re.compile(r"\..*|__pycache__|node_modules|.*\.py[co]|.*\.egg-info")
_PREFIXES = ("RAYRL_", "VLLM_", "NCCL_", "GLOO_")
_NAMES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_LOCAL_NAMES = ("RAYRL_VENV",)
_GROUPS = (ENV_GROUP, SCHEME_GROUP, PLAYER_GROUP)  # of entry points


def env_names(config: Config) -> list[str]:
    """List the environments of a configuration and of its recipe's stages.

    Of data, also the data for evaluation and the functions that reward replies; of a program, its
    data and the function that scores its output.
    """
    names: list[str] = []
    for c in _with_stages(config):
        names.append(c.env.name)
        if is_data_file(c.env.name) or Path(c.env.name).is_dir():
            rewards = c.env.args.get("reward", [])
            listed = [rewards] if isinstance(rewards, str) else rewards
            names += [c.env.args.get("eval_rows", ""), *(name for name in listed if ":" in name)]
        elif c.env.name.startswith(PROGRAM):
            names += [c.env.args.get(key, "") for key in ("score", "rows", "eval_rows")]
    return list(dict.fromkeys(filter(None, names)))


def function_references(config: Config) -> dict[str, str]:
    """Map each loss, advantage and player from outside that `config` names to its key."""
    named: dict[str, str] = {}
    for c in _with_stages(config):
        named |= {c.algo.loss: "algo.loss", c.algo.advantage: "algo.advantage"} | _players(c)
    return {reference: key for reference, key in named.items() if ":" in reference}


def played_code(config: Config) -> list[str]:
    """List what env workers load: environments, and players from outside them."""
    players = {who: None for c in _with_stages(config) for who in _players(c)}
    return [*env_names(config), *players]


def _players(config: Config) -> dict[str, str]:
    """Map each player from outside the environment to the key that names it."""
    named = {f"env.seats.{seat}": who for seat, who in config.env.seats.items()}
    named |= {"eval.player": config.eval.player, "synth.player": config.synth.player}
    named |= {"play.player": config.play.player}
    return {who: key for key, who in named.items() if from_outside(who)}


def _with_stages(config: Config) -> list[Config]:
    """Settings of the configuration and of its stages, of a mixture those of each component."""
    stages = [config, *(stage_config(config, stage) for stage in config.recipe)]
    return [own for one in stages for own in components(one).values()]


def forwarded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Select the environment variables that every process of a run needs, on any node."""
    return {
        name: value
        for name, value in environ.items()
        if (name.startswith(_PREFIXES) or name in _NAMES) and name not in _LOCAL_NAMES
    }


def write_bundle(
    folder: Path,
    envs: Iterable[str] = (),
    config_dir: Path | None = None,
    functions: Mapping[str, str] | None = None,
) -> None:
    """Write the bundle into an empty folder.

    Args:
        envs: see `env_names`; those installed by name are always included.
        functions: see `function_references`.

    Raises:
        ConfigError: a file or module does not exist, or the bundle is too large.
    """
    package = Path(__file__).resolve().parents[1]
    files: dict[str, Path] = {START: package / "commands" / "job_start.py"}
    texts: dict[str, str] = {}
    _add(files, package.name, package)
    _add(files, "conf", conf_dir())
    if config_dir is not None:
        _add(files, CONFIG_DIR, config_dir)
    clone = package.parent
    projects = [clone / "pyproject.toml", *clone.glob("envs/*/pyproject.toml")]
    known = {_add_project(files, texts, file) for file in sorted(projects) if file.is_file()}
    for dist in _other_distributions(known):
        _add_distribution(files, texts, dist)
    path_of, copy_of = {}, {}  # absolute path by name, path in the bundle by absolute path
    for name, key in [*((name, "env.name") for name in envs), *(functions or {}).items()]:
        if found := _add_reference(files, name, key):
            written, path, place = found
            path_of[written], copy_of[path] = path, place
    texts[CODE_FILE] = json.dumps(
        {
            "python": ".".join(platform.python_version_tuple()[:2]),
            "ray": version("ray"),
            "written": path_of,
            "files": copy_of,
        }
    )
    sizes = {source: source.stat().st_size for source in files.values()}
    total = sum(sizes.values())
    if total > LIMIT_MB << 20:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
        listing = ", ".join(f"{file} ({sizes[file] / 2**20:.0f} MiB)" for file in largest)
        raise ConfigError(
            f"the code takes {total / 2**20:.0f} MiB, and at most {LIMIT_MB} can be sent to a "
            f"cluster. The largest files: {listing}. Keep data and models outside packages, on "
            "storage that all nodes share, and refer to them by path."
        )
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)  # with its mode: a program can be executed
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")


def _add(files: dict[str, Path], name: str, source: Path) -> None:
    """Plan to copy a file, or a folder without generated files, as `name`."""
    if source.is_file():
        files[name] = source
        return
    for parent, folders, found in os.walk(source):
        folders[:] = sorted(folder for folder in folders if not _EXCLUDED.fullmatch(folder))
        target = Path(name) / Path(parent).relative_to(source)
        for file in sorted(found):
            if not _EXCLUDED.fullmatch(file):
                files[str(target / file)] = Path(parent, file)


def _add_reference(files: dict[str, Path], name: str, key: str) -> tuple[str, str, str] | None:
    """Plan to copy what a name refers to; of a file, return name, path and place in the bundle.

    Raises:
        ConfigError: it does not exist.
    """
    module, attribute = split_reference(name)
    is_program = key == "env.name" and name.startswith(PROGRAM)
    if module == OBJECT or name.startswith(HUB):  # sent by value, or read by the driver
        return None
    if is_program:
        written = name.removeprefix(PROGRAM)
    elif key == "env.name" and scheme_of(name):  # installed, like the library behind it
        return None
    elif name.endswith(SUFFIXES):
        if Path(name).is_absolute():  # only the driver reads it, from storage that nodes share
            return None
        written = name
    elif module.endswith((".py", *SUFFIXES)):
        written = module
    else:
        package = module.split(".")[0]
        if attribute and not _add_module(files, package):
            raise ConfigError(f"{key}={name!r}: there is no module {package!r}.")
        return None
    path = Path(written).expanduser().resolve()
    if not path.is_file():
        if Path(written).is_absolute():  # it may exist on the nodes
            return None
        raise ConfigError(f"{key}={name!r}: there is no file {path}.")
    if is_program:
        return written, str(path), _add_program(files, path)
    place = f"{ENV_FILES}/{derive_seed(path):x}/{path.name}"
    files[place] = path
    return written, str(path), place


def _add_program(files: dict[str, Path], program: Path) -> str:
    """Plan to copy a program with the Python beside it, which it may import; return its place."""
    folder = f"{ENV_FILES}/{derive_seed(program):x}"
    for beside in program.parent.iterdir():
        if beside.suffix == ".py" or (beside / "__init__.py").is_file():
            _add(files, f"{folder}/{beside.name}", beside)
    files[f"{folder}/{program.name}"] = program
    return f"{folder}/{program.name}"


def _add_project(files: dict[str, Path], texts: dict[str, str], pyproject: Path) -> str:
    """Add a project of this clone; return its normalized name."""
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    groups = {group: project.get("entry-points", {}).get(group, {}) for group in _GROUPS}
    for package in pyproject.parent.iterdir():
        if (package / "__init__.py").is_file() and package.name != "tests":
            _add(files, package.name, package)
    for value in itertools.chain(*(points.values() for points in groups.values())):
        module = pyproject.parent / f"{value.partition(':')[0]}.py"
        if module.is_file():
            _add(files, module.name, module)
    head = [
        "Metadata-Version: 2.1",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        *(f"Requires-Dist: {requirement}" for requirement in project.get("dependencies", ())),
    ]
    _add_metadata(texts, project["name"], project["version"], "\n".join(head), groups)
    return _normal(project["name"])


def _other_distributions(known: set[str]) -> Iterator[Distribution]:
    """Yield rayrl and distributions with environments or schemes, except those in `known`."""
    if "rayrl" not in known:
        yield distribution("rayrl")
    seen = {*known, "rayrl"}
    for dist in distributions():
        name = _normal(dist.metadata["Name"] or "")
        if name not in seen and any(point.group in _GROUPS for point in dist.entry_points):
            yield dist
        seen.add(name)  # the first on the path wins


def _add_distribution(files: dict[str, Path], texts: dict[str, str], dist: Distribution) -> None:
    points = [point for point in dist.entry_points if point.group in _GROUPS]
    modules = {point.module.split(".")[0] for point in points}
    if any(file.suffix == ".py" for file in dist.files or ()):  # not an editable install
        tops = {file.parts[0] for file in dist.files or () if file.suffix == ".py"}
        modules |= {top.removesuffix(".py") for top in tops if top != ".."} - {"rayrl", "tests"}
    for module in sorted(modules):
        _add_module(files, module)
    groups = {
        group: {point.name: point.value for point in points if point.group == group}
        for group in _GROUPS
    }
    head = "\n".join(
        line
        for line in (dist.read_text("METADATA") or "").splitlines()
        if line.startswith(("Metadata-Version:", "Name:", "Version:", "Requires-Dist:"))
    )
    _add_metadata(texts, dist.metadata["Name"], dist.version, head, groups)


def _add_metadata(
    texts: dict[str, str],
    name: str,
    version: str,
    head: str,
    groups: Mapping[str, Mapping[str, str]],
) -> None:
    entries = "\n".join(
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    )
    folder = f"{_normal(name).replace('-', '_')}-{version}.dist-info"
    texts[f"{folder}/METADATA"] = f"{head}\n"
    texts[f"{folder}/entry_points.txt"] = f"{entries}\n"


def _add_module(files: dict[str, Path], name: str) -> bool:
    """Plan to copy a top-level package or module once; return whether it exists."""
    if f"{name}.py" in files or any(file.startswith(f"{name}/") for file in files):
        return True
    spec = importlib.util.find_spec(name)
    if spec is None:
        return False
    for location in spec.submodule_search_locations or ():
        _add(files, name, Path(location))
    if spec.submodule_search_locations is None and spec.has_location and spec.origin:
        _add(files, Path(spec.origin).name, Path(spec.origin))
    return True


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
