"""Adapters alone against merged weights: time of a push, and generation rate of vLLM.

    python benchmarks/adapters.py --model DIR [--rank 16] [--rounds 3]

Two vLLM engines run on this machine with the same weights: one receives whole weights, the other
adapters (`cluster.sync=adapters`). They alternate, so that both see the same load: load a new
version (from local memory up to the checksum), then complete the same requests. Prints as JSON the
median seconds, tokens per second, bytes, and ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

from rayrl.config import EngineConfig, LoraConfig
from rayrl.engine import Engine, open_engine
from rayrl.learner.lora import lazy_weights, with_adapters
from rayrl.types import Request, Sampling
from rayrl.weights.flat import flatten


def versions(model: str, lora: LoraConfig) -> dict[str, Any]:
    """Return flat buffer and manifest of one version, merged and as adapters alone."""
    import torch
    from transformers import AutoModelForCausalLM

    adapted = with_adapters(AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16"), lora, 0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.002)
    kinds = {"merged": False, "adapters": True}
    return {
        kind: flatten(
            (weight.name, weight.tensor()) for weight in lazy_weights(adapted, adapters=alone)
        )
        for kind, alone in kinds.items()
    }


def requests(args: argparse.Namespace) -> list[Request]:
    """Return requests with unrelated prompts and answers of equal length."""
    rng = random.Random(0)
    sampling = Sampling(temperature=1.0, max_tokens=args.tokens)
    return [
        Request(f"s{n}", tuple(rng.randrange(10, 40_000) for _ in range(args.prompt)), sampling)
        for n in range(args.requests)
    ]


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure both engines in alternating rounds."""
    lora = LoraConfig(rank=args.rank)
    pushed = versions(args.model, lora)
    config = EngineConfig(
        kind="vllm", dtype="bfloat16", max_live=args.requests, max_len=args.prompt + args.tokens
    )
    engines: dict[str, Engine] = {
        "merged": open_engine(args.model, config),
        "adapters": open_engine(args.model, config, lora=lora),
    }
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in engines}
    for number in range(args.rounds + 1):
        for kind, engine in engines.items():
            began = time.perf_counter()
            await engine.load_weights(number + 1, *pushed[kind])
            loaded = time.perf_counter()
            await asyncio.gather(*(engine.generate(request) for request in requests(args)))
            if number:  # the first warms up
                times[kind].append((loaded - began, time.perf_counter() - loaded))
    for engine in engines.values():
        await engine.close()
    out: dict[str, Any] = {}
    for kind, rounds in times.items():
        push, generate = (statistics.median(column) for column in zip(*rounds, strict=True))
        out[kind] = {
            "bytes": pushed[kind][1].nbytes,
            "push s": round(push, 4),
            "tokens/s": round(args.requests * args.tokens / generate, 1),
        }
    merged, alone = out["merged"], out["adapters"]
    out["merged/adapters"] = {key: round(merged[key] / alone[key], 2) for key in merged}
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))
