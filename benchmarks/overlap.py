"""Benefit of rollouts during learning: seconds per step and idle shares at max_lag 0, 1, ...

    python benchmarks/overlap.py [--lags 0 1 2] [--steps 12] [--latency 0.5] [--learn 4.0]

Env workers, replica and group collector are real. The engine is a *fake* that answers after 0.5 to
1.5 times `--latency` seconds without computing anything, and the learner is a *fake* that takes
`--learn` seconds, so that two cores can stand for many. With rollouts alone (the learner takes no
time) a step takes as long as its slowest episode. Prints as JSON for each lag the seconds per step,
their ratio to the slower of rollouts alone and learning, and the shares of time that the learner
and the env workers were idle. The first steps, which fill the pipeline, are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from local_rollouts import open_rollouts  # in this folder
from many_live import TURNS, talk

from rayrl import Task
from rayrl.chat.renderer import Chat
from rayrl.cluster.rollouts import Rollouts
from rayrl.config import Config, from_dict
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.collector import GroupCollector
from rayrl.run.group_log import GroupLog
from rayrl.run.sampling.task_sampler import UniformSampler
from rayrl.weights.model_dir import model_dir

WHERE = f"{Path(__file__).resolve().parent / 'many_live.py'}:{talk.name}"
WARM_UP = 3


def config(args: argparse.Namespace, lag: int) -> Config:
    return from_dict(
        {
            "env": {"name": WHERE},
            "cluster": {"env_workers": 2},
            "train": {
                "groups": args.groups,
                "group_size": args.group_size,
                "steps": args.steps,
                "max_lag": lag,
            },
        }
    )


class Tasks(UniformSampler):
    """One after the other, each with its index as seed."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def plan(self, index: int) -> GroupPlan:
        return GroupPlan(str(index), Task(seed=index), self.group_size, index)


async def run(args: argparse.Namespace, rollouts: Rollouts, lag: int, learn: float) -> Any:
    """Return seconds of each step, of waiting for its batch, and without live episodes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        log = GroupLog(Path(folder))
        made = GroupCollector(rollouts, Tasks(args.group_size), config(args, lag), log)
        async with made as collector:
            collector.restore(0, {})
            collector.advance(0)
            for step in range(args.steps):
                began = time.perf_counter()
                played = await collector.collect(step)
                waited = time.perf_counter() - began
                await asyncio.sleep(learn)
                collector.advance(step + 1)
                rows.append((time.perf_counter() - began, waited, played.idle_s or 0.0))
    # the last steps have no later step to play for
    return rows[WARM_UP : len(rows) - lag]


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every lag on the same env workers."""
    reply = Chat.load(str(model_dir("embedded"))).reply("<move>4</move>")
    async with open_rollouts(WHERE, reply, latency=args.latency, env_workers=2) as (rollouts, _):
        alone = statistics.median(row[0] for row in await run(args, rollouts, 0, 0.0))
        out: dict[str, Any] = {"episodes of turns": TURNS, "rollouts alone": round(alone, 2)}
        for lag in args.lags:
            rows = await run(args, rollouts, lag, args.learn)
            step = statistics.fmean(row[0] for row in rows)
            slower = max(alone, args.learn)
            out[f"max_lag={lag}"] = {
                "seconds per step": round(step, 2),
                "relative to the slower of the two": round(step / slower, 3),
                "learner idle": round(sum(row[1] for row in rows) / sum(r[0] for r in rows), 3),
                "env workers idle": round(
                    (sum(row[2] for row in rows) if lag else args.learn * len(rows))
                    / sum(row[0] for row in rows),
                    3,
                ),
            }
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--learn", type=float, default=4.0)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))
