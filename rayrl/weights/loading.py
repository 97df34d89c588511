"""Load models and learners' states from files; no other module reads weight files.

transformers initializes weights that a checkpoint lacks at random, drops those it does not know,
and only warns. Here a checkpoint that does not match its architecture is refused. Weights that
transformers itself converts (experts saved one by one), ties or ignores by name are accepted.

A learner's state is read as tensors and plain data only: no file of a checkpoint can run code.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
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

from rayrl.errors import ConfigError, DataError
from rayrl.weights.model_dir import explain_load_error

__all__ = ["check_weights", "load_causal_lm", "read_state", "stored_names"]

NAMED = 3  # weights of each kind listed in an error
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or these names with .index.json

_log = logging.getLogger(__name__)


def load_causal_lm(
    path: str | Path, *, dtype: torch.dtype, attention: str | None = None, **options: Any
) -> Any:
    """Load the causal LM in the Hugging Face directory `path`, on the CPU, in evaluation mode.

    Args:
        dtype: dtype of the loaded weights.
        attention: transformers' name of an attention implementation; None for its default.
        options: further arguments of `from_pretrained`.

    Raises:
        ConfigError: the directory cannot be read, needs its own Python code, or its weights do not
            match its architecture; the error lists some of them.
    """
    disable_progress_bar()
    with _loading_errors(path):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, all together
            **options,
        )
    _refuse_mismatches(path, model, report)
    for target, source in _untied_pairs(model):
        raise _tie_conflict(path, target, source)
    return model


def check_weights(path: str | Path) -> None:
    """Raise what `load_causal_lm` would raise, reading only the headers of the weight files.

    For engines that load the model themselves. Skipped for architectures without a causal LM in
    transformers, for quantized weights (their names differ), and without accelerate installed.
    """
    folder = Path(path)
    with _loading_errors(folder):
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        files = _weight_files(folder)
    if settings.get("model_type") not in CONFIG_MAPPING or "quantization_config" in settings:
        return
    if not files or not is_accelerate_available():
        _log.info("skipping the check of the weights in %s before they are loaded", folder)
        return
    disable_progress_bar()
    with _loading_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return
        with torch.device("meta"):
            architecture = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model, report = type(architecture).from_pretrained(
            None,
            config=architecture.config,
            state_dict=_headers(files),
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _refuse_mismatches(path, model, report)
    for pair in _untied_pairs(model):  # on "meta" a pair that is stored twice looks untied
        target, source = (_read_tensor(files, name) for name in pair)
        if target is not None and source is not None and not torch.equal(target, source):
            raise _tie_conflict(path, *pair)


def stored_names(folder: Path) -> set[str]:
    """Return the names of the weights stored in a Hugging Face directory."""
    return set(_headers(_weight_files(folder)))


@contextmanager
def _loading_errors(path: str | Path) -> Iterator[None]:
    """Raise errors in the block as ConfigError.

    transformers logs a table of the weights it could not convert, and warnings about untied
    weights. Both become errors here, so neither is printed.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level, effective_level = logger.level, logger.getEffectiveLevel()
    unconverted: list[str] = []

    def collect_unconverted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        unconverted.extend(re.findall(r"^(\S.*?)\s+\| CONVERSION", text, re.MULTILINE))
        handled_here = re.search("LOAD REPORT|tied weights mapping", text)
        return handled_here is None and record.levelno >= effective_level

    logger.addFilter(collect_unconverted)
    if effective_level > logging.WARNING:  # the filter must see warnings; else leave it
        logger.setLevel(logging.WARNING)
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        if unconverted:
            raise ConfigError(
                f"model.path={path}: some weights cannot be converted to the architecture's layout "
                f"({_abbreviate(unconverted)}), for example because one of several experts is "
                f"missing. {_REMEDY}"
            ) from error
        raise ConfigError(
            f"model.path={path}: cannot be loaded: {explain_load_error(error)}"
        ) from error
    finally:
        logger.removeFilter(collect_unconverted)
        logger.setLevel(level)


_REMEDY = "Download or convert the model again, or save it together with its own config.json."


def _refuse_mismatches(path: str | Path, model: Any, report: dict[str, Any]) -> None:
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = [
        f"{name} {list(stored)} instead of {list(expected)}"
        for name, stored, expected in sorted(report["mismatched_keys"])
    ]
    kinds = ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
    parts = [f"{len(names)} {kind} ({_abbreviate(names)})" for names, kind in kinds if names]
    if parts:
        raise ConfigError(
            f"model.path={path}: its weights do not match {type(model).__name__}, the "
            f"architecture in its config.json: {', '.join(parts)}. "
            f"{_wrapper_hint(missing, unknown) or _REMEDY}"
        )


def _wrapper_hint(missing: list[str], unknown: list[str]) -> str:
    """Return the remedy for names that carry the prefix of a wrapper, or an empty string."""
    for name in unknown[:1]:
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in missing:
                prefix = name[: dot.end()]
                return (
                    f"Names begin with {prefix!r}, as if the model was saved while wrapped "
                    "(torch.compile, DistributedDataParallel, peft); save the inner model instead."
                )
    return ""


def _untied_pairs(model: Any) -> Iterator[tuple[str, str]]:
    """Yield (target, source) weights that the architecture ties but the checkpoint has separate."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source):
            yield target, source


def _tie_conflict(path: str | Path, target: str, source: str) -> ConfigError:
    return ConfigError(
        f"model.path={path}: its config.json ties {target} to {source}, but both are stored and "
        "differ, so engines would disagree about the model; set tie_word_embeddings to false in "
        f"config.json if both are intended, or remove {target}."
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads; empty if they have other names."""
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
    """Return the stored weights by name, as tensors on the "meta" device."""
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= load_state_dict(file, map_location="meta")
    return stored


def _read_tensor(files: Iterable[Path], name: str) -> Tensor | None:
    for file in files:
        if name in _headers([file]):
            tensor: Tensor = load_state_dict(file)[name]
            return tensor
    return None


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def read_state(
    file: str | Path, map_location: Any = "cpu", known: Sequence[type[Any]] = ()
) -> dict[str, Any]:
    """Load what `torch.save` wrote.

    Args:
        file: of a checkpoint.
        map_location: as `torch.load`'s.
        known: classes it may hold besides tensors and plain data.

    Raises:
        DataError: it is damaged, or names something else to be imported.
    """
    try:
        with torch.serialization.safe_globals(list(known)):
            state: dict[str, Any] = torch.load(file, map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it wants to import {foreign[1]}" if foreign else repr(error)[:200]
        raise DataError(
            f"{file}: not a state that a learner saved ({why}). Remove the checkpoint it belongs "
            "to, and the run goes on from the one before."
        ) from error
    return state
