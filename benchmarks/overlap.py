"""What is gained by playing at the same time: rollouts during learning, evaluations beside a step.

    python benchmarks/overlap.py [--lags 0 1 2] [--steps 12] [--latency 0.5] [--learn 4.0]
    python benchmarks/overlap.py --evaluate 128

Env workers, replica and group collector are real. The engine is a *fake* that answers after 0.5 to
1.5 times `--latency` seconds without computing anything, and the learner is a *fake* that takes
`--learn` seconds, so that two cores can stand for many. With rollouts alone (the learner takes no
time) a step takes as long as its slowest episode. Prints as JSON for each lag the seconds per step,
their ratio to the slower of rollouts alone and learning, and the shares of time that the learner
and the env workers were idle. The first steps, which fill the pipeline, are left out.

With `--evaluate`, so many episodes are evaluated after each step, at `max_lag` 0, while the next
step's groups are played. Prints what an evaluation takes alone, and what it adds to a step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import AbstractAsyncContextManager, ExitStack
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
from rayrl.run.evaluation.evaluations import Evaluations
from rayrl.run.folder import RunDir
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
            # the fake engine answers greedy requests otherwise
            "eval": {"episodes": args.evaluate or 1, "every": 1, "temperature": 1.0},
        }
    )


class Tasks(UniformSampler):
    """One after the other, each with its index as seed."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def plan(self, index: int) -> GroupPlan:
        return GroupPlan(str(index), Task(seed=index), self.group_size, index)


async def run(
    args: argparse.Namespace, rollouts: Rollouts, lag: int, learn: float, evaluate: bool = False
) -> Any:
    """Return seconds of each step, of waiting for its batch, and without live episodes."""
    rows = []
    with tempfile.TemporaryDirectory() as path, ExitStack() as stack:
        cfg = config(args, lag)
        folder = stack.enter_context(RunDir(f"{path}/run", cfg, verb="train"))
        evaluations = Evaluations(cfg, folder, print)
        log = GroupLog(Path(path))
        async with GroupCollector(rollouts, Tasks(args.group_size), cfg, log) as collector:
            collector.restore(0, {})
            collector.advance(0)
            for step in range(args.steps):
                began = time.perf_counter()
                played = await collector.collect(step)
                waited = time.perf_counter() - began
                await asyncio.sleep(learn)
                collector.advance(step + 1)
                if evaluate:
                    assert await evaluations.play(rollouts, step + 1)
                rows.append((time.perf_counter() - began, waited, played.idle_s or 0.0))
    # the last steps have no later step to play for
    return rows[WARM_UP : len(rows) - lag]


def opened(args: argparse.Namespace) -> AbstractAsyncContextManager[tuple[Rollouts, Any]]:
    reply = Chat.load(str(model_dir("embedded"))).reply("<move>4</move>")
    return open_rollouts(WHERE, reply, latency=args.latency, env_workers=2)


async def measure_evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """Measure a step, an evaluation, and both."""
    async with opened(args) as (rollouts, _):
        both, step = [  # in this order: answers come from the newest version ever asked for
            statistics.median(row[0] for row in await run(args, rollouts, 0, args.learn, evaluate))
            for evaluate in (True, False)
        ]
        alone = []
        with tempfile.TemporaryDirectory() as path:
            cfg = config(args, 0)
            with RunDir(path, cfg, verb="train") as folder:
                evaluations = Evaluations(cfg, folder, print)
                for version in range(args.steps, args.steps + 5):
                    began = time.perf_counter()
                    assert await evaluations.play(rollouts, version)
                    alone.append(time.perf_counter() - began)
    by_itself = statistics.median(alone)
    return {
        "a step": round(step, 2),
        "an evaluation": round(by_itself, 2),
        "both": round(both, 2),
        "added, of an evaluation by itself": round((both - step) / by_itself, 2),
    }


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every lag on the same env workers."""
    async with opened(args) as (rollouts, _):
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
    parser.add_argument("--evaluate", type=int, default=0, help="episodes; 0: measure the lags")
    arguments = parser.parse_args()
    measured = measure_evaluation if arguments.evaluate else measure
    print(json.dumps(asyncio.run(measured(arguments)), indent=2))
