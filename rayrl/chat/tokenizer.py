"""Hugging Face's fast tokenizers, as `renderer.py` needs them."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import secrets
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "TextTokenizer",
    "byte_level",
    "control_ids",
    "copy_of",
    "load_tokenizer",
    "longest_token",
    "name_of",
]

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # `tokenizer_class` of no model's own


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer without a class of its own does not need AutoTokenizer, which imports torch.

    That would cost every env worker 260 MB and 2 s of a core.
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


def name_of(tokenizer: Any) -> str:
    """What errors call a tokenizer."""
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def control_ids(backend: Any, turns: str, tool_talk: str, end: str) -> set[int]:
    """Ids that structure a conversation, which no text may become.

    These are the special tokens, and of the others those that the template writes as markup: some
    tokenizers do not mark them as special, or have them only in the model's vocabulary. Added
    tokens that are words, white space or single characters ("user", "\\n") are ordinary text.

    Args:
        turns: conversations as the template writes them.
        tool_talk: the same with tools.
        end: what the template writes after a reply; its first token ends a turn, whatever it is.
    """
    added = backend.get_added_tokens_decoder()
    found = {
        one
        for one, token in added.items()
        if token.special or (_is_markup(token.content) and token.content in turns + tool_talk)
    }
    for mark in _bracketed(turns):
        ids = _ids(backend, mark)
        found |= {backend.token_to_id(mark), ids[0] if len(ids) == 1 else None} - {None}
    return found | {one for one in _ids(backend, end)[:1] if one in added}


def _is_markup(token: str) -> bool:
    return len(token) > 1 and not all(c.isalnum() or c.isspace() for c in token)


def _bracketed(text: str) -> Iterator[str]:
    """Words in brackets of any kind, brackets included."""
    kinds = [unicodedata.category(c) for c in text]
    for word in re.finditer(r"\S+", text):
        opens = [k for k in range(*word.span()) if text[k] in "<|" or kinds[k] in ("Ps", "Pi")]
        closes = [k for k in range(*word.span()) if text[k] in ">|" or kinds[k] in ("Pe", "Pf")]
        for first, last in itertools.product(opens, closes):
            piece = text[first : last + 1]
            if any(map(str.isalnum, piece)):
                yield piece


def _ids(backend: Any, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


class TextTokenizer:
    """A tokenizer whose control tokens no text can name.

    In a copy of the backend every control token is called otherwise, by a name that is drawn for
    this process and that nobody outside of it knows. Its id stays, and whatever else the tokenizer
    does. So a text is encoded as ever, except that a control token written in it is only text,
    also where the vocabulary of the model has it as a piece; and what a template writes is encoded
    with the contents in it, in one piece, once its own control tokens have their names.

    Args:
        backend: of the tokenizer.
        control: the ids to hide.
        reserved: control tokens that have a meaning besides that of unknown characters. Where one
            of them stands for these too, they are left out, as by a BPE without such a token.
    """

    def __init__(
        self, backend: Any, control: Collection[int], reserved: Collection[str] = ()
    ) -> None:
        state = json.loads(backend.to_str())
        visible = [
            token["content"] for token in state["added_tokens"] if token["id"] not in control
        ]
        self.control = frozenset(control)
        self.names = dict(zip(sorted(control), _names(len(control), visible), strict=True))
        self._backend = backend
        self._unknown = _rename(state, self.names)
        means_more = self._unknown is not None and backend.id_to_token(self._unknown) in reserved
        self._left_out = self._unknown if means_more else None
        self._renamed = type(backend).from_str(json.dumps(state))

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text; control ids come from their names only."""
        ids: list[int] = self._renamed.encode(text, add_special_tokens=False).ids
        if self._left_out in ids:
            ids = [one for one in ids if one != self._left_out]
        return tuple(ids)

    def named(self, text: str) -> str:
        """What a template wrote, with its control tokens by their names."""
        parts, done = [], 0
        for one, start, end in self._written(text):
            parts += [text[done:start], self.names[one]]
            done = end
        return "".join([*parts, text[done:]])

    def controls_in(self, text: str) -> list[int]:
        """The control ids of what a template wrote, in order."""
        return [one for one, _, _ in self._written(text)]

    def _written(self, text: str) -> Iterator[tuple[int, int, int]]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        for one, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            unknown = one == self._unknown and self._backend.id_to_token(one) not in text[start:end]
            if one in self.control and not unknown:
                yield one, start, end


def _names(count: int, visible: Collection[str]) -> list[str]:
    """Names that no text can have in it by intent or by chance.

    They are letters that normalisers leave alone. None begins where a visible token may end, which
    would be found before it; none is the beginning of another; none ends with a letter that a
    combining mark after it could change ("q" has no such composition).
    """
    taken = set("".join(visible))
    letters = (chr(point) for point in range(ord("a"), 0x3000))
    first = next(c for c in letters if c.isalpha() and c.islower() and c not in taken)
    secret = first + "".join(secrets.choice("bcdfghjklm") for _ in range(40))
    width = len(str(count))
    return [
        secret
        + f"{index:0{width}}".translate(dict(zip(b"0123456789", "bcdfghjklm", strict=True)))
        + "q"
        for index in range(count)
    ]


def _rename(state: dict[str, Any], names: Mapping[int, str]) -> int | None:
    """Call tokens otherwise in a backend's state; returns the id of unknown characters."""
    added, model = state["added_tokens"], state["model"]
    for token in added:
        token["content"] = names.get(token["id"], token["content"])
    known = {token["id"] for token in added}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added += [
        {"id": one, "content": name, **flags, "special": True}
        for one, name in names.items()
        if one not in known
    ]
    added.sort(key=lambda token: token["id"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # of a Unigram: pieces with their scores
        for one, name in names.items():
            if one < len(vocabulary):
                vocabulary[one][0] = name
        unknown: int | None = model["unk_id"]
        return unknown
    unknown = vocabulary.get(model["unk_token"])
    gone = {piece: names[one] for piece, one in vocabulary.items() if one in names}
    model["vocab"] = {gone.get(piece, piece): one for piece, one in vocabulary.items()}
    model["unk_token"] = gone.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = len(model["continuing_subword_prefix"] or "")
        model["merges"] = list(_without(model["merges"], gone, prefix))
    return unknown


def _without(merges: Iterable[Any], gone: Mapping[str, str], prefix: int) -> Iterable[Any]:
    """The merges of a BPE that neither use nor make one of the pieces."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not (left in gone or right in gone or left + right[prefix:] in gone):
            yield merge
