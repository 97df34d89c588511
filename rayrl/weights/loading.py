"""Hugging Face directories as models: the one place that reads weights.

transformers fills in what a checkpoint lacks with random numbers, leaves out what it does not know,
and says so in a warning. Here a checkpoint fits its architecture or is refused. What transformers
itself converts (experts that were saved one by one), ties or ignores by name is no misfit.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import is_accelerate_available
from transformers.utils.logging import disable_progress_bar

from rayrl.errors import ConfigError
from rayrl.weights.model_dir import why_unreadable

__all__ = ["check_weights", "load_causal_lm", "stored_names"]

NAMED = 3  # weights of each kind that an error names
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or these names with .index.json

_log = logging.getLogger(__name__)


def load_causal_lm(
    path: str | Path, *, dtype: torch.dtype, attention: str | None = None, **reading: Any
) -> Any:
    """The causal LM in the Hugging Face directory `path`, on the CPU, in evaluation mode.

    Args:
        dtype: of the weights.
        attention: transformers' name of an attention implementation; None: what it would choose.
        reading: further arguments of `from_pretrained`.

    Raises:
        ConfigError: the directory cannot be read, needs code of its own, or its weights are not
            those of its architecture; some of them are named.
    """
    disable_progress_bar()
    with _read(path):
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # all of them are named below, not the first alone
            **reading,
        )
    _refuse_misfits(path, model, found)
    for pair in _not_tied(model):
        raise _torn(path, *pair)
    return model


def check_weights(path: str | Path) -> None:
    """Raise what `load_causal_lm` would raise, from the headers of the weight files alone.

    For engines that load by themselves. Says nothing of what transformers has no causal LM for,
    nor of quantized weights, which have names of their own; nor where accelerate is not installed.
    """
    folder = Path(path)
    with _read(folder):
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        files = _weight_files(folder)
    if settings.get("model_type") not in CONFIG_MAPPING or "quantization_config" in settings:
        return
    if not files or not is_accelerate_available():
        _log.info("the weights of %s are not checked before they are loaded", folder)
        return
    disable_progress_bar()
    with _read(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return
        with torch.device("meta"):
            architecture = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model, found = type(architecture).from_pretrained(
            None,
            config=architecture.config,
            state_dict=_headers(files),
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _refuse_misfits(path, model, found)
    for pair in _not_tied(model):  # without their numbers, two that are both stored look like this
        one, other = (_tensor(files, name) for name in pair)
        if one is not None and other is not None and not torch.equal(one, other):
            raise _torn(path, *pair)


def stored_names(folder: Path) -> set[str]:
    """Names of the weights in the files of a Hugging Face directory."""
    return set(_headers(_weight_files(folder)))


@contextmanager
def _read(path: str | Path) -> Iterator[None]:
    """Errors in the block as ConfigError.

    transformers names weights that it could not convert in a table that it logs. Neither that nor
    its warnings of weights that are not tied are shown: here they are errors.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level, shown = logger.level, logger.getEffectiveLevel()
    names: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        names.extend(re.findall(r"^(\S.*?)\s+\| CONVERSION", text, re.MULTILINE))
        told = re.search("LOAD REPORT|tied weights mapping", text)
        return told is None and record.levelno >= shown

    logger.addFilter(keep)
    if shown > logging.WARNING:  # else left alone: at a level of its own it tells more
        logger.setLevel(logging.WARNING)
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        if names:
            raise ConfigError(
                f"model.path={path}: some weights cannot be brought into the form that the "
                f"architecture has ({_few(names)}), as when one of several experts is missing. "
                f"{_REMEDY}"
            ) from error
        raise ConfigError(
            f"model.path={path}: cannot be loaded: {why_unreadable(error)}"
        ) from error
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


_REMEDY = "Download or convert the model again, or save it with the config.json that it belongs to."


def _refuse_misfits(path: str | Path, model: Any, found: dict[str, Any]) -> None:
    missing, unknown = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = [
        f"{name} {list(stored)} instead of {list(wanted)}"
        for name, stored, wanted in sorted(found["mismatched_keys"])
    ]
    kinds = ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
    parts = [f"{len(names)} {kind} ({_few(names)})" for names, kind in kinds if names]
    if parts:
        raise ConfigError(
            f"model.path={path}: its weights are not those of {type(model).__name__}, the "
            f"architecture in its config.json: {', '.join(parts)}. "
            f"{_prefix_note(missing, unknown) or _REMEDY}"
        )


def _prefix_note(missing: list[str], unknown: list[str]) -> str:
    """What to do if all is there, but under names that a wrapper has put something before."""
    known = set(missing)
    for name in unknown[:1]:
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in known:
                prefix = name[: dot.end()]
                return (
                    f"Names begin with {prefix!r}, as of a model that was saved while it was "
                    "wrapped (torch.compile, DistributedDataParallel, peft); save the model inside."
                )
    return ""


def _not_tied(model: Any) -> Iterator[tuple[str, str]]:
    """Pairs of weights that the architecture ties, but that were both stored and are not one."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source):
            yield target, source


def _torn(path: str | Path, target: str, source: str) -> ConfigError:
    return ConfigError(
        f"model.path={path}: its config.json ties {target} to {source}, but both are stored and "
        "differ, so that engines would disagree about the model; set tie_word_embeddings to false "
        f"in config.json if both are meant, or remove {target}."
    )


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads weights from; none where they have other names."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return sorted(
                {folder / file for file in json.loads(index.read_text())["weight_map"].values()}
            )
    return []


def _headers(files: Iterable[Path]) -> dict[str, Tensor]:
    """Their weights by name, without numbers."""
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= load_state_dict(file, map_location="meta")
    return stored


def _tensor(files: Iterable[Path], name: str) -> Tensor | None:
    for file in files:
        if name in _headers([file]):
            found: Tensor = load_state_dict(file)[name]
            return found
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
