"""The embedded model's tokenizer: whole phrases of the corpus, everything else byte by byte.

A small model spends its compute per token, so the fixed parts of the messages are one token each
(longer than words, as in SuperBPE, arXiv 2503.13423), a board cell is one token, and any other text
falls back to bytes, which also keeps copying and reversing letters well posed.
"""

from __future__ import annotations

import random
import re
from collections import Counter

from corpus import draw
from rayrl_tictactoe.board import LINES, SYSTEM
from rayrl_tictactoe.players import POLICIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONGEST = 40  # characters of a phrase
CELL = r"(?:\n| \| |, )?(?:\d|[XO](?= \||\n|$))"
TAGS = r"(?:</?[a-z_]+>)+"
NOTES = f"X: |; O: |none|{'|'.join(LINES)}"  # as in a player's thoughts
FIXED = re.compile(f"({NOTES}|{CELL}|{TAGS}|: )")  # a piece of text ends before and after each
WORDS = (". Centre ", ". Corner ")  # a player may say these of a cell
ROLES = ("system\n", "user\n", "assistant\n", "tool\n")


def _chunks(phrase: str) -> list[str]:
    """A phrase cut at spaces into pieces of at most `LONGEST` characters."""
    chunks = [""]
    for part in re.findall(r"\s*\S+\s*?|\s+", phrase):
        if len(chunks[-1]) + len(part) > LONGEST:
            chunks.append("")
        chunks[-1] += part
    return [chunk for chunk in chunks if len(chunk) > 1]


def phrases(samples: int, least: int, seed: int) -> list[str]:
    """Fixed text between board cells and digits that occurs at least `least` times."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(samples):
        for message in draw(rng):
            if message.role != "system":
                for part in FIXED.split(message.content):
                    counts.update([part] if FIXED.fullmatch(part) else _chunks(part))
    found = {phrase for phrase, count in counts.items() if count >= least and len(phrase) > 1}
    thoughts = {
        part
        for policy in POLICIES.values()
        for key in (".........", "XX.OO....", "OO.X.....", "XOXOXOO..", "X...O....")
        for choice in policy(key)
        for part in FIXED.split(choice.thought)
        if len(part) > 1
    }
    cells = {f"{glue}{cell}" for glue in ("\n", " | ", ", ") for cell in "012345678XO"}
    cells -= {", X", ", O"}
    words = {chunk for text in (SYSTEM, *thoughts) for chunk in _chunks(text)}
    return sorted(found | cells | words | set(ROLES) | set(WORDS))


def build(seed: int = 0, samples: int = 20_000) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    single = [(char, -10.0) for char in sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces = [
        (to_bytes.pre_tokenize_str(phrase)[0][0], -8.0)
        for phrase in phrases(samples, samples // 200, seed)
    ]
    vocab = [(name, 0.0) for name in SPECIAL] + single + pieces
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
