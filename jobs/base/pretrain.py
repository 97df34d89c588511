"""Makes the embedded base: a Llama of about a million parameters, pretrained on `corpus.py`.

    python jobs/base/pretrain.py OUT [--steps 1200] [--seed 0]

The loss is on *all* tokens. Takes about 20 minutes on one core; the result ships in `rayrl/base`.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Conversation, draw
from tokenizer import build
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def model_for(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model: width 128, four layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=math.ceil(len(tokenizer) / 16) * 16,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> list[int]:
    """Ids of a whole conversation."""
    messages = [{"role": m.role, "content": m.content} for m in conversation]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: int
) -> Iterator[list[torch.Tensor]]:
    """Endless batches of `size` conversations, in parts of like length: ids (B, T), -1 pads."""
    rng = random.Random(seed)
    while True:
        rows = sorted((encode(tokenizer, draw(rng)) for _ in range(size)), key=len)
        parts, cut = [], [row for row in rows if len(row) < 64]
        for part in (cut, rows[len(cut) :]):
            ids = torch.full((len(part), max(map(len, part))), -1)
            for row, tokens in zip(ids, part, strict=True):
                row[: len(tokens)] = torch.tensor(tokens)
            parts.append(ids)
        yield parts


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128, help="conversations a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build(args.seed)
    model = model_for(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    start, seen = time.monotonic(), 0
    stream = batches(tokenizer, args.seed, args.batch)
    for step in range(args.steps):
        parts = next(stream)
        done = step / args.steps
        falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 50) * falling
        count = sum(int((ids[:, 1:] >= 0).sum()) for ids in parts)
        total = 0.0
        for ids in parts:
            logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1, reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += count
        if step % 20 == 0 or step == args.steps - 1:
            speed = seen / (time.monotonic() - start)
            print(f"step {step} loss {total:.4f} tokens {seen:,} ({speed:,.0f}/s)", flush=True)
        if step % 200 == 199 or step == args.steps - 1:
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
