"""The embedded engine against transformers' `generate`, on the same multi-turn episodes.

    python benchmarks/engine_vs_generate.py --batch 64 256 --turns 8 --threads 1
    python benchmarks/engine_vs_generate.py --device cuda --dtype bfloat16 --shape 135M

Both play the same conversations side by side in one process: each turn adds about 30 prompt ids, of
varying lengths that are the same for both, and samples 8. `generate` is used as a program without
an engine would: on a left-padded batch of whole histories, with a cache within each call. A token
is a new prompt id or a sampled id, whatever was computed. After a warm-up the sides alternate, and
the fastest run of each counts. The floor of a decode step is the time to read the weights and the
conversations' keys and values once, at the speed of a large copy measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from typing import Any

import torch
from shapes import SHAPES, config_of
from transformers import AutoModelForCausalLM

from rayrl.config import EngineConfig
from rayrl.engine.embedded.engine import EmbeddedEngine
from rayrl.types import Request, Sampling

SAMPLED = 8
Added = list[list[tuple[int, ...]]]  # [turn][conversation] prompt ids


def load(args: argparse.Namespace) -> Any:
    """Load the model, or make one with random weights."""
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        return model.to(args.device)
    torch.manual_seed(0)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config_of(args.shape))


def copy_rate(device: str) -> float:
    """Measure the bytes per second that a large copy reads and writes."""
    size = 1 << (31 if device == "cuda" else 27)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size / min(seconds)


def prompts(vocabulary: int, batch: int, turns: int, new: int) -> Added:
    """Return the ids each turn adds to each conversation: `new` ± a third of it."""
    rng = random.Random(0)
    spread = new // 3
    return [
        [
            tuple(rng.randrange(vocabulary) for _ in range(rng.randint(new - spread, new + spread)))
            for _ in range(batch)
        ]
        for _ in range(turns)
    ]


async def play_engine(engine: EmbeddedEngine, added: Added, run: int) -> float:
    """Play all conversations concurrently on the engine and return the seconds."""

    async def talk(i: int) -> None:
        context: tuple[int, ...] = ()
        for turn, new in enumerate(added):
            context += new[i]
            sampling = Sampling(max_tokens=SAMPLED)
            request = Request(f"{run}/{i}", context, sampling, seed=1000 * i + turn)
            context += (await engine.generate(request)).ids
        engine.release([f"{run}/{i}"])

    began = time.perf_counter()
    await asyncio.gather(*(talk(i) for i in range(len(added[0]))))
    return time.perf_counter() - began


@torch.inference_mode()
def play_generate(model: Any, added: Added) -> float:
    """Play the same with one call of `generate` per turn and return the seconds."""
    contexts: list[list[int]] = [[] for _ in added[0]]
    began = time.perf_counter()
    for new in added:
        for context, ids in zip(contexts, new, strict=True):
            context += ids
        longest = max(map(len, contexts))
        short = [longest - len(context) for context in contexts]
        padded = [[0] * pad + context for pad, context in zip(short, contexts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in short]
        out = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=SAMPLED,
            min_new_tokens=SAMPLED,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            eos_token_id=None,
        )
        for context, ids in zip(contexts, out[:, longest:].tolist(), strict=True):
            context += ids
    return time.perf_counter() - began


async def compare(args: argparse.Namespace, batch: int, rate: float) -> None:
    """Compare both at a batch size and print one line."""
    dtype = getattr(torch, args.dtype)
    model, other = load(args), load(args)
    other.eval().to(dtype)
    weights = sum(p.numel() for p in model.parameters())
    vocabulary = model.config.vocab_size
    added = prompts(vocabulary, batch, args.turns, args.new)
    tokens = sum(len(ids) + SAMPLED for new in added for ids in new)
    torch.set_num_threads(args.threads)
    longest = max(sum(len(new[i]) + SAMPLED for new in added) for i in range(batch))
    engine = EmbeddedEngine(
        model,
        EngineConfig(
            max_live=batch,
            threads=args.threads,
            max_len=longest + 1,
            kv_cache_gb=args.kv_cache_gb,
            dtype=args.dtype,
        ),
    )
    ours, theirs = [], []
    await play_engine(engine, added, -1)  # captures graphs for all sizes
    play_generate(other, added[:1])
    for run in range(args.runs):
        before = engine.stats()
        ours.append(await play_engine(engine, added, run))
        after = engine.stats()
        theirs.append(play_generate(other, added))
    await engine.close()
    spent = {name: after[name] - before[name] for name in after}
    config = model.config
    per_id = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    held = weights + per_id * tokens / 2  # conversations are half done on average
    floor = held * dtype.itemsize / rate
    print(
        f"batch {batch:4d}  engine {tokens / min(ours):8.0f} tokens/s  "
        f"generate {tokens / min(theirs):8.0f} tokens/s  ratio {min(theirs) / min(ours):5.1f}  "
        f"| engine, last run: prefill {spent['computed_tokens'] / spent['prefill_seconds']:.0f} "
        f"tokens/s, decode step {1e3 * spent['decode_seconds'] / spent['decode_steps']:.2f} ms "
        f"(floor {1e3 * floor:.2f}), "
        f"{spent['reused_tokens'] / spent['prompt_tokens']:.0%} of prompt ids reused",
        flush=True,
    )


def main() -> None:
    """Compare at each batch size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a Hugging Face directory; default: random weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--new", type=int, default=30, help="mean prompt ids per turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--shape", choices=list(SHAPES), default="embedded")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kv-cache-gb", type=float, default=1.0)
    args = parser.parse_args()
    rate = copy_rate(args.device)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card}, {args.dtype}: a copy moves {rate / 1e9:.0f} GB/s", flush=True)
    for batch in args.batch:
        asyncio.run(compare(args, batch, rate))


if __name__ == "__main__":
    main()
