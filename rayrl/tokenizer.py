"""Hugging Face's fast tokenizers, as `chat.py` needs them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["byte_level", "copy_of", "load_tokenizer", "longest_token", "mere_text", "name_of"]

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
    return transformers.AutoTokenizer.from_pretrained(folder)


@functools.cache
def byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for, as GPT-2 laid down."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + k): b for k, b in enumerate(hidden)}


def longest_token(state: Mapping[str, Any]) -> int:
    """How many characters of a text one id stands for at most; 0 where there is no such number.

    So a text has at least so many ids for its length, which is known before it is tokenized.

    Args:
        state: of a backend. There is no such number where a text is changed before it is cut up
            (white space that is dropped, say), or where one id stands for all that is unknown.
    """
    model, vocab = state["model"], state["model"].get("vocab", {})
    tokens = set(vocab if isinstance(vocab, dict) else [entry[0] for entry in vocab])
    factor = _shrinks(state.get("normalizer"))
    known = set(byte_level()) if "ByteLevel" in json.dumps(state.get("pre_tokenizer")) else None
    if known is None and model.get("byte_fallback"):
        known = {f"<0x{byte:02X}>" for byte in range(256)}
    added = state.get("added_tokens", [])
    greedy = any(token.get("lstrip") or token.get("rstrip") for token in added)
    if not factor or greedy or known is None or not known <= tokens:
        return 0
    return factor * max(map(len, [*tokens, *(token["content"] for token in added)]))


def _shrinks(normalizer: Mapping[str, Any] | None) -> int:
    """How many characters a normalizer makes one of, at most; 0 where that is not known."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        return math.prod(map(_shrinks, normalizer["normalizers"]))
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String")
        return int(pattern is not None and len(pattern) <= len(normalizer["content"]))
    return {"Prepend": 1, "NFC": 4}.get(kind, 0)  # no composed character has more than four


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
