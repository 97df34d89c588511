"""Seconds of a whole GRPO step of a pretrained model: rayrl and TRL, measured side by side.

    rayrl model fetch smollm2-135m
    python benchmarks/grpo_step.py --peer .venv-trl/bin/python

For the peer: `python -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 trl==1.16.0`
(and a CPU build of torch on a machine without a GPU).

Both sides sample `--groups` x `--group-size` episodes from the same prompts, with the same token
limit, which nearly every reply reaches, and make one update of all weights; `multi` has four turns.
Our side is what users run: `rayrl train` with env workers, Serve, vLLM and DeepSpeed on Ray, and
its step includes the push of the weights. `--engines` chooses other engines than vLLM. The first
step of each side is a warm-up and is left out. TRL runs in fp32 and under bf16 autocast; ours in
bf16 with fp32 master weights, and with `--fp32` in fp32 too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayrl.run.files import read_jsonl

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))
import talk


@dataclass(frozen=True)
class Side:
    """Result of one side: median seconds, and mean number of sampled tokens per step."""

    name: str
    seconds: float
    generating: float
    sampled: float


def ours(options: argparse.Namespace, mode: str, engine: str, dtype: str) -> Side:
    """Run `rayrl train` on the same prompts."""
    longest = 512 if mode == "multi" else 128
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"env.name={HERE / 'talk_env.py'}:{mode}",
            f"model.path={options.model}",
            f"engine={engine}",
            f"engine.dtype={dtype}",
            f"engine.threads={options.threads}",
            f"engine.max_len={longest}",
            f"engine.max_live={options.groups * options.group_size}",
            f"sampling.max_tokens={talk.TOKENS[mode]}",
            f"learner.dtype={dtype}",
            "learner.zero_stage=1",
            f"learner.threads={options.threads}",
            "learner.lr=1e-6",
            "algo.loss=grpo",
            "algo.clip_low=0.2",
            "algo.clip_high=0.2",
            f"train.groups={options.groups}",
            f"train.group_size={options.group_size}",
            f"train.steps={options.steps}",
            "cluster.request_deadline_s=600",
            "cluster.object_store_gb=2",
            f"run.dir={folder}/run",
        ]
        subprocess.run([sys.executable, "-m", "rayrl", "train", *settings], check=True)
        rows = read_jsonl(Path(f"{folder}/run/metrics.jsonl"))[1:]
    return Side(
        f"rayrl {engine} {dtype}",
        statistics.median(row["time/total"] for row in rows),
        statistics.median(row["time/collect"] for row in rows),
        statistics.mean(row["tokens"] for row in rows),
    )


def theirs(options: argparse.Namespace, mode: str, bf16: bool) -> Side:
    """Run TRL in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            options.peer,
            str(HERE / "peers" / "trl_grpo.py"),
            *("--model", str(Path(options.model).resolve()), "--mode", mode),
            *("--groups", str(options.groups), "--group-size", str(options.group_size)),
            *("--steps", str(options.steps), "--threads", str(options.threads)),
            *("--out", folder),
            *(["--bf16"] if bf16 else []),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    steps = [line[5:] for line in done.stdout.splitlines() if line.startswith("STEP ")]
    rows = [json.loads(line) for line in steps][1:]
    return Side(
        f"TRL {'bf16 autocast' if bf16 else 'fp32'}",
        statistics.median(row["seconds"] for row in rows),
        statistics.median(row["generate"] for row in rows),
        statistics.mean(row["sampled"] for row in rows),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print both sides."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", help="Python interpreter with TRL")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--modes", nargs="+", choices=list(talk.TURNS), default=list(talk.TURNS))
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=["vllm", "embedded"], default=["vllm"])
    parser.add_argument("--fp32", action="store_true", help="also run ours in fp32")
    options = parser.parse_args(arguments)
    for mode in options.modes:
        dtypes = ["bfloat16", *(["float32"] if options.fp32 else [])]
        sides = [ours(options, mode, *kind) for kind in itertools.product(options.engines, dtypes)]
        if options.peer:
            sides += [theirs(options, mode, bf16) for bf16 in (False, True)]
        turns = talk.TURNS[mode]
        print(f"\n{mode}: {options.groups} x {options.group_size} episodes, {turns} turn(s)")
        for side in sides:
            print(
                f"  {side.name:<24} {side.seconds:>7.1f} s per step, of it rollouts "
                f"{side.generating:>6.1f}; {side.sampled:,.0f} tokens sampled; "
                f"ours is {side.seconds / sides[0].seconds:.2f} x as fast",
                flush=True,
            )


if __name__ == "__main__":
    main()
