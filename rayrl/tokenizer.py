"""Hugging Face's fast tokenizers, as `chat.py` needs them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["byte_level", "copy_of", "load_tokenizer", "mere_text", "name_of"]

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # `tokenizer_class` of no model's own


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer without a class of its own does not need AutoTokenizer, which imports torch.

    That would cost every env host 260 MB and 2 s of a core.
    """
    import transformers

    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if settings.get("tokenizer_class") in _GENERIC:
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@functools.cache
def byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for, as GPT-2 laid down."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + k): b for k, b in enumerate(hidden)}


def copy_of(backend: Any) -> Any:
    """A copy of a tokenizer's backend that neither cuts nor pads."""
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def mere_text(backend: Any, state: Mapping[str, Any]) -> Any:
    """A backend made from `state` for which special tokens in a text are text."""
    copy = type(backend).from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return copy


def name_of(tokenizer: Any) -> str:
    """What errors call a tokenizer."""
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
