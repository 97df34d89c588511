"""The YAML that configurations are composed of: where it is and what can be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayrl.errors import ConfigError, did_you_mean

__all__ = ["check_option", "conf_dir", "is_no_option", "options"]


def conf_dir() -> Path:
    """The folder of the YAML that ships with rayrl: in the package, or beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "conf", here / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"conf/ was not installed with rayrl (looked beside {here}); reinstall it.")


def options(group: str, folders: Sequence[Path]) -> list[str]:
    """Names of the files of a group, in any of the folders."""
    return sorted({path.stem for folder in folders for path in folder.glob(f"{group}/*.yaml")})


def is_no_option(group: str, value: Any, folders: Sequence[Path]) -> bool:
    """Whether a value of a group's name is something else than one of its files."""
    if value is None or isinstance(value, list | dict):
        return False
    return value not in options(group, folders)


def check_option(group: str, value: Any, folders: Sequence[Path]) -> None:
    """Raise ConfigError if there is no such file."""
    known = options(group, folders)
    if value is None or value in known:
        return
    if not isinstance(value, str):
        raise ConfigError(f"{group}={value}: choose one of {', '.join(known)}.")
    if group == "env" and not {*value}.isdisjoint(":./"):  # a reference, as of a file or a scheme
        raise ConfigError(
            f"env={value}: env chooses a file of conf/env ({', '.join(known)}). Any other "
            f"environment is named: env.name={value}."
        )
    near = did_you_mean(value, known)
    raise ConfigError(
        f"{group}={value}: there is no conf/{group}/{value}.yaml.{near} "
        f"There are: {', '.join(known)}."
    )
