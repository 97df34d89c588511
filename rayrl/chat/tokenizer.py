"""Load Hugging Face's fast tokenizers, render their templates, keep text from being controls."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import secrets
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayrl.types import Message

__all__ = [
    "TextTokenizer",
    "byte_level_alphabet",
    "control_ids",
    "copy_backend",
    "fold",
    "gap_before_eos",
    "load_tokenizer",
    "max_token_chars",
    "render",
    "tokenizer_name",
    "without_punctuation",
]

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # not a model's own `tokenizer_class`


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer, without AutoTokenizer unless it has a class of its own.

    AutoTokenizer imports torch, which costs every env worker 260 MB and 2 s of a core.
    """
    import transformers

    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if settings.get("tokenizer_class") in _GENERIC:
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@functools.cache
def byte_level_alphabet() -> dict[str, int]:
    """Return the byte for each character of a byte-level token, as defined by GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


def max_token_chars(state: Mapping[str, Any]) -> int:
    """Return the maximum number of characters per id, or 0 if there is no such bound.

    It bounds a text's number of ids from below without tokenizing it. There is no bound if text is
    changed before it is split (for example if white space is dropped), or if one id stands for any
    unknown character.

    Args:
        state: state of a tokenizer's backend.
    """
    model, vocab = state["model"], state["model"].get("vocab", {})
    tokens = set(vocab if isinstance(vocab, dict) else [entry[0] for entry in vocab])
    factor = _max_shrinkage(state.get("normalizer"))
    alphabet: set[str] | None = None
    if "ByteLevel" in json.dumps(state.get("pre_tokenizer")):
        alphabet = set(byte_level_alphabet())
    elif model.get("byte_fallback"):
        alphabet = {f"<0x{byte:02X}>" for byte in range(256)}
    added = state.get("added_tokens", [])
    strips = any(token.get("lstrip") or token.get("rstrip") for token in added)
    if not factor or strips or alphabet is None or not alphabet <= tokens:
        return 0
    return factor * max(map(len, [*tokens, *(token["content"] for token in added)]))


def _max_shrinkage(normalizer: Mapping[str, Any] | None) -> int:
    """Return the most characters that a normalizer maps to one; 0 if unknown."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        return math.prod(map(_max_shrinkage, normalizer["normalizers"]))
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String")
        return int(pattern is not None and len(pattern) <= len(normalizer["content"]))
    return {"Prepend": 1, "NFC": 4}.get(kind, 0)  # no composed character has more than four


def copy_backend(backend: Any) -> Any:
    """Copy a tokenizer's backend, without truncation and padding."""
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def tokenizer_name(tokenizer: Any) -> str:
    """Return a tokenizer's name for error messages."""
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def control_ids(backend: Any, turns: str, tool_turns: str, end: str) -> set[int]:
    """Return the ids that structure a conversation, which text must never produce.

    These are the special tokens, and other tokens that the template uses as markup: some tokenizers
    do not mark them as special, or have them only in the model's vocabulary. Added tokens that are
    words, white space or single characters ("user", "\\n") are ordinary text.

    Args:
        turns: conversations as rendered by the template.
        tool_turns: a conversation with tool calls, likewise.
        end: what the template writes after a reply; if it starts with an added token, that token
            ends a turn and counts.
    """

    def ids_of(text: str) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    added = backend.get_added_tokens_decoder()
    control = {
        token_id
        for token_id, token in added.items()
        if token.special or (_is_markup(token.content) and token.content in turns + tool_turns)
    }
    for word in _bracketed(turns):
        ids = ids_of(word)
        control |= {backend.token_to_id(word), ids[0] if len(ids) == 1 else None} - {None}
    return control | {token_id for token_id in ids_of(end)[:1] if token_id in added}


def _is_markup(token: str) -> bool:
    return len(token) > 1 and not all(c.isalnum() or c.isspace() for c in token)


def _bracketed(text: str) -> Iterator[str]:
    """Yield words in brackets of any kind, brackets included."""
    categories = [unicodedata.category(c) for c in text]
    for word in re.finditer(r"\S+", text):
        span = range(*word.span())
        opening = [k for k in span if text[k] in "<|" or categories[k] in ("Ps", "Pi")]
        closing = [k for k in span if text[k] in ">|" or categories[k] in ("Pe", "Pf")]
        for first, last in itertools.product(opening, closing):
            bracketed = text[first : last + 1]
            if any(map(str.isalnum, bracketed)):
                yield bracketed


