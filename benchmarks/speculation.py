"""Tokens per second of vLLM with and without `engine.speculative=ngram`.

    python benchmarks/speculation.py [--model models/smollm2-135m] [--live 16] [--rounds 3]

Each round asks `--live` conversations at once to repeat a text of 40 words, and samples 64 ids from
each at temperature 1. The two take turns, each in a process of its own; the first round is a
warm-up and is left out. What is repeated is a model's own doing: small ones do it badly.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time

from transformers import AutoTokenizer

from rayrl.config import EngineConfig
from rayrl.engine import open_engine
from rayrl.types import Request, Sampling

WORDS = ["apple", "river", "stone", "cloud", "green", "table", "paper", "light", "music", "garden"]
IDS = 64


async def rates(options: argparse.Namespace) -> list[float]:
    """Sampled ids per second of each round but the first."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = EngineConfig(
        kind="vllm",
        dtype="bfloat16",
        max_live=options.live,
        max_len=512,
        threads=options.threads,
        speculative=options.speculative,
    )
    rng, found = random.Random(0), []
    engine = open_engine(options.model, config)
    for number in range(options.rounds + 1):
        requests = []
        for k in range(options.live):
            text = " ".join(rng.choice(WORDS) for _ in range(40))
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"Repeat this text exactly, word for word:\n{text}"}],
                add_generation_prompt=True,
                return_dict=False,
            )
            sampling = Sampling(temperature=1.0, max_tokens=IDS)
            requests.append(Request(f"{number}-{k}", tuple(ids), sampling, (), k))
        began = time.perf_counter()
        answers = await asyncio.gather(*map(engine.generate, requests))
        seconds = time.perf_counter() - began
        found.append(sum(len(answer.ids) for answer in answers) / seconds)
    await engine.close()
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--live", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speculative", help="only this one, in this process")
    options = parser.parse_args()
    if options.speculative:
        print(*asyncio.run(rates(options)))
        return
    found: dict[str, list[float]] = {"none": [], "ngram": []}
    for _ in range(2):
        for kind, rounds in found.items():
            command = [sys.executable, *sys.argv, "--speculative", kind]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rounds += map(float, out.splitlines()[-1].split())
    none, ngram = (statistics.median(found[kind]) for kind in ("none", "ngram"))
    print(f"none {none:.0f} ids/s, ngram {ngram:.0f} ids/s, ratio {ngram / none:.2f}")


if __name__ == "__main__":
    main()
