"""Latency of `/health` while clients send large requests.

    python benchmarks/server_load.py [--seconds 5]

One client requests `/health` every 20 ms from a server (the embedded base behind uvicorn, in its
own process) while another repeats a large request: 500,000 messages of one letter, 4 MB of text, a
prompt that barely fits, JSON nested 100,000 deep, lists of numbers. Prints as JSON for each load
the answered requests by status, milliseconds until the first answer, and the median and maximum
latency of `/health` in milliseconds.
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


def serve(connection: Connection) -> None:
    """Serve the embedded base on a free port, and send the port and maximum length."""
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
        connection.send((sock.getsockname()[1], engine.max_len))
        app = make_app(Service(engine, Chat.load(EMBEDDED), "m"))
        uvicorn.Server(uvicorn.Config(app, log_config=None)).run([sock])


def loads(max_len: int) -> dict[str, bytes]:
    """Return the bodies of requests by name."""

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
    """Repeat a request for `seconds`, and measure `/health` meanwhile."""
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
        "health_max_ms": round(max(health), 1),
    }


async def main(seconds: float) -> None:
    """Start the server, and measure and print each load."""
    context = get_context("spawn")
    receiving, sending = context.Pipe()
    server = context.Process(target=serve, args=(sending,), daemon=True)
    server.start()
    port, max_len = await asyncio.to_thread(receiving.recv)
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
