"""Thousands of episodes live at once: memory of each, and throughput against the ideal.

    python benchmarks/many_live.py [--live 10000] [--latency 1.0] [--hosts 2] [--seconds 20]

An environment of eight turns and a *fake* engine that answers after a delay (half to one and a half
of `--latency`, drawn for each request) and computes nothing: what is measured is all around
generation. With L episodes live and a mean latency of t seconds no system can make more than L / t
turns a second: the ideal. Turns are counted in the last half of `--seconds`, when starts have
spread. First in one process, then through env workers and one replica on Ray. Printed as JSON.
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
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from accounts import Accounts  # beside this file
from fake_engine import FakeEngine, counts_of

import rayrl
from rayrl import Agent, Sampling, Scores, Task
from rayrl.chat.renderer import Chat
from rayrl.cluster.session import GC_EVERY
from rayrl.engine.protocol import Engine
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.weights.model_dir import model_dir

TURNS = 8
REPLY = "<move>4</move>"
HERE = Path(__file__).resolve()


@rayrl.env(tasks=[Task()], rewards={"turns": 1.0})
async def talk(task: Task, agent: Agent) -> Scores:
    """Eight turns, whatever is answered."""
    for k in range(TURNS):
        await agent(f"turn {k}: your move")
    return {"turns": float(agent.turns)}


def plans(group: int = 1) -> Iterator[GroupPlan]:
    """Without an end."""
    for k in itertools.count():
        yield GroupPlan(str(k), Task(seed=k), group, k)


def memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


async def in_process(args: argparse.Namespace, chat: Chat) -> dict[str, Any]:
    """One event loop, set up as an env worker's."""
    gc.set_threshold(GC_EVERY, 10, 10)
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
        "kB an episode": round(found["bytes"] / args.live / 1e3, 1)
    }


def report(args: argparse.Namespace, rate: float, cpu: float) -> dict[str, Any]:
    ideal = args.live / args.latency
    return {
        "turns/s": round(rate),
        "of the ideal": round(rate / ideal, 3),
        "cores busy": round(cpu, 2),
    }


async def on_ray(args: argparse.Namespace, chat: Chat) -> dict[str, Any]:
    """Env workers, one replica, and this process as the driver."""
    from rayrl.cluster.rollouts import Rollouts
    from rayrl.cluster.serving.replica import deploy
    from rayrl.cluster.session import open_session
    from rayrl.cluster.workers.env_worker import WorkerJob
    from rayrl.config import from_dict

    where = f"{HERE}:talk"
    share = args.live // args.hosts
    config = from_dict(
        {"env": {"name": where}, "cluster": {"concurrency": share, "env_workers": args.hosts}}
    )
    make = partial(FakeEngine, chat.reply(REPLY), args.latency)

    def engine() -> Engine:
        return make()  # type: ignore[return-value]  # all that playing needs of one

    with open_session(config.cluster) as session:
        app = f"{session.name}-fake"
        handle = await deploy(session, config, engine, app=app, store=False)
        models, apps = {"policy": str(model_dir("embedded"))}, {"policy": app}
        spec = rayrl.load_env(where).spec
        rollouts = Rollouts(WorkerJob(spec, {"agent": "policy"}, Sampling(), config, models, apps))

        try:
            await rollouts.ready()
            size = 16
            episodes = int(args.live / args.latency / TURNS * args.seconds * 1.3) + args.live
            playing = asyncio.create_task(
                rollouts.collect(list(itertools.islice(plans(size), episodes // size)))
            )
            await asyncio.sleep(args.seconds)  # hosts start slower: the whole time spreads them
            began, first, accounts = time.perf_counter(), await counts_of(handle), Accounts()
            await asyncio.sleep(args.seconds / 2)
            spent, last = time.perf_counter() - began, await counts_of(handle)
            cpu, cores = accounts.spent(), accounts.cores()
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
        finally:
            rollouts.close()
    turns, calls = last[0] - first[0], last[1] - first[1]
    return report(args, turns / spent, sum(cpu.values()) / spent) | {
        "driver's ms an episode": round(1000 * cpu["driver"] / turns * TURNS, 3),
        "cores there": round(cores, 2),
        "requests a call": round(turns / calls, 1),
        "CPU ms a turn": {who: round(1000 * s / turns, 4) for who, s in cpu.items()},
    }


def main() -> None:
    """Both, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--live", type=int, default=10_000)
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--only", choices=("process", "ray"), help="leave the other one out")
    args = parser.parse_args()
    chat = Chat.load(str(model_dir("embedded")))
    if args.only != "ray":
        print(json.dumps({"one process": asyncio.run(in_process(args, chat))}), flush=True)
    if args.only != "process":
        print(json.dumps({"on Ray": asyncio.run(on_ray(args, chat))}))


if __name__ == "__main__":
    main()
