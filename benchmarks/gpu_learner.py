"""The learner on a GPU: attention over a trie, packed and padded; whole steps by ZeRO stage.

    python benchmarks/gpu_learner.py [--models 135M 1.5B] [--rows 128] [--repeats 3] [--only steps]
    python benchmarks/gpu_learner.py --only attention --kinds games conversations long
    python benchmarks/gpu_learner.py --only attention --kinds conversations --groups 8 16
    python benchmarks/gpu_learner.py --models 135M --profile    what one step spends its time on
    python benchmarks/gpu_learner.py --device cpu --models tiny --rows 16     for a trial

Models have random weights and the shapes of SmolLM2-135M and Qwen2.5-1.5B. Rows are games
(`learner_step.py`'s, about 150 ids) and conversations (a prompt of 384 ids, then four turns of 96
sampled ids and 32 given ones; siblings share the prompt alone), or long (groups of 16 that share
4,096 ids and sample 512 each).

*Attention*: forward and backward of all rows, no optimizer, bf16. `trie flex` and `trie gathered`
are the learner's two ways; `packed flex` is whole rows end to end in FlexAttention, without
sharing; `padded` is right-padded rows in SDPA with logits everywhere. The logprobs of both tries
are compared with those of fp32. MFU counts the FLOPs of the linear layers for distinct tokens.

*Steps*: `DeepSpeedLearner.step` on one rank, with gradients, clipping and AdamW. The floor counts
linear layers only: 6 FLOPs per parameter and distinct token (for the head: per predicting token),
divided by the rate of a large product measured in the same run.

A section (a model with rows of a kind, or its steps) measures nothing new after `--seconds`.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learner_step import finish, make_rows, padded_step
from shapes import SHAPES, config_of
from transformers import AutoModelForCausalLM

from rayrl.config import AlgoConfig, Config
from rayrl.learner import attention as trie_attention
from rayrl.learner.attention import IMPLEMENTATION, Plan, block_mask
from rayrl.learner.batch import Batch, Trajectory, batch_of, micro_batches
from rayrl.learner.deepspeed import DeepSpeedLearner
from rayrl.learner.forward import loss_of, token_logprobs
from rayrl.learner.logits import chosen_logprobs
from rayrl.learner.loss import Objective
from rayrl.learner.packing import IntArray, pack


def conversations(n: int, group: int) -> list[Trajectory]:
    """Make `n` rows of 896 ids in groups of `group`."""
    rng = np.random.default_rng(0)
    system, rows = rng.integers(0, 400, 256), []
    for g in range(n // group):
        prompt = np.concatenate([system, rng.integers(0, 400, 128)])
        for _ in range(group):
            ids = np.concatenate([prompt, rng.integers(0, 400, 4 * 128)]).astype(np.int32)
            mask = np.concatenate([np.zeros(384, bool), np.tile(np.arange(128) < 96, 4)])
            old = np.where(mask, -6.0, 0.0).astype(np.float32)
            advantage = np.where(mask, rng.normal(), 0.0).astype(np.float32)
            rows.append(Trajectory(ids, mask, old, advantage, group=g))
    return rows


def long_rows(n: int, group: int = 16) -> list[Trajectory]:
    """Make `n` rows that share 4,096 ids with their group and sample 512."""
    rng = np.random.default_rng(0)
    rows = []
    for g in range(-(-n // group)):
        prompt = rng.integers(0, 400, 4096)
        for _ in range(min(group, n - g * group)):
            ids = np.concatenate([prompt, rng.integers(0, 400, 512)]).astype(np.int32)
            mask = np.arange(len(ids)) >= 4096
            old = np.where(mask, -6.0, 0.0).astype(np.float32)
            advantage = np.where(mask, rng.normal(), 0.0).astype(np.float32)
            rows.append(Trajectory(ids, mask, old, advantage, group=g))
    return rows


def end_to_end(rows: list[Trajectory]) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Ids, positions and ends of concatenated rows; positions of logits and their target ids."""
    lengths = np.array([len(row.ids) for row in rows])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    positions = np.concatenate([np.arange(n) for n in lengths])
    targets = np.flatnonzero(np.concatenate([row.loss_mask for row in rows]))
    return ids, positions, np.repeat(offsets[1:], lengths), targets - 1, ids[targets]


