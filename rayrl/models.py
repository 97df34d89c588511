"""Where a model's files are."""

from __future__ import annotations

from pathlib import Path

from rayrl.errors import ConfigError

__all__ = ["EMBEDDED", "model_dir", "model_name"]

EMBEDDED = "embedded"  # what `model.path` calls the base that ships with rayrl


def model_dir(path: str) -> Path:
    """The Hugging Face directory that `model.path` means, absolute.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(__file__).resolve().parent / "base" if path == EMBEDDED else Path(path).resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path={path}: {folder} has no config.json; give a Hugging Face model directory, "
            f"{EMBEDDED!r} for the base that ships with rayrl, or fetch one: rayrl model fetch "
            "smollm2-135m."
        )
    return folder


def model_name(path: str) -> str:
    """What processes on any node are to call the model that `model.path` means here.

    The base travels with the code, which may lie elsewhere there; other models are on storage that
    all nodes share.

    Raises:
        ConfigError: there is none.
    """
    folder = model_dir(path)
    return EMBEDDED if path == EMBEDDED else str(folder)
