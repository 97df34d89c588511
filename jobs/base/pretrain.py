"""Makes the embedded base: a Llama of about a million parameters, pretrained on `corpus.py`.

    python jobs/base/pretrain.py OUT [--steps 6000] [--seed 0] [--device cuda --workers 8]

The loss is on *all* tokens. The result ships in `rayrl/base`.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Conversation, draw
from tokenizer import build
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARD = 4096
"""Conversations in a piece of the corpus."""


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


def shard(tokenizer: PreTrainedTokenizerFast, seed: int, index: int) -> list[list[int]]:
    """The `index`-th piece of the corpus, encoded; the same on any machine, by any worker."""
    rng = random.Random(f"{seed}/{index}")
    return [encode(tokenizer, draw(rng)) for _ in range(SHARD)]


def shards(
    tokenizer: PreTrainedTokenizerFast, seed: int, count: int, workers: int
) -> Iterator[list[list[int]]]:
    """The first `count` pieces in order, made by `workers` processes, or in this one if 0."""
    make = functools.partial(shard, tokenizer, seed)
    if not workers:
        yield from map(make, range(count))
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(make, range(count))


def padded(rows: list[list[int]], parts: int) -> Iterator[torch.Tensor]:
    """The rows in `parts` of like length: ids (B, T), -1 pads."""
    rows = sorted(rows, key=len)
    size = math.ceil(len(rows) / parts)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = torch.full((len(part), len(part[-1])), -1)
        for row, tokens in zip(ids, part, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        yield ids


def update(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rows: list[list[int]], parts: int
) -> float:
    """One step on the mean cross entropy of all tokens but each row's first; returns that loss."""
    count = sum(len(row) - 1 for row in rows)
    total = torch.zeros((), device=model.device)
    for ids in padded(rows, parts):
        ids = ids.to(model.device)
        logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1, reduction="sum"
        )
        (loss / count).backward()
        total += loss.detach() / count
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128, help=f"rows a step, divides {SHARD}")
    parser.add_argument("--parts", type=int, default=4, help="passes of rows of like length a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes that write the corpus")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build(args.seed)
    model = model_for(tokenizer).to(args.device)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / 50)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        ),
    )
    start, seen, step = time.monotonic(), 0, 0
    needed = math.ceil(args.steps * args.batch / SHARD)
    for rows in shards(tokenizer, args.seed, needed, args.workers):
        for first in range(0, SHARD, args.batch):
            if step == args.steps:
                break
            batch = rows[first : first + args.batch]
            loss = update(model, optimizer, batch, args.parts)
            schedule.step()
            step += 1
            seen += sum(len(row) - 1 for row in batch)
            if step % 100 == 0 or step == args.steps:
                speed = seen / (time.monotonic() - start)
                print(f"step {step} loss {loss:.4f} tokens {seen:,} ({speed:,.0f}/s)", flush=True)
            if step % 1000 == 0 or step == args.steps:
                model.save_pretrained(args.out)
                tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
