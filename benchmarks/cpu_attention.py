"""Attention on a CPU in C++ beside torch's ways, which it replaces where there is a compiler.

    python benchmarks/cpu_attention.py [--threads 1] [--repeats 20]

The embedded engine's is beside its sparse products, for decoding and for prompts; the learner's,
forward and backward, beside gathered rectangles. Shapes are those of the base model and of
SmolLM2-135M, contexts those of their conversations. The floor is that of the products alone, two of
a head's width for each key that a query head sees, at the rate of torch's matrix product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrl.engine.embedded.attention import CompiledStep, Geometry, KVPool, SparseStep
from rayrl.learner import attention
from rayrl.learner.packing import Packed, pack
from rayrl.native import missing

BASE = Geometry(layers=1, heads=4, kv_heads=4, head_dim=32)
SMOLLM2 = Geometry(layers=1, heads=9, kv_heads=3, head_dim=64)


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def engine(
    name: str,
    shape: Geometry,
    slots: NDArray[np.int64],
    positions: NDArray[np.int64],
    args: argparse.Namespace,
) -> None:
    """Print a layer's time of both ways, and in bf16; and of the sparse step's table."""
    columns = int(positions.max()) + 1
    conversations = int(slots.max()) + 1
    rows = np.arange(conversations * columns, dtype=np.int32).reshape(conversations, columns)
    tokens = len(slots)
    q = torch.randn(tokens, shape.heads, shape.head_dim)
    k, v = (torch.randn(tokens, shape.kv_heads, shape.head_dim) for _ in range(2))

    def pool(dtype: torch.dtype) -> KVPool:
        made = KVPool(shape, conversations * columns, torch.device("cpu"), dtype)
        made.keys.normal_()
        made.values.normal_()
        return made

    fp32, bf16 = pool(torch.float32), pool(torch.bfloat16)
    table = best(lambda: SparseStep(fp32, rows, slots, positions), args.repeats)
    sparse = SparseStep(fp32, rows, slots, positions)
    times = [best(lambda: sparse.attend(0, q, k, v), args.repeats)]
    for kept in (fp32, bf16):
        step = CompiledStep(kept, rows, slots, positions, args.threads)
        times.append(best(lambda step=step: step.attend(0, q, k, v), args.repeats))
    products = int((positions + 1).sum()) * shape.heads
    floor = 4 * products * shape.head_dim / rate()
    shown = " ".join(f"{1e3 * one:8.2f}" for one in (*times, floor, table))
    print(f"{name:32} {shown} {times[0] / times[1]:7.2f} {times[0] / times[2]:6.2f}")


def learner(name: str, shape: Geometry, packed: Packed, args: argparse.Namespace) -> None:
    """Print a layer's time of both ways, forward and backward."""
    tokens = len(packed.ids)

    def heads(n: int) -> Tensor:
        return torch.randn(1, n, tokens, shape.head_dim).requires_grad_()

    given = (heads(shape.heads), heads(shape.kv_heads), heads(shape.kv_heads))
    of_out = torch.randn(1, tokens, shape.heads, shape.head_dim)
    layer = torch.nn.Module()
    times = []
    for why in ("left out", None):
        attention.missing = lambda why=why: why
        work = attention.plan(packed, "cpu", torch.float32, shape.heads * shape.head_dim)

        def forward(work: attention.Plan = work) -> Tensor:
            return attention._attend(layer, *given, None, plan=work)[0]

        times.append(best(forward, args.repeats))
        times.append(
            best(lambda: torch.autograd.grad(forward(), given, of_out), args.repeats) - times[-1]
        )
    attention.missing = missing
    shown = " ".join(f"{1e3 * one:8.2f}" for one in times)
    print(
        f"{name:32} {shown} {(times[0] + times[1]) / (times[2] + times[3]):7.2f}"
        f"   ({tokens:,} tokens of {int(packed.lengths.sum()):,})"
    )


def rate() -> float:
    """Floating point operations per second of a matrix product."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / best(lambda: a @ a, 5)


def games(shared: int, longest: int, count: int = 64) -> Packed:
    """A trie of rows that share up to `shared` of their ids."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, 50, shared)
    rows = [
        np.concatenate(
            [common[: rng.integers(shared // 2, shared)], rng.integers(0, 50, longest - shared)]
        )
        for _ in range(count)
    ]
    return pack(rows, [np.arange(len(row)) > 3 for row in rows])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if why := missing():
        raise SystemExit(why)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    heads = " ".join(f"{head:>8}" for head in ("sparse", "C++", "bf16", "floor", "table"))
    print(f"{'milliseconds of a layer':32} {heads} {'ratio':>7} {'bf16':>6}")
    engine("base, 77 decoded", BASE, np.arange(77), rng.integers(110, 210, 77), args)
    engine("base, 17 prompts of 20 at 150", BASE, *turns(17, 150, 20), args)
    engine("SmolLM2, 32 decoded at 200", SMOLLM2, np.arange(32), np.full(32, 200), args)
    engine("SmolLM2, 32 decoded at 800", SMOLLM2, np.arange(32), np.full(32, 800), args)
    engine("SmolLM2, a prompt of 300 at 300", SMOLLM2, *turns(1, 300, 300), args)
    heads = " ".join(f"{head:>8}" for head in ("torch", "backward", "C++", "backward"))
    print(f"\n{'milliseconds of a layer':32} {heads} {'ratio':>7}")
    learner("base, 64 games", BASE, games(100, 170), args)
    learner("SmolLM2, 64 games", SMOLLM2, games(100, 170), args)
    learner("SmolLM2, 8 rows of 500", SMOLLM2, games(300, 500, 8), args)


def turns(count: int, begin: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Conversations that go on from `begin` by `length` ids each: slots and positions."""
    positions = np.tile(np.arange(begin, begin + length), count)
    return np.repeat(np.arange(count), length), positions


if __name__ == "__main__":
    main()
