"""Tiny tokenizers of every kind, trained on the spot, with control tokens wherever they may be."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from tests.act import TRAINING_TEXT

__all__ = ["KINDS", "PLACES", "WORDS", "Control", "built"]

KINDS = (
    "byte_bpe",
    "byte_bpe_spaced",
    "byte_unigram",
    "byte_bpe_whole_words",
    "spm_bpe_always",
    "spm_bpe_first",
    "spm_bpe_prepend",
    "spm_unigram_always",
    "spm_unigram_first",
    "spm_unigram_words",
    "nfkc_unigram",
    "nfkc_byte_bpe",
    "wordpiece",
    "wordlevel",
)
PLACES = ("special", "added", "vocabulary", "piece")


@dataclass(frozen=True)
class Control:
    """The tokens that begin and end a turn."""

    begin: str
    end: str


WORDS = (
    Control("<|im_start|>", "<|im_end|>"),
    Control("<｜User｜>", "<｜end▁of▁turn｜>"),
    Control("<s>", "</s>"),
    Control("[INST]", "[/INST]"),
    Control("«début»", "«fin»"),
)


def _trained(kind: str, texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    quiet: dict[str, Any] = {"show_progress": False, "special_tokens": ["<unk>"]}
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        trainer: Any = trainers.WordPieceTrainer(vocab_size=500, **quiet)
    elif kind == "wordlevel":
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=500, **quiet)
    elif "unigram" in kind:
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **quiet)
    else:
        backend = Tokenizer(models.BPE(unk_token=None))
        trainer = trainers.BpeTrainer(vocab_size=700, **quiet)
    if "byte" in kind:
        whole = kind in ("byte_bpe_whole_words", "byte_unigram")
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=kind == "byte_bpe_spaced", use_regex=not whole
        )
        backend.decoder = decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "spm_bpe_prepend":  # as Llama 2 was converted
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    elif kind.startswith("spm") or kind == "nfkc_unigram":
        scheme = "first" if kind.endswith("first") else "always"
        space = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
        backend.pre_tokenizer = words if kind.endswith("words") else space
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
        )
    if kind.startswith("nfkc"):
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.train_from_iterator(texts, trainer)
    return backend


def _with_pieces(backend: Any, kind: str, pieces: list[str]) -> Any:
    """The same with more pieces in the vocabulary; SentencePiece's models get bytes, too."""
    state = json.loads(backend.to_str())
    model = state["model"]
    if kind.startswith("spm"):
        model["byte_fallback"] = True
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    if isinstance(model["vocab"], list):
        known = {piece for piece, _ in model["vocab"]}
        model["vocab"] += [
            [piece, 0.0 if piece[:3] != "<0x" else -9.0] for piece in pieces if piece not in known
        ]
    else:
        for piece in pieces:
            model["vocab"].setdefault(piece, len(model["vocab"]))
        if kind == "byte_bpe_whole_words":
            model["ignore_merges"] = True
    return type(backend).from_str(json.dumps(state))


@functools.cache
def built(kind: str, place: str, control: Control, template: str) -> Any:
    """A tokenizer of transformers.

    Args:
        kind: one of `KINDS`.
        place: where the control tokens are: "special" or "added" (not special), beside the model's
            vocabulary; "vocabulary": special, and pieces of it as well; "piece": only pieces of it,
            but for the end of turn.
        template: of a chat.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    words = [control.begin, control.end]
    inside = place in ("vocabulary", "piece")
    texts = TRAINING_TEXT + ([f"{w} {w}{w}" for w in words] * 40 if inside else [])
    backend = _trained(kind, texts)
    backend = _with_pieces(backend, kind, words if inside else [])
    for word in words if place != "piece" else [control.end]:
        added = AddedToken(word, special=place != "added", normalized=False)
        backend.add_special_tokens([added]) if place != "added" else backend.add_tokens([added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    if place != "added":
        tokenizer.eos_token = control.end
    tokenizer.chat_template = template
    return tokenizer
