"""The environment of `benchmarks/rollouts.py` on verifiers 0.3 (its v0 interface), same texts.

Run by that script in an environment with `verifiers<0.4`; prints one line of JSON. The model is a
client in this process that answers immediately, so that only the rollout stack is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import time
from typing import Any

import verifiers as vf
from datasets import Dataset
from verifiers.clients.client import Client
from verifiers.types import Response, ResponseMessage, Usage

TURNS = 4
WARM_UP = 64


class Game(vf.MultiTurnEnv):
    """Four turns, whatever the replies."""

    async def setup_state(self, state: Any) -> Any:
        state["asked"] = 1  # the question in the data set is the first turn's message
        return state

    async def env_response(self, messages: Any, state: Any, **_: Any) -> list[dict[str, str]]:
        k = state["asked"]
        state["asked"] += 1
        return [{"role": "user", "content": f"turn {k}: your move"}]


async def turns(state: Any, **_: Any) -> float:
    """Score: number of turns."""
    return float(state["asked"])


class Instant(Client):
    """Answer every request immediately with the same message."""

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
        message = ResponseMessage(
            role="assistant", content="<move>4</move>", finish_reason="stop", is_truncated=False
        )
        usage = Usage(prompt_tokens=50, reasoning_tokens=0, completion_tokens=10, total_tokens=60)
        return Response(id="r", created=0, model=model, usage=usage, message=message)


async def measure(episodes: int, concurrency: int) -> dict[str, float]:
    rows = [{"question": "turn 0: your move", "answer": ""} for _ in range(episodes)]
    rubric = vf.Rubric(funcs=[turns])
    env = Game(dataset=Dataset.from_list(rows), rubric=rubric, max_turns=TURNS)
    inputs = env.get_dataset().to_list()
    client = Instant(None)
    limit = asyncio.Semaphore(concurrency)

    async def play(row: Any) -> Any:
        async with limit:
            return await env.run_rollout(row, client, "model", {})

    await asyncio.gather(*(play(row) for row in inputs[:WARM_UP]))
    began, cpu = time.perf_counter(), time.process_time()
    done = await asyncio.gather(*(play(row) for row in inputs))
    spent = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    for rollout in done:
        assert rollout["error"] is None, rollout["error"]
        assert rollout["metrics"]["num_turns"] == TURNS, rollout["metrics"]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    gc.set_threshold(50_000, 10, 10)  # as on the other side
    print(json.dumps(asyncio.run(measure(options.episodes, options.concurrency))))


if __name__ == "__main__":
    main()
