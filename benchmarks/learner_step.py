"""Learner step of a packed trie and of right-padded rows of the same model, in tokens per second.

    python benchmarks/learner_step.py [--rows 256] [--group 16] [--repeats 3] [--profile]
    python benchmarks/learner_step.py --device cuda --hidden 1024 --layers 16

Rows resemble tic-tac-toe: a prompt shared by a group, then turns of a few sampled ids and a few of
the environment's; siblings that moved alike share the next turn too. Both sides use the same random
Llama, loss and micro-batch size. Tokens per second count *row* tokens (copies included, padding
not), so that their ratio is that of wall times.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from shapes import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rayrl.config import AlgoConfig
from rayrl.learner.attention import IMPLEMENTATION
from rayrl.learner.batch import Totals, Trajectory, batch_of, micro_batches
from rayrl.learner.forward import loss_of
from rayrl.learner.loss import Objective
from rayrl.learner.packing import pack


def make_rows(n: int, group: int, seed: int = 0) -> list[Trajectory]:
    """Make games of about 150 ids: a 60-id prompt, up to 6 turns of 9 sampled and 8 other ids."""
    rng = np.random.default_rng(seed)
    rows = []
    system = rng.integers(0, 400, 40)
    for g in range(-(-n // group)):
        prompt = np.concatenate([system, rng.integers(0, 400, 20)])
        for _ in range(min(group, n - g * group)):
            ids, mask, history = [prompt], [np.zeros(60, bool)], [g]
            for _ in range(int(rng.integers(4, 7))):
                move = int(rng.choice(9, p=_POLICY))
                history.append(move)
                turn = np.random.default_rng(history).integers(0, 400, 8)  # as the state says
                ids += [np.array([7, 7, 7, 7, 20 + move, 8, 8, 8, 8]), turn]
                mask += [np.ones(9, bool), np.zeros(8, bool)]
            flat, loss = np.concatenate(ids).astype(np.int32), np.concatenate(mask)
            old = np.where(loss, -1.0, 0.0).astype(np.float32)
            value = float(rng.normal())
            advantage = np.where(loss, value, 0.0).astype(np.float32)
            rows.append(Trajectory(flat, loss, old, advantage, group=g))
    return rows


_POLICY = np.array([0.35, 0.2, 0.15, 0.1, 0.06, 0.05, 0.04, 0.03, 0.02])


def packed_step(
    model: torch.nn.Module, rows: list[Trajectory], objective: Objective, totals: Totals
) -> float:
    total = 0.0
    for micro in micro_batches(rows, 8192):
        loss, _ = loss_of(model, micro, objective, totals, 1.0, first=True)
        loss.backward()
        total += float(loss.detach())
    return total


def padded_step(
    model: PreTrainedModel, rows: list[Trajectory], totals: Totals, tokens: int = 8192
) -> float:
    """Baseline: right-padded rows, an attention mask, logits at every position."""
    device = model.device
    rows = sorted(rows, key=lambda row: len(row.ids))
    total, at = 0.0, 0
    while at < len(rows):
        count = 1
        while at + count < len(rows) and (count + 1) * len(rows[at + count].ids) <= tokens:
            count += 1
        part = rows[at : at + count]
        at += count
        width = len(part[-1].ids)

        def pad(arrays: list[np.ndarray], width: int = width) -> torch.Tensor:
            wide = np.stack([np.pad(a, (0, width - len(a))) for a in arrays])
            return torch.from_numpy(wide).to(device)

        ids = pad([row.ids.astype(np.int64) for row in part])
        mask = pad([row.loss_mask for row in part])[:, 1:]
        attention = pad([np.ones(len(row.ids), np.int64) for row in part])
        advantages = pad([row.advantages for row in part])[:, 1:]
        old = pad([row.rollout_logprobs for row in part])[:, 1:]
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        logprobs = -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        logprobs = logprobs.view(mask.shape)
        weight = (logprobs.detach() - old).exp().clamp(max=2.0) * advantages * mask / totals.tokens
        loss = -(weight * logprobs).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def finish(device: str) -> None:
    """Wait for the accelerator's queued work."""
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    base = SHAPES["embedded"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=base["hidden_size"])
    parser.add_argument("--layers", type=int, default=base["num_hidden_layers"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = base | {
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "intermediate_size": 3 * args.hidden,
        "num_attention_heads": args.hidden // 32,
        "num_key_value_heads": args.hidden // 32,
    }
    config = LlamaConfig(**shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(args.device)
    rows = make_rows(args.rows, args.group)
    batch = batch_of(rows)
    objective = Objective.of(AlgoConfig(loss="cispo", tis_max=2.0))
    row_tokens = sum(len(row.ids) for row in rows)
    begin = time.perf_counter()
    packs = [pack([r.ids for r in m], [r.loss_mask for r in m]) for m in micro_batches(rows, 8192)]
    packing = time.perf_counter() - begin
    distinct = sum(len(p.ids) for p in packs)
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{len(rows)} rows, {row_tokens} tokens, {distinct} distinct "
        f"({distinct / row_tokens:.0%}), {batch.totals.tokens:.0f} loss tokens; "
        f"packing {packing * 1e3:.1f} ms; {params / 1e6:.2f}M parameters"
    )

    best = {"packed": float("inf"), "padded": float("inf")}
    losses = {}
    for _ in range(args.repeats):
        for name in best:
            model.set_attn_implementation(IMPLEMENTATION if name == "packed" else "sdpa")
            model.zero_grad()
            finish(args.device)
            begin = time.perf_counter()
            if name == "packed":
                losses[name] = packed_step(model, rows, objective, batch.totals)
            else:
                losses[name] = padded_step(model, rows, batch.totals)
            finish(args.device)
            best[name] = min(best[name], time.perf_counter() - begin)
    assert abs(losses["packed"] - losses["padded"]) < 1e-4, losses
    for name, seconds in best.items():
        print(f"{name}: {seconds:.2f} s, {row_tokens / seconds:,.0f} row tokens/s")
    print(f"ratio {best['padded'] / best['packed']:.2f}")
    if args.device == "cpu":
        floor = 6 * params * distinct / (80e9 * args.threads)
        print(
            f"floor of the packed step's linear layers at 80 GFLOP/s per thread {floor:.2f} s "
            f"({floor / best['packed']:.0%} of it used)"
        )
    if args.profile:
        model.set_attn_implementation(IMPLEMENTATION)
        with torch.profiler.profile() as profile:
            packed_step(model, rows, objective, batch.totals)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