class TextTokenizer:
    """A tokenizer whose control tokens cannot be written as text.

    In a copy of the backend every control token is renamed to a random name that is secret to this
    process; ids and everything else stay. Text is encoded as before, except that a control token
    written in it is plain text, even if the model's vocabulary has it as a piece. A rendered
    template is encoded together with the contents, as one text, after `rename_controls` has renamed
    its own control tokens.

    Args:
        backend: the tokenizer's backend.
        control: the ids to rename.
        reserved: control tokens with a meaning besides "unknown character". If one of them is also
            the unknown token, unknown characters are dropped, as by a BPE without such a token.
    """

    def __init__(
        self, backend: Any, control: Collection[int], reserved: Collection[str] = ()
    ) -> None:
        state = json.loads(backend.to_str())
        visible = [
            token["content"] for token in state["added_tokens"] if token["id"] not in control
        ]
        self.control = frozenset(control)
        self.names = dict(zip(sorted(control), _secret_names(len(control), visible), strict=True))
        self._backend = backend
        self._unknown = _rename_tokens(state, self.names)
        ambiguous = self._unknown is not None and backend.id_to_token(self._unknown) in reserved
        self._dropped = self._unknown if ambiguous else None
        self._renamed = type(backend).from_str(json.dumps(state))

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode a text; only the secret names produce control ids."""
        ids: list[int] = self._renamed.encode(text, add_special_tokens=False).ids
        if self._dropped in ids:
            ids = [token_id for token_id in ids if token_id != self._dropped]
        return tuple(ids)

    def rename_controls(self, text: str) -> str:
        """Replace the control tokens in a rendered template by their secret names."""
        parts, done = [], 0
        for token_id, start, end in self._controls(text):
            parts += [text[done:start], self.names[token_id]]
            done = end
        return "".join([*parts, text[done:]])

    def controls_in(self, text: str) -> list[int]:
        """Return the control ids of a rendered template, in order."""
        return [token_id for token_id, _, _ in self._controls(text)]

    def _controls(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield (id, start, end) of each control token in a rendered template."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            token = self._backend.id_to_token(token_id)
            is_unknown = token_id == self._unknown and token not in text[start:end]
            if token_id in self.control and not is_unknown:
                yield token_id, start, end


def _secret_names(count: int, visible: Collection[str]) -> list[str]:
    """Draw names that no text contains on purpose or by chance.

    They consist of letters that normalizers leave unchanged. None begins with a character of a
    visible token, which could be matched across its start; none is a prefix of another; none ends
    with a letter that a combining mark after it could change ("q" has no such composition).
    """
    used = set("".join(visible))
    letters = (chr(point) for point in range(ord("a"), 0x3000))
    first = next(c for c in letters if c.isalpha() and c.islower() and c not in used)
    secret = first + "".join(secrets.choice("bcdfghjklm") for _ in range(40))
    width = len(str(count))
    return [
        secret
        + f"{index:0{width}}".translate(dict(zip(b"0123456789", "bcdfghjklm", strict=True)))
        + "q"
        for index in range(count)
    ]


def _rename_tokens(state: dict[str, Any], names: Mapping[int, str]) -> int | None:
    """Rename tokens in a backend's state; returns the id of unknown characters."""
    added, model = state["added_tokens"], state["model"]
    for token in added:
        token["content"] = names.get(token["id"], token["content"])
    added_ids = {token["id"] for token in added}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added += [
        {"id": token_id, "content": name, **flags, "special": True}
        for token_id, name in names.items()
        if token_id not in added_ids
    ]
    added.sort(key=lambda token: token["id"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores
        for token_id, name in names.items():
            if token_id < len(vocabulary):
                vocabulary[token_id][0] = name
        unknown: int | None = model["unk_id"]
        return unknown
    unknown = vocabulary.get(model["unk_token"])
    renamed = {piece: names[i] for piece, i in vocabulary.items() if i in names}
    model["vocab"] = {renamed.get(piece, piece): i for piece, i in vocabulary.items()}
    model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = len(model["continuing_subword_prefix"] or "")
        merges = []  # without those that use or produce a renamed piece
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if renamed.keys().isdisjoint((left, right, left + right[prefix:])):
                merges.append(merge)
        model["merges"] = merges
    return unknown


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str | None:
    """Render messages up to the start of the model's reply; None if the template refuses them.

    Templates raise arbitrary exceptions for messages that they do not support.
    """
    data = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            data, tools=tools, add_generation_prompt=True, tokenize=False
        )
    except Exception:
        return None
    return str(text)


def fold(messages: Sequence[Message]) -> list[Message]:
    """Merge messages for templates without system messages, or whose roles must alternate.

    System messages become user messages, and consecutive messages of a role become one.
    """
    groups: list[list[Message]] = []
    for message in messages:
        if message.role == "system":
            message = replace(message, role="user")
        if groups and groups[-1][-1].role == message.role != "tool":
            groups[-1].append(message)
        else:
            groups.append([message])
    return [
        replace(group[-1], content="\n\n".join([message.content for message in group]))
        for group in groups
    ]


def gap_before_eos(after: str, tokenizer: Any) -> str:
    """Return the white space that a template writes between a reply and the end-of-text token.

    Args:
        after: what the template writes after a reply.
    """
    end = getattr(tokenizer, "eos_token", None)
    stripped = after.lstrip()
    return after[: len(after) - len(stripped)] if end and stripped.startswith(end) else ""


def without_punctuation(value: Any, tokens: Collection[str]) -> Any:
    """Replace punctuation, and strings that contain one of `tokens`, by "x" in JSON data.

    The structure stays, and so do all other words.
    """
    if isinstance(value, str):
        if any(token in value for token in tokens):
            return "x" * len(value)
        return "".join(c if c.isalnum() or c in " _" else "x" for c in value)
    if isinstance(value, Mapping):
        replaced = {}
        for index, (key, item) in enumerate(value.items()):
            word = without_punctuation(key, tokens)
            unique = key if word == key else f"{word}{index}"
            replaced[unique] = without_punctuation(item, tokens)
        return replaced
    if isinstance(value, list | tuple):
        return [without_punctuation(item, tokens) for item in value]
    return value
