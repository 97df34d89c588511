"""CPU milliseconds per turn by process, of the ways in which an environment can ask the model.

    python benchmarks/turn_costs.py [--only agent respond http program]

On a local Ray with one env worker, one Serve replica of an instant engine, and this process as the
driver; the same conversation of four turns each time:

- agent: `await agent(…)`, the environment's own coroutine;
- respond: `agent.respond`, with all messages each time;
- http: `agent.endpoint()`, asked by aiohttp's client inside the env worker;
- program: a program of each episode's own, which has the same conversation by OpenAI's library,
  imported once (`preload`).

"programs" are the processes that the env worker has started; "Ray's own" are the raylet, the GCS,
the agents, Serve's controller and its proxy. Load beside it changes seconds far less than turns per
second, which are therefore not printed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from accounts import Accounts  # in this folder
from local_rollouts import open_rollouts

import rayrl
from rayrl import Agent, Scores, Task
from rayrl.chat.renderer import Chat
from rayrl.rollout.rollout import GroupPlan
from rayrl.weights.model_dir import model_dir

TURNS = 4
GROUP = 16
REPLY = "<move>4</move>"
HERE = Path(__file__).resolve()
PROGRAM = f"""
import os, openai
client, messages = openai.OpenAI(), []
for k in range({TURNS}):
    messages.append({{"role": "user", "content": f"turn {{k}}: your move"}})
    answer = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=messages)
    messages.append({{"role": "assistant", "content": answer.choices[0].message.content}})
print(messages[-1]["content"])
"""
GROUPS = {"agent": 128, "respond": 64, "http": 64, "program": 8}
SHOWN = ("env worker", "programs", "replica", "recorder", "driver")


@rayrl.env(tasks=[Task()], rewards={"turns": 1.0})
async def agent(task: Task, agent: Agent) -> Scores:
    for k in range(TURNS):
        await agent(f"turn {k}: your move")
    return {"turns": float(agent.turns)}


@rayrl.env(tasks=[Task()], rewards={"turns": 1.0})
async def respond(task: Task, agent: Agent) -> Scores:
    messages: list[Mapping[str, Any]] = []
    for k in range(TURNS):
        messages.append({"role": "user", "content": f"turn {k}: your move"})
        messages.append(await agent.respond(messages))
    return {"turns": float(agent.turns)}


@rayrl.env(tasks=[Task()], rewards={"turns": 1.0})
async def http(task: Task, agent: Agent) -> Scores:
    messages: list[dict[str, Any]] = []
    async with agent.endpoint() as at, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {at.key}"}
        for k in range(TURNS):
            messages.append({"role": "user", "content": f"turn {k}: your move"})
            body = {"model": "policy", "messages": messages}
            url = f"{at.url}/chat/completions"
            async with session.post(url, json=body, headers=headers) as answer:
                messages.append((await answer.json())["choices"][0]["message"])
    return {"turns": TURNS}


@rayrl.env(tasks=[Task()], rewards={"turns": 1.0})
async def program(task: Task, agent: Agent) -> Scores:
    done = await agent.program([sys.executable, "-c", PROGRAM], preload=["openai"], check=True)
    assert done.stdout.strip() == REPLY
    return {"turns": TURNS}


async def measure(way: str, chat: Chat) -> Mapping[str, float]:
    """CPU milliseconds per turn by role."""

    def plans(n: int, start: int) -> list[GroupPlan]:
        return [GroupPlan(str(k), Task(seed=k), GROUP, k) for k in range(start, start + n)]

    async with open_rollouts(f"{HERE}:{way}", chat.reply(REPLY), concurrency=64) as (rollouts, _):
        warm_up, n = 2, GROUPS[way]
        await rollouts.collect(plans(warm_up, 0))
        accounts = Accounts()
        collected = await rollouts.collect(plans(n, warm_up))
        spent = accounts.spent()
    turns = sum(len(one.turns) for group in collected.groups for one in group.episodes)
    assert turns == n * GROUP * TURNS, [group.episodes[0].failure for group in collected.groups]
    return {role: 1000 * seconds / turns for role, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    ways = parser.parse_args().only
    chat = Chat.load(str(model_dir("embedded")))
    print(f"{'ms per turn':<12}", *(f"{one:>11}" for one in (*SHOWN, "Ray's own", "in all")))
    for way in ways:
        spent = asyncio.run(measure(way, chat))
        shown = [spent.get(role, 0.0) for role in SHOWN]
        rest = sum(spent.values()) - sum(shown)
        print(f"{way:<12}", *(f"{one:11.3f}" for one in (*shown, rest, sum(spent.values()))))


if __name__ == "__main__":
    main()
