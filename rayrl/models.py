"""Where a model's files are."""

from __future__ import annotations

from pathlib import Path

from rayrl.errors import ConfigError

__all__ = ["EMBEDDED", "model_dir"]

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