def packed_logprobs(model: Any, rows: list[Trajectory], device: str, tokens: int) -> torch.Tensor:
    """Logprobs of the rows' loss tokens, in the rows' order, from whole rows end to end."""
    ids, positions, ends, sources, targets = end_to_end(rows)
    extra = -len(ids) % tokens

    def tensor(array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    padded_ends = np.concatenate([ends, np.arange(len(ids), len(ids) + extra) + 1])
    logits = model(
        input_ids=tensor(np.pad(ids, (0, extra)))[None],
        position_ids=tensor(np.pad(positions, (0, extra)))[None],
        logits_to_keep=tensor(sources),
        use_cache=False,
        plan=Plan(0, len(padded_ends), masks={None: block_mask(padded_ends, device)}),
    ).logits[0]
    slots = torch.arange(len(targets), device=device)
    return chosen_logprobs(logits, slots, tensor(targets), 1.0)[0]


def use_flex(flex: bool) -> None:
    """Choose the trie's attention, whatever `flex_pays` would say."""
    trie_attention.flex_pays = lambda packed, device, width: flex


def runs(rows: list[Trajectory], tokens: int) -> Iterator[list[Trajectory]]:
    """Yield parts of at most `tokens` tokens without sharing, sorted to minimize padding."""
    part: list[Trajectory] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if sum(len(other.ids) for other in part) + len(row.ids) > tokens:
            yield part
            part = []
        part.append(row)
    yield part


def weights_of(rows: list[Trajectory], device: str) -> torch.Tensor:
    """Advantages of the loss tokens, in the rows' order."""
    flat = np.concatenate([row.advantages[row.loss_mask] for row in rows])
    return torch.from_numpy(flat).to(device)


def best(
    work: Callable[[], None], device: str, repeats: int, deadline: float = float("inf")
) -> tuple[float, float]:
    """Return seconds of the fastest repeat after a warm-up, one or more, and peak GiB."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats + 1):
        finish(device)
        began = time.perf_counter()
        work()
        finish(device)
        seconds.append(time.perf_counter() - began)
        if len(seconds) > 1 and time.monotonic() > deadline:
            break
    peak = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else 0.0
    return min(seconds[1:]), peak


def attention(
    name: str, batch: Batch, device: str, repeats: int, rate: float, tokens: int, seconds: float
) -> None:
    """Time the four variants and compare logprobs of the tries with fp32."""
    deadline = time.monotonic() + seconds
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config_of(name), dtype=torch.bfloat16, attn_implementation=IMPLEMENTATION
        )
    rows = list(batch.rows)
    objective = Objective.of(AlgoConfig(loss="cispo", tis_max=2.0))
    row_tokens = sum(len(row.ids) for row in rows)
    packs = [
        pack([row.ids for row in m], [row.loss_mask for row in m])
        for m in micro_batches(rows, tokens)
    ]
    distinct, sources = sum(len(p.ids) for p in packs), sum(len(p.sources) for p in packs)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head
    flops = 6 * (body * distinct + head * sources)
    print(f"  {row_tokens} row tokens, {distinct} distinct, {sources} that predict", flush=True)

    def trie(flex: bool) -> Callable[[], None]:
        def step() -> None:
            use_flex(flex and device != "cpu")
            for micro in micro_batches(rows, tokens):
                loss, _ = loss_of(model, micro, objective, batch.totals, 1.0, first=True)
                loss.backward()

        return step

    def packed_flex() -> None:
        for part in runs(rows, tokens):
            loss = -(packed_logprobs(model, part, device, tokens) * weights_of(part, device)).sum()
            (loss / batch.totals.tokens).backward()

    ways = {
        "trie flex": (IMPLEMENTATION, trie(True)),
        "padded": ("sdpa", lambda: padded_step(model, rows, batch.totals, tokens) and None),
        "trie gathered": (IMPLEMENTATION, trie(False)),
        "packed flex": (IMPLEMENTATION, packed_flex),
    }
    took: dict[str, float] = {}
    for way, (implementation, work) in ways.items():
        if time.monotonic() > deadline:
            print(f"  {way}: not measured, the section's time is spent", flush=True)
            continue
        model.set_attn_implementation(implementation)
        model.zero_grad()
        try:
            took[way], peak = best(work, device, repeats, deadline)
        except Exception as error:  # measure the others
            print(f"  {way}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            torch.cuda.empty_cache()
            continue
        print(
            f"  {way}: {took[way]:.3f} s, {row_tokens / took[way]:,.0f} row tokens/s, MFU "
            f"{flops / took[way] / rate:.0%}, {peak:.1f} GiB at the peak",
            flush=True,
        )
    model.zero_grad()
    some = micro_batches(rows, tokens)[0]
    packed = pack([row.ids for row in some], [row.loss_mask for row in some])
    with torch.no_grad():
        found = {}
        for dtype in (torch.bfloat16, torch.float32):
            model = model.to(dtype)
            model.set_attn_implementation(IMPLEMENTATION)
            for way, flex in (("trie flex", device != "cpu"), ("trie gathered", False)):
                use_flex(flex)
                found[f"{way} {dtype}"] = token_logprobs(model, packed, 1.0)[0]
    wanted = found[f"trie gathered {torch.float32}"]
    for key, values in found.items():
        difference = (values - wanted).abs()
        print(f"  {key}: {difference.mean():.1e} nats from fp32's, at most {difference.max():.1e}")


def steps(
    name: str, batch: Batch, device: str, repeats: int, rate: float, tokens: int, limit: float
) -> None:
    """Whole steps of the learner, by dtype and ZeRO stage."""
    deadline = time.monotonic() + limit
    rows = list(batch.rows)
    packs = [
        pack([row.ids for row in m], [row.loss_mask for row in m])
        for m in micro_batches(rows, tokens)
    ]
    distinct, sources = sum(len(p.ids) for p in packs), sum(len(p.sources) for p in packs)
    row_tokens = sum(len(row.ids) for row in rows)
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
        head = model.get_output_embeddings().weight.numel()
        body = sum(p.numel() for p in model.parameters()) - head  # tied: the embedding is the head
        model.save_pretrained(folder)
        del model
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
        floor = 6 * (body * distinct + head * sources) / rate
        print(
            f"{name}: {len(rows)} rows, {row_tokens} tokens, {distinct} distinct, {sources} that "
            f"predict; {(body + head) / 1e6:.0f}M parameters; floor {floor:.3f} s",
            flush=True,
        )
        for case in CASES:
            if name == "1.5B" and case == ("float32", 0, False):
                continue  # weights, gradients and moments alone are 25 GB
            if time.monotonic() > deadline:
                print(f"  {case}: not measured, the section's time is spent", flush=True)
                continue
            # in its own process: DeepSpeed keeps the GPU memory of a learner
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                try:
                    done = pool.submit(
                        step_of,
                        folder,
                        batch,
                        case,
                        device,
                        repeats,
                        tokens,
                        deadline - time.monotonic(),
                    ).result()
                except Exception as error:  # measure the others
                    done = f"FAILED {type(error).__name__}: {str(error)[:200]}", 0.0
            dtype, stage, again = case
            label = f"  {dtype} ZeRO {stage}{' checkpointed' if again else ''}"
            text, seconds = done
            if seconds:
                text = (
                    f"{seconds:.3f} s per step, {row_tokens / seconds:,.0f} row tokens/s, floor "
                    f"{floor / seconds:.0%} of it; {text}"
                )
            print(f"{label}: {text}", flush=True)


CASES: list[tuple[str, int, bool]] = [  # dtype, ZeRO stage, gradient checkpointing
    ("bfloat16", 1, False),
    ("bfloat16", 2, False),
    ("bfloat16", 3, False),
    ("bfloat16", 1, True),
    ("float32", 0, False),
]


def profile(name: str, batch: Batch, device: str, tokens: int) -> None:
    """Print what a step in bf16 with ZeRO 1 spends its time on."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        learner = learner_of(folder, CASES[0], device, tokens)
        for _ in range(2):
            learner.step(batch.rows, batch.totals)
        finish(device)
        began = time.perf_counter()
        learner.step(batch.rows, batch.totals)
        finish(device)
        plain = time.perf_counter() - began
        with torch.profiler.profile() as found:  # of all there is: the CPU, and a GPU
            learner.step(batch.rows, batch.totals)
            finish(device)
    events = found.key_averages()
    kernels = [one for one in events if one.device_type.name != "CPU"]
    of_cpu = sum(one.self_cpu_time_total for one in events) / 1e3
    of_gpu = sum(one.self_device_time_total for one in kernels) / 1e3
    launched = sum(one.count for one in kernels)
    print(
        f"{name}: {plain * 1e3:.1f} ms per step without the profiler; with it {of_cpu:.1f} ms on "
        f"the CPU and {of_gpu:.1f} ms in {launched} kernels on the GPU"
    )

    def spent(event: Any) -> float:
        time_us: float = event.self_device_time_total if kernels else event.self_cpu_time_total
        return time_us / 1e3

    for event in sorted(kernels or events, key=spent, reverse=True)[:25]:
        print(f"  {spent(event):9.2f} ms {event.count:6d} x {event.key[:100]}")


def learner_of(
    folder: str, case: tuple[str, int, bool], device: str, tokens: int
) -> DeepSpeedLearner:
    """Make a learner of one of `CASES`."""
    config = Config()
    learner_config = replace(
        config.learner,
        dtype=case[0],
        zero_stage=case[1],
        lr=1e-6,
        micro_batch_tokens=tokens,
        gradient_checkpointing=case[2],
        threads=4,
    )
    config = replace(config, learner=learner_config)
    return DeepSpeedLearner(config, folder, total_steps=10, device=device)


def step_of(
    folder: str,
    batch: Batch,
    case: tuple[str, int, bool],
    device: str,
    repeats: int,
    tokens: int,
    limit: float,
) -> tuple[str, float]:
    """Run steps of one learner; return a description and the seconds of a step."""
    learner = learner_of(folder, case, device, tokens)
    metrics: dict[str, float] = {}
    seconds, peak = best(
        lambda: metrics.update(learner.step(batch.rows, batch.totals)),
        device,
        repeats,
        time.monotonic() + limit,
    )
    flat, _ = learner.flat_weights()
    began = time.perf_counter()
    learner.flat_weights(flat)
    host = time.perf_counter() - began
    return (
        f"{peak:.1f} GiB at the peak; loss {metrics['loss']:.5f}, grad norm "
        f"{metrics['grad_norm']:.4f}; its {flat.nbytes / 1e9:.2f} GB of weights are in the host's "
        f"memory after {host:.2f} s"
    ), seconds


def product_rate(device: str) -> float:
    """Measure the FLOP/s of a large bf16 product on random data."""
    n = 8192 if device != "cpu" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    finish(device)
    began = time.perf_counter()
    for _ in range(10):
        a @ b
    finish(device)
    return 2 * n**3 * 10 / (time.perf_counter() - began)


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["135M", "1.5B"], choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=["attention", "steps"])
    parser.add_argument(
        "--groups", nargs="+", type=int, default=[8], help="siblings in a conversation's group"
    )
    parser.add_argument("--seconds", type=float, default=120, help="for a section")
    parser.add_argument("--profile", action="store_true", help="of one step, and nothing else")
    parser.add_argument("--tokens", type=int, default=8192, help="per micro-batch")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["games", "conversations"],
        choices=["games", "conversations", "long"],
    )
    args = parser.parse_args()
    torch.set_num_threads(4)
    rate = product_rate(args.device)
    card = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}: {rate / 1e12:.0f} TFLOP/s in a bf16 product")
    talks = [batch_of(conversations(args.rows, group)) for group in args.groups]
    kinds: dict[str, Callable[[], list[Batch]]] = {
        "games": lambda: [batch_of(make_rows(8 * args.rows, 16))],
        "conversations": lambda: talks,
        "long": lambda: [batch_of(long_rows(args.rows // 4))],
    }
    if args.profile:
        for name in args.models:
            profile(name, talks[0], args.device, args.tokens)
        return
    if args.only != "steps":
        for name in args.models:
            for kind, batch in [(one, b) for one in args.kinds for b in kinds[one]()]:
                groups = len({row.group for row in batch.rows})
                print(f"{name}, {kind}: {len(batch.rows)} rows in {groups} groups, bf16")
                attention(name, batch, args.device, args.repeats, rate, args.tokens, args.seconds)
                gc.collect()
                torch.cuda.empty_cache()
    if args.only != "attention":
        for name in args.models:
            steps(name, talks[0], args.device, args.repeats, rate, args.tokens, args.seconds)


if __name__ == "__main__":
    main()
