"""What a call of Ray Serve costs an env worker, and how much of that batching saves.

    python benchmarks/serve_cost.py [--live 128] [--turns 8] [--step-ms 4]

A stand-in engine answers each request after a random number of steps of `--step-ms`, as with
continuous batching: some requests finish at each step. One worker keeps `--live` conversations
going. Compared: the engine in the worker's own process (nothing between), the batching client over
Serve (what env workers use), and a call of the Serve handle per request. Printed as JSON: turns per
second, CPU milliseconds per turn of worker and replica, and milliseconds added to a turn of a
conversation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from accounts import Accounts  # beside this file

from rayrl.cluster.serving.inference_client import DEPLOYMENT, BatchingClient, ServeReplicas
from rayrl.cluster.serving.replica import deploy
from rayrl.cluster.session import open_session
from rayrl.config import Config, from_dict
from rayrl.types import Completion, Request, Sampling, VersionSpan


class StandIn:
    """An engine whose requests end 4 to 12 steps after they came; a step takes `step_s`."""

    version = 0

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._live: list[tuple[int, asyncio.Future[Completion]]] = []
        self._steps = 0
        self._runner: asyncio.Task[None] | None = None

    async def generate(self, request: Request) -> Completion:
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        last = self._steps + random.Random(request.seed).randint(4, 12)
        self._live.append((last, future))
        return await future

    async def _run(self) -> None:
        ids = tuple(range(12))
        done = Completion(ids, (-0.5,) * 12, (VersionSpan(0, 0, 12),), "stop")
        while True:
            await asyncio.sleep(self._step_s)
            self._steps += 1
            for last, future in self._live:
                if last <= self._steps and not future.done():
                    future.set_result(done)
            self._live = [item for item in self._live if item[0] > self._steps]

    def release(self, sessions: Sequence[str]) -> None:
        pass

    async def check(self) -> None:
        pass

    async def load_weights(self, *_: Any) -> str:
        return ""

    async def close(self) -> None:
        pass


class OneByOne:
    """One handle call per request: what batching avoids."""

    def __init__(self, app: str, by_reference: bool) -> None:
        from ray import serve

        handle = serve.get_deployment_handle(DEPLOYMENT, app)
        self._handle = handle.options(method_name="probe", _by_reference=by_reference)

    async def generate(self, request: Request) -> Completion:
        completion: Completion
        _, (completion,) = await self._handle.remote([request])
        return completion


class Counting(ServeReplicas):
    """Counts the batches and their sizes."""

    def __init__(self, app: str) -> None:
        super().__init__(app)
        self.sizes: list[int] = []

    async def submit(
        self, index: int, requests: Sequence[tuple[int, Request]], released: Sequence[str]
    ) -> str:
        self.sizes.append(len(requests))
        return await super().submit(index, requests, released)


class Worker:
    """Keeps conversations going and times it."""

    async def play(self, kind: str, app: str, live: int, turns: int, step_s: float) -> Any:
        counting = Counting(app)
        clients: dict[str, Any] = {
            "in process": partial(StandIn, step_s),
            "batched": partial(BatchingClient, counting, count=1, deadline_s=60),
            "a call each": partial(OneByOne, app, False),
            "a call each, by reference": partial(OneByOne, app, True),
        }
        client = clients[kind]()
        prompt = tuple(range(200))

        async def conversation(k: int, turns: int) -> None:
            for turn in range(turns):
                seed = k * 1000 + turn
                await client.generate(Request(f"c{k}", prompt, Sampling(), seed=seed))

        await asyncio.gather(*(conversation(k, 1) for k in range(live)))
        counting.sizes.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(conversation(k, turns) for k in range(live)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        n = live * turns
        return {
            "turns_per_s": round(n / wall),
            "seconds": round(wall, 2),
            "worker_cpu_ms_per_turn": round(1000 * cpu / n, 3),
            "calls": len(counting.sizes),
            "requests_per_call": round(n / max(1, len(counting.sizes)), 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--live", type=int, default=128)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--step-ms", type=float, default=4.0)
    args = parser.parse_args()
    import ray  # after rayrl.cluster, which sets what Ray reads when it is imported

    config: Config = from_dict({})
    step_s = args.step_ms / 1000
    with open_session(config.cluster) as session:
        asyncio.run(
            deploy(session, config, partial(StandIn, step_s), app="serve-cost", store=False)
        )
        worker = ray.remote(num_cpus=0)(Worker).remote()
        found = {}
        for kind in ("in process", "batched", "a call each", "a call each, by reference"):
            accounts = Accounts()
            found[kind] = ray.get(
                worker.play.remote(kind, "serve-cost", args.live, args.turns, step_s)
            )
            turns = args.live * (args.turns + 1)  # the first, which is not timed, included
            cpu_s = accounts.spent()["replica"]
            found[kind]["replica_cpu_ms_per_turn"] = round(1000 * cpu_s / turns, 3)
    base = found["in process"]["seconds"]
    for kind, figures in found.items():
        figures["added_ms_per_turn"] = round(1000 * (figures["seconds"] - base) / args.turns, 1)
        print(json.dumps({"client": kind, **figures}))


if __name__ == "__main__":
    main()
