"""How long `/health` takes to answer while clients send what is large.

    python benchmarks/server_load.py [--seconds 5]

One server (the embedded base behind uvicorn, in a process of its own) is asked for `/health` every
20 ms while another client sends the same large request over and over: 500,000 messages of a letter,
a text of 4 MB, a prompt that just fits, JSON nested 100,000 deep, lists of numbers. Printed as JSON
for each: requests that were answered and with which status, milliseconds until the first answer,
and the median and the greatest time to `/health` in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import httpx

EVERY_S = 0.02


def serve(told: Connection) -> None:
    """Serve the embedded base on a free port, which is told."""
    import socket

    import uvicorn

    from rayrl.chat.renderer import Chat
    from rayrl.config import EngineConfig
    from rayrl.engine.embedded.engine import EmbeddedEngine
    from rayrl.server.app import Service, make_app
    from rayrl.weights.model_dir import EMBEDDED, model_dir

    settings = EngineConfig(max_live=8, kv_cache_gb=0.05)
    engine = EmbeddedEngine.load(model_dir(EMBEDDED), settings, raw_logprobs=True)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        told.send((sock.getsockname()[1], engine.max_len))
        app = make_app(Service(engine, Chat.load(EMBEDDED), "m"))
        uvicorn.Server(uvicorn.Config(app, log_config=None)).run([sock])


def loads(max_len: int) -> dict[str, bytes]:
    """Bodies of requests by name."""

    def chat(messages: Any, **more: Any) -> bytes:
        return json.dumps({"model": "m", "messages": messages, "max_tokens": 1, **more}).encode()

    letters = [{"role": ("user", "assistant")[k % 2], "content": "a"} for k in range(500_000)]
    return {
        "a small request": chat([{"role": "user", "content": "Hello!"}]),
        "500,000 messages": chat(letters),
        "4 MB of text": chat([{"role": "user", "content": "lazy dogs " * 400_000}]),
        "a text that may fit": chat([{"role": "user", "content": "lazy dogs " * max_len}]),
        "nested 100,000 deep": b"[" * 100_000,
        "a million numbers": chat([{"role": "user", "content": "x"}], metadata=[1] * 1_000_000),
    }


async def measure(url: str, body: bytes, seconds: float) -> dict[str, Any]:
    """Send the body until the time is over, and ask for `/health` meanwhile."""
    statuses: Counter[int] = Counter()
    health: list[float] = []
    first = 0.0
    end = time.perf_counter() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def send() -> None:
            nonlocal first
            began = time.perf_counter()
            while time.perf_counter() < end:
                answer = await client.post("/v1/chat/completions", content=body)
                first = first or time.perf_counter() - began
                statuses[answer.status_code] += 1

        sending = asyncio.create_task(send())
        while not sending.done():
            began = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            health.append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(EVERY_S)
        await sending
    return {
        "megabytes": round(len(body) / 1e6, 2),
        "statuses": dict(statuses),
        "first_ms": round(1000 * first, 1),
        "health_median_ms": round(statistics.median(health), 1),
        "health_most_ms": round(max(health), 1),
    }


async def main(seconds: float) -> None:
    """Start the server, measure each load, print."""
    context = get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there,), daemon=True)
    server.start()
    port, max_len = await asyncio.to_thread(here.recv)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=20)) as client:
            (await client.get(f"{url}/health")).raise_for_status()
        for name, body in loads(max_len).items():
            print(json.dumps({"load": name, **await measure(url, body, seconds)}), flush=True)
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    asyncio.run(main(parser.parse_args().seconds))
