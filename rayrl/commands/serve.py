"""`rayrl serve`: a model behind OpenAI-compatible HTTP, until Ctrl-C.

rayrl serve model.path=runs/tictactoe/rl2/model
rayrl serve model.path=DIR engine=vllm cluster.replicas=2
rayrl serve model.path=DIR serve.host=0.0.0.0 serve.api_key_env=RAYRL_KEY
"""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
from collections.abc import Callable

from rayrl.cluster.serving.http_server import open_server
from rayrl.config import Config, validate
from rayrl.run.stage import log_template_notes, model_row
from rayrl.run.start_check import check_start

__all__ = ["run", "serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(config: Config) -> None:
    """Serve until interrupted, or asked to end (SIGTERM, as `ray job stop` sends it)."""
    validate(config, "serve")
    check_start(config, "serve")
    asyncio.run(serve(config))


async def serve(config: Config, say: Callable[[str], None] = print) -> None:
    """Start the server, say how to reach it, and wait."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    log_template_notes(config)
    name = config.serve.model_name or model_row(config.model.path)
    async with open_server(config, name) as url:
        say(_welcome(config, name, url))
        loop.add_signal_handler(signal.SIGTERM, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_signal_handler(signal.SIGTERM)


def _welcome(config: Config, name: str, url: str) -> str:
    body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}]}
    key = config.serve.api_key_env
    words = ["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json"]
    line = shlex.join([*words, "-d", json.dumps(body)])
    if key:
        line += f' -H "Authorization: Bearer ${key}"'
    lines = [f"{name} answers at {url} (Ctrl-C ends it). Try:", f"  {line}"]
    if config.serve.host not in LOOPBACK and not key:
        lines.append("Anybody who reaches this machine may use it: serve.api_key_env sets a key.")
    return "\n".join(lines)
