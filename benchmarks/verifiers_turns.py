"""Turns per CPU second of verifiers' own rollouts and of `env.name=verifiers:ID`, side by side.

    python benchmarks/verifiers_turns.py [--turns 4] [--live 64] [--repeat 5]

The same environment, of verifiers' classes, on both sides: a conversation of `--turns` turns whose
replies are there at once, and a rubric of one function. In verifiers an in-process client answers
with a constant (`run_rollout`, what its evaluations and its trainer call). In rayrl the same loop
of verifiers runs inside an episode, and each turn is tokenized, decoded and recorded besides. Both
run in this process, in turn; the best of `--repeat` counts.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import time
from typing import Any

import verifiers as vf
from datasets import Dataset
from fake_engine import FakeEngine  # in this folder
from verifiers.clients import Client
from verifiers.types import Response, ResponseMessage, Usage

import rayrl
from rayrl import Sampling
from rayrl.chat.renderer import Chat
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.weights.model_dir import model_dir

REPLY = "<move>4</move>"


class Talk(vf.MultiTurnEnv):
    """Some turns, whatever the replies."""

    async def setup_state(self, state: Any) -> Any:
        state["asked"] = 1  # the question in the dataset is the first turn's message
        return state

    async def env_response(self, messages: Any, state: Any, **_: Any) -> list[Any]:
        k = state["asked"]
        state["asked"] += 1
        return [vf.UserMessage(content=f"turn {k}: your move")]


async def asked(state: Any) -> float:
    return float(state["asked"])


def load_environment(turns: int = 4) -> vf.Environment:
    rows = [{"question": "turn 0: your move", "answer": ""} for _ in range(64)]
    return Talk(dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[asked]), max_turns=turns)


class Instant(Client):  # type: ignore[type-arg]
    """Answer every request at once with the same message."""

    def setup_client(self, config: Any) -> None:
        return None

    async def to_native_tool(self, tool: Any) -> Any:
        return tool

    async def to_native_prompt(self, messages: Any) -> Any:
        return messages, {}

    async def raise_from_native_response(self, response: Any) -> None:
        return None

    async def from_native_response(self, response: Any) -> Any:
        return response

    async def close(self) -> None:
        return None

    async def get_native_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
    ) -> Response:
        message = ResponseMessage(content=REPLY, finish_reason="stop", is_truncated=False)
        usage = Usage(prompt_tokens=50, reasoning_tokens=0, completion_tokens=10, total_tokens=60)
        return Response(id="r", created=0, model=model, usage=usage, message=message)


async def of_verifiers(turns: int, live: int, episodes: int) -> float:
    environment = load_environment(turns)
    rows = environment.get_dataset().to_list()
    client, limit = Instant(None), asyncio.Semaphore(live)

    async def play(number: int) -> Any:
        async with limit:
            return await environment.run_rollout(rows[number % len(rows)], client, "model", {})

    began = time.process_time()
    done = await asyncio.gather(*(play(number) for number in range(episodes)))
    spent = time.process_time() - began
    assert all(one["metrics"]["num_turns"] == turns and one["error"] is None for one in done)
    return episodes * turns / spent


async def of_rayrl(player: PolicyPlayer, turns: int, live: int, episodes: int) -> float:
    env = rayrl.load_env(f"verifiers:{__file__}").configure({"turns": turns})
    plans = [GroupPlan(f"g{k}", task, 1, k) for k, task in enumerate(env.tasks(0, episodes))]
    began, done = time.process_time(), 0
    async for group in play_groups(env, plans, {"agent": player}, concurrency=live):
        (episode,) = group.episodes
        assert episode.failure is None, episode.failure
        assert len({turn.conversation for turn in episode.turns}) == 1
        done += len(episode.turns)
    assert done == episodes * turns
    return done / (time.process_time() - began)


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--live", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    chat = Chat.load(model_dir("embedded"))
    player = PolicyPlayer(chat, FakeEngine(chat.reply(REPLY)), Sampling())
    gc.collect()
    gc.freeze()  # what was imported: a collection of it would cost whoever it hits 0.2 s
    best = {"verifiers": 0.0, "rayrl": 0.0}
    for _ in range(args.repeat):
        theirs = await of_verifiers(args.turns, args.live, args.episodes)
        ours = await of_rayrl(player, args.turns, args.live, args.episodes)
        gc.collect()
    gc.freeze()  # what was imported: a collection of it would cost whoever it hits 0.2 s
    best = {"verifiers": max(best["verifiers"], theirs), "rayrl": max(best["rayrl"], ours)}
    print(
        f"verifiers {vf.__version__}: {args.turns} turns, {args.live} live, best of {args.repeat}, "
        f"turns per CPU second: {best['verifiers']:,.0f}; as verifiers:ID {best['rayrl']:,.0f} "
        f"({best['rayrl'] / best['verifiers']:.2f})"
    )


if __name__ == "__main__":
    asyncio.run(main())
