"""Evaluate a model behind an OpenAI-compatible server, and look at its episodes.

python examples/endpoint.py URL MODEL       # the key is in OPENAI_API_KEY
python examples/endpoint.py                 # serves the model that ships with rayrl itself
"""

# %%
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

import rayrl


@dataclass(frozen=True, kw_only=True)
class Sum(rayrl.Task):
    """Add two numbers."""

    left: int
    right: int


@rayrl.env(
    tasks=[Sum(left=left, right=right) for left in range(10) for right in range(10)],
    rewards={"right": 1.0},
)
async def addition(task: Sum, agent: rayrl.Agent) -> rayrl.Scores:
    """Score 1 if the last number of the reply is the sum."""
    reply = await agent(f"What is {task.left} + {task.right}? End with the number.")
    words = reply.replace(".", " ").split()
    return {"right": float(bool(words) and words[-1] == str(task.left + task.right))}


@addition.player("calculator")
def calculator(messages: Sequence[rayrl.Message], rng: random.Random) -> str:
    """A scripted player, to compare with."""
    _, _, left, _, right, *_ = messages[-1].content.replace("?", "").split()
    return str(int(left) + int(right))


# %% A server to talk to, where none is given.
@contextmanager
def served() -> Iterator[tuple[str, str]]:
    """Serve the model that ships with rayrl; gives URL and name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rayrl", "serve", f"serve.port={port}"]
    url = f"http://127.0.0.1:{port}/v1"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                models = httpx.get(f"{url}/models", timeout=5).raise_for_status().json()
                break
            except httpx.HTTPError:
                if server.poll() is not None:
                    raise
                time.sleep(0.5)
        yield url, models["data"][0]["id"]
    finally:
        server.terminate()
        server.wait()


# %%
def evaluate(url: str, model: str) -> None:
    """Evaluate the server's model and a scripted player, and print some episodes."""
    endpoint = {"endpoint.url": url, "endpoint.model": model, "sampling.max_tokens": 24}
    for player, settings in (("calculator", {}), ("endpoint", endpoint)):
        name = f"example-endpoint-{player}"
        found = rayrl.evaluate(
            env=addition, player=player, episodes=10, name=name, settings=settings
        )
        print(found)
        for episode in [*found.episodes()][:3]:
            asked, said = episode.turns[0].prompt[-1].content, episode.turns[0].text
            print(f"{asked!r} -> {said!r}: {episode.scores['agent']}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        evaluate(*sys.argv[1:])
    else:
        with served() as (url, model):
            evaluate(url, model)
