"""Thousands of live episodes: memory per episode, and throughput relative to the ideal.

    python benchmarks/many_live.py [--live 10000] [--latency 1.0] [--workers 2] [--seconds 20]

An environment of eight turns plays with a *fake* engine that answers after a random 0.5 to 1.5
times `--latency` without computing anything, which measures everything around generation. With L
live episodes and a mean latency of t seconds, no system can exceed the ideal of L / t turns per
second.
Turns are counted in the last half of `--seconds`, when the starts have spread out. Measures one
process, then env workers with one replica on Ray. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
from accounts import Accounts  # in this folder
from fake_engine import FakeEngine, counts_of
from local_rollouts import open_rollouts

import rayrl
from rayrl import Agent, Sampling, Scores, Task
from rayrl.chat.renderer import Chat
from rayrl.cluster.actors import GC_THRESHOLD
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.weights.model_dir import model_dir

TURNS = 8
REPLY = "<move>4</move>"
HERE = Path(__file__).resolve()


@rayrl.env(tasks=[Task()], rewards={"turns": 1.0})
async def talk(task: Task, agent: Agent) -> Scores:
    """Eight turns, whatever the replies."""
    for k in range(TURNS):
        await agent(f"turn {k}: your move")
    return {"turns": float(agent.turns)}


def plans(group: int = 1) -> Iterator[GroupPlan]:
    """Yield plans endlessly."""
    for k in itertools.count():
        yield GroupPlan(str(k), Task(seed=k), group, k)


def memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


async def in_process(args: argparse.Namespace, chat: Chat) -> dict[str, Any]:
    """Measure one event loop configured like an env worker's."""
    gc.set_threshold(GC_THRESHOLD, 10, 10)
    engine = FakeEngine(chat.reply(REPLY), args.latency)
    player = PolicyPlayer(chat, engine, Sampling())
    before = memory()
    found: dict[str, Any] = {}

    async def watch() -> None:
        await asyncio.sleep(args.seconds / 2)
        found["bytes"] = memory() - before
        began, cpu, first = time.perf_counter(), time.process_time(), engine.answered
        await asyncio.sleep(args.seconds / 2)
        spent = time.perf_counter() - began
        found["rate"] = (engine.answered - first) / spent
        found["cpu"] = (time.process_time() - cpu) / spent

    playing = play_groups(talk, plans(), {"agent": player}, concurrency=args.live)
    watching = asyncio.create_task(watch())
    async with aclosing(playing) as groups:
        async for group in groups:
            assert group.complete, group
            if watching.done():
                break
    return report(args, found["rate"], found["cpu"]) | {
        "kB per episode": round(found["bytes"] / args.live / 1e3, 1)
    }


def report(args: argparse.Namespace, rate: float, cpu: float) -> dict[str, Any]:
    ideal = args.live / args.latency
    return {
        "turns/s": round(rate),
        "of the ideal": round(rate / ideal, 3),
        "cores busy": round(cpu, 2),
    }


async def on_ray(args: argparse.Namespace, chat: Chat) -> dict[str, Any]:
    """Measure env workers, one replica, and this process as the driver."""
    options = {"concurrency": args.live // args.workers, "env_workers": args.workers}
    async with open_rollouts(
        f"{HERE}:talk", chat.reply(REPLY), latency=args.latency, **options
    ) as (rollouts, handle):
        size = 16
        episodes = int(args.live / args.latency / TURNS * args.seconds * 1.3) + args.live
        playing = asyncio.create_task(
            rollouts.collect(list(itertools.islice(plans(size), episodes // size)))
        )
        await asyncio.sleep(args.seconds)  # env workers start slowly: wait twice as long
        began, first, accounts = time.perf_counter(), await counts_of(handle), Accounts()
        await asyncio.sleep(args.seconds / 2)
        spent, last = time.perf_counter() - began, await counts_of(handle)
        cpu, cores = accounts.spent(), accounts.cores()
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
    turns, calls = last[0] - first[0], last[1] - first[1]
    return report(args, turns / spent, sum(cpu.values()) / spent) | {
        "driver ms per episode": round(1000 * cpu["driver"] / turns * TURNS, 3),
        "available cores": round(cores, 2),
        "requests per call": round(turns / calls, 1),
        "CPU ms per turn": {who: round(1000 * s / turns, 4) for who, s in cpu.items()},
    }


def main() -> None:
    """Measure both and print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--live", type=int, default=10_000)
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--only", choices=("process", "ray"), help="measure only this one")
    args = parser.parse_args()
    chat = Chat.load(str(model_dir("embedded")))
    if args.only != "ray":
        print(json.dumps({"one process": asyncio.run(in_process(args, chat))}), flush=True)
    if args.only != "process":
        print(json.dumps({"on Ray": asyncio.run(on_ray(args, chat))}))


if __name__ == "__main__":
    main()
