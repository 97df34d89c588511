"""Turns per second of the rollout stack alone, with a 4-turn environment and an instant engine.

    python benchmarks/rollouts.py                                  rayrl in one process
    python benchmarks/rollouts.py --ray                            and through env workers and Serve
    python benchmarks/rollouts.py --peer .venv-verifiers/bin/python   and the same on `verifiers`

For the peer: `python -m venv .venv-verifiers && .venv-verifiers/bin/pip install 'verifiers<0.4'`
(0.3 is the last release of its v0 interface, the faster one).

Both sides play the same conversation with the same texts. rayrl does more per turn: it keeps the
conversation as ids (tokenizes new messages, decodes the reply) with a logprob each; verifiers
passes messages as text. After a warm-up the sides alternate and the best of `--repeat` counts,
because load on the machine only makes runs slower. On a busy machine compare turns per CPU second:
both sides are one thread that never waits. Both collect garbage as rarely as env workers do: at
Python's default, collection is a third of rayrl's time, and grows with what has been imported.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accounts import Accounts  # in this folder
from fake_engine import FakeEngine
from local_rollouts import open_rollouts

import rayrl
from rayrl import Agent, Sampling, Scores, Task
from rayrl.chat.renderer import Chat
from rayrl.cluster.actors import GC_THRESHOLD
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.weights.model_dir import model_dir

TURNS = 4
REPLY = "<move>4</move>"
HERE = Path(__file__).resolve()
PEER = HERE.parent / "peers" / "verifiers_rollouts.py"


@dataclass(frozen=True)
class Spent:
    """Wall and CPU seconds."""

    wall: float
    cpu: float


@rayrl.env(tasks=[Task()], rewards={"turns": 1.0})
async def game(task: Task, agent: Agent) -> Scores:
    """Four turns, whatever the replies."""
    for k in range(TURNS):
        await agent(f"turn {k}: your move")
    return {"turns": float(agent.turns)}


def plans(n: int) -> list[GroupPlan]:
    """Plan groups of one episode, as verifiers counts them."""
    return [GroupPlan(str(k), Task(seed=k), 1, k) for k in range(n)]


async def in_process(chat: Chat, n: int, concurrency: int) -> Spent:
    """Play `n` episodes in this process."""
    player = PolicyPlayer(chat, FakeEngine(chat.reply(REPLY)), Sampling())
    began, cpu = time.perf_counter(), time.process_time()
    async for group in play_groups(game, plans(n), {"agent": player}, concurrency=concurrency):
        assert group.complete, group
    return Spent(time.perf_counter() - began, time.process_time() - cpu)


async def on_ray(
    chat: Chat, model: str, n: int, concurrency: int, repeat: int
) -> tuple[float, float]:
    """Play `n` episodes through one env worker and one replica.

    Returns:
        Seconds, the best of `repeat`, and the available cores.
    """
    options = {"model": model, "concurrency": concurrency}
    async with open_rollouts(f"{HERE}:game", chat.reply(REPLY), **options) as (rollouts, _):
        await rollouts.collect(plans(64))  # warm-up
        seconds = []
        accounts = Accounts()
        for _ in range(repeat):
            began = time.perf_counter()
            played = await rollouts.collect(plans(n))
            seconds.append(time.perf_counter() - began)
            assert len(played.groups) == n
        cores = accounts.cores()
    return min(seconds), cores


def on_peer(python: str, n: int, concurrency: int) -> Spent:
    """Play `n` episodes on verifiers, measured in its own process after a warm-up."""
    command = [python, str(PEER), "--episodes", str(n), "--concurrency", str(concurrency)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"the peer failed; is verifiers<0.4 installed for {python}?\n{done.stderr[-2000:]}"
        )
    return Spent(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, then print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded", help="whose tokenizer is used")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="also through env workers and Serve")
    parser.add_argument("--peer", default="", help="a Python that has verifiers<0.4")
    options = parser.parse_args()
    gc.set_threshold(GC_THRESHOLD, 10, 10)
    n, repeat = options.episodes, options.repeat
    chat = Chat.load(str(model_dir(options.model)))

    print(f"{n} episodes of {TURNS} turns; turns per second, best of {repeat}")
    print(f"{'live':>5} {'':<18} {'wall':>9} {'cpu':>9}")
    for live in options.concurrency:
        ours, theirs = [], []
        asyncio.run(in_process(chat, 64, live))  # warm-up
        for _ in range(repeat):
            ours.append(asyncio.run(in_process(chat, n, live)))
            if options.peer:
                theirs.append(on_peer(options.peer, n, live))
        wall, cpu = show(live, "rayrl", n, ours)
        if options.ray:
            seconds, _ = asyncio.run(on_ray(chat, options.model, n, live, repeat))
            print(f"{live:>5} {'rayrl on Ray':<18} {n * TURNS / seconds:>9,.0f}", flush=True)
        if theirs:
            peer_wall, peer_cpu = show(live, "verifiers", n, theirs)
            print(f"{live:>5} {'ratio':<18} {wall / peer_wall:>8.1f}x {cpu / peer_cpu:>8.1f}x")


def show(live: int, name: str, n: int, runs: Sequence[Spent]) -> tuple[float, float]:
    """Print and return turns per second of the wall clock and of the processor."""
    wall = n * TURNS / min(run.wall for run in runs)
    cpu = n * TURNS / min(run.cpu for run in runs)
    print(f"{live:>5} {name:<18} {wall:>9,.0f} {cpu:>9,.0f}", flush=True)
    return wall, cpu


if __name__ == "__main__":
    main()
