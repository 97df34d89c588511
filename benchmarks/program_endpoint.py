"""Turns per CPU second of the ways in which an agent program can ask the model.

    python benchmarks/program_endpoint.py

The same conversation of `--turns` turns, `--live` episodes at once, an instant engine, one process
for server and client: `agent(…)` in an environment; `agent.respond`, with all messages each time;
and over HTTP, by a client of aiohttp, by OpenAI's library and by Anthropic's. The last two spend
most of the time in the library itself. The floor of the HTTP path is what aiohttp needs for a
request that is answered with a constant ("empty"), client included.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import anthropic
import openai
from aiohttp import web
from fake_engine import FakeEngine

import rayrl
from rayrl import Agent, Sampling, Scores, Task
from rayrl.chat.renderer import Chat
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.weights.model_dir import model_dir

REPLY = "<move>4</move>"
Ask = Callable[[list[dict[str, Any]]], Awaitable[dict[str, Any]]]
Talk = Callable[[Agent, int], Awaitable[None]]


async def converse(ask: Ask, turns: int) -> None:
    messages: list[dict[str, Any]] = []
    for k in range(turns):
        messages.append({"role": "user", "content": f"turn {k}: your move"})
        messages.append(await ask(messages))


async def natively(agent: Agent, turns: int) -> None:
    for k in range(turns):
        await agent(f"turn {k}: your move")


async def in_process(agent: Agent, turns: int) -> None:
    await converse(agent.respond, turns)


async def by_aiohttp(agent: Agent, turns: int) -> None:
    async with agent.endpoint() as at:
        headers = {"Authorization": f"Bearer {at.key}"}

        async def ask(messages: list[dict[str, Any]]) -> dict[str, Any]:
            body = {"model": "policy", "messages": messages}
            url = f"{at.url}/chat/completions"
            async with SESSION[0].post(url, json=body, headers=headers) as answer:
                reply: dict[str, Any] = (await answer.json())["choices"][0]["message"]
                return reply

        await converse(ask, turns)


async def by_openai(agent: Agent, turns: int) -> None:
    async with agent.endpoint() as at:
        client = OPENAI[0].with_options(base_url=at.url, api_key=at.key)

        async def ask(messages: list[Any]) -> dict[str, Any]:
            answer = await client.chat.completions.create(model="policy", messages=messages)
            return answer.choices[0].message.model_dump(exclude_none=True)

        await converse(ask, turns)


async def by_anthropic(agent: Agent, turns: int) -> None:
    async with agent.endpoint() as at:
        base = at.variables["ANTHROPIC_BASE_URL"]
        client = ANTHROPIC[0].with_options(base_url=base, api_key=at.key)

        async def ask(messages: list[Any]) -> dict[str, Any]:
            answer = await client.messages.create(model="policy", max_tokens=64, messages=messages)
            return {"role": "assistant", "content": [b.model_dump() for b in answer.content]}

        await converse(ask, turns)


SESSION: list[aiohttp.ClientSession] = []
OPENAI: list[openai.AsyncOpenAI] = []
ANTHROPIC: list[anthropic.AsyncAnthropic] = []
WAYS: dict[str, Talk] = {
    "agent(…)": natively,
    "agent.respond": in_process,
    "aiohttp": by_aiohttp,
    "openai": by_openai,
    "anthropic": by_anthropic,
}


async def measure(talk: Talk, player: PolicyPlayer, turns: int, live: int, episodes: int) -> float:
    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def play(task: Task, agent: Agent) -> Scores:
        await talk(agent, turns)
        return {"n": 1.0}

    plans = [GroupPlan(f"g{k}", Task(), 1, k) for k in range(episodes)]
    began, done = time.process_time(), 0
    async for group in play_groups(play, plans, {"agent": player}, concurrency=live):
        assert group.complete, group.episodes[0].failure
        assert len({turn.conversation for turn in group.episodes[0].turns}) == 1
        done += len(group.episodes[0].turns)
    return done / (time.process_time() - began)


async def empty(requests: int) -> float:
    """Requests per CPU second that are answered with a constant."""

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": ""}}]})

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = "http://{}:{}/".format(*runner.addresses[0][:2])
    body = {"messages": [{"role": "user", "content": "turn 0: your move"}] * 4}
    began = time.process_time()

    async def ask() -> None:
        for _ in range(requests // 64):
            async with SESSION[0].post(url, json=body) as answer:
                await answer.json()

    await asyncio.gather(*[ask() for _ in range(64)])
    spent = time.process_time() - began
    await runner.cleanup()
    return requests // 64 * 64 / spent


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--live", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    chat = Chat.load(model_dir("embedded"))
    player = PolicyPlayer(chat, FakeEngine(chat.reply(REPLY)), Sampling())
    best = dict.fromkeys(["empty", *WAYS], 0.0)
    SESSION.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    OPENAI.append(openai.AsyncOpenAI(api_key="-"))
    ANTHROPIC.append(anthropic.AsyncAnthropic(api_key="-"))
    for _ in range(args.repeat):
        best["empty"] = max(best["empty"], await empty(2048))
        for way, talk in WAYS.items():
            episodes = args.live * (2 if way in ("openai", "anthropic") else 8)
            rate = await measure(talk, player, args.turns, args.live, episodes)
            best[way] = max(best[way], rate)
    await SESSION[0].close()
    await OPENAI[0].close()
    await ANTHROPIC[0].close()
    print(f"{args.turns} turns, {args.live} live; best of {args.repeat}, per CPU second:")
    for way, rate in best.items():
        print(f"  {way:<14} {rate:8,.0f}")


if __name__ == "__main__":
    asyncio.run(main())
