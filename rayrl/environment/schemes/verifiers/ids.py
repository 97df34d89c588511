"""What IDs of verifiers stand for: modules, files, virtual environments."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rayrl.config.registry import absolute

__all__ = ["interpreter", "is_builtin", "is_taskset", "module_name", "source_file"]


def module_name(name: str) -> str:
    """What the module of an environment is called, as verifiers finds it."""
    last = name.rstrip("/").split("/")[-1]
    return (last.removesuffix(".py") if last.endswith(".py") else last.partition("@")[0]).replace(
        "-", "_"
    )


def source_file(name: str) -> Path | None:
    """The file that an ID names: itself, or that of its name in its folder."""
    file = Path(absolute(name))
    if name.endswith(".py"):
        return file
    module = module_name(name)
    found = (file / f"{module}.py", file / module / "__init__.py", file / "__init__.py")
    return next((one for one in found if one.is_file()), None)


def is_taskset(name: str) -> bool:
    """Whether an ID's source is one for verifiers' v1 interface, without running any of it."""
    file = source_file(name)
    if file is None:
        try:
            spec = importlib.util.find_spec(module_name(name))
        except (ImportError, ValueError):
            return False
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return False
        file = Path(spec.origin)
    files = file.parent.rglob("*.py") if file.name == "__init__.py" else [file]
    texts = [one.read_text("utf-8", "replace") for one in files if one.is_file()]
    # `load_environment` is what v0 calls
    return any("verifiers.v1" in text for text in texts) and not any(
        "def load_environment" in text for text in texts
    )


def is_builtin(name: str) -> bool:
    """Whether verifiers, as it is installed here, has a taskset of that name itself."""
    spec = importlib.util.find_spec("verifiers")  # what it has inside would be imported
    places = spec.submodule_search_locations if spec is not None else None
    return any(Path(one, "v1", "tasksets", module_name(name)).is_dir() for one in places or ())


def interpreter(place: str) -> Path:
    """The Python of a virtual environment, or the one that is given.

    Links stay: a virtual environment is found by where its `python` lies, not by what that is.
    """
    path = Path(absolute(str(Path(place).parent))) / Path(place).name
    return path / "bin" / "python" if path.is_dir() else path
