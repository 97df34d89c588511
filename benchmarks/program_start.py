"""What an agent program of its own costs per episode, by process, with and without `preload`.

    python benchmarks/program_start.py

The program imports OpenAI's Agents SDK, asks once and prints the answer; the engine is instant.
Milliseconds of processor time per program: of this process, which has the endpoint; of the programs
(with `preload`, of the clients that stand for them); and of the process that imports, with what it
forks. Wall time per program for `--live` episodes at once. The ways take turns, `--rounds` times;
the median is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import sys
import time
from collections.abc import Sequence

import psutil
from fake_engine import FakeEngine

import rayrl
from rayrl import Agent, Sampling, Scores, Task
from rayrl.chat.renderer import Chat
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.weights.model_dir import model_dir

PROGRAM = """
import asyncio, os
from agents import Agent, Runner
agent = Agent(name="a", instructions="Play.", model=os.environ["OPENAI_MODEL"])
print(asyncio.run(Runner.run(agent, "Your move.")).final_output)
"""
REPLY = "<move>4</move>"


def spent() -> list[float]:
    """Processor seconds: of this process, of children that have ended, of those that live."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    living = [sum(child.cpu_times()[:4]) for child in psutil.Process().children()]
    return [*(one.ru_utime + one.ru_stime for one in used), sum(living)]


async def measure(
    player: PolicyPlayer, modules: Sequence[str], episodes: int, live: int
) -> list[float]:
    """Milliseconds per program: wall time, then as `spent`."""

    @rayrl.env(tasks=[Task()], rewards={"right": 1.0})
    async def play(task: Task, agent: Agent) -> Scores:
        done = await agent.program([sys.executable, "-c", PROGRAM], preload=modules)
        return {"right": float(done.stdout.strip() == REPLY)}

    plans = [GroupPlan(f"g{k}", Task(), 1, k) for k in range(episodes)]
    before, began = spent(), time.perf_counter()
    async for group in play_groups(play, plans, {"agent": player}, concurrency=live):
        assert group.episodes[0].scores["agent"]["right"] == 1.0, group.episodes[0].failure
    wall = time.perf_counter() - began
    used = [wall, *(b - a for a, b in zip(before, spent(), strict=True))]
    return [1000 * one / episodes for one in used]


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--live", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    chat = Chat.load(model_dir("embedded"))
    player = PolicyPlayer(chat, FakeEngine(chat.reply(REPLY)), Sampling())
    ways: dict[str, Sequence[str]] = {"its own imports": (), "preload": ["agents"]}
    await measure(player, ways["preload"], 1, 1)  # the import itself
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, modules in ways.items():
            found[way].append(await measure(player, modules, args.episodes, args.live))
    print(f"{args.live} live, ms per program      wall  here  programs  forked")
    for way, rounds in found.items():
        wall, here, programs, forked = (statistics.median(k) for k in zip(*rounds, strict=True))
        print(f"  {way:<28} {wall:8.0f} {here:5.1f} {programs:9.0f} {forked:7.0f}")


if __name__ == "__main__":
    asyncio.run(main())
