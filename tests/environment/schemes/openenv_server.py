"""Environments with OpenEnv's own base classes, and a server of them; run by a Python that has it.

OpenEnv needs another release of `mcp` than vLLM, so it has a virtual environment of its own.
"""

from __future__ import annotations

import os
import random
import runpy
import socket
import sys
import threading
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI
from fastmcp import FastMCP
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from pydantic import BaseModel, Field, field_validator


class Seen(Observation):
    """What most of them show."""

    text: str
    hint: list[int] | None = None


class Base(Environment[Any, Seen, State]):
    """Begins with a number of its seed, ends after `most` steps; rewards 1 for each."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    most = 3

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Seen:
        if more.get("broken"):
            raise RuntimeError("the disk is full")
        self.steps, self.more = 0, more
        return Seen(
            text=f"begin {random.Random(seed).randrange(1000)} {more.get('word', '')}".strip()
        )

    def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Seen:
        self.steps += 1
        said = action.model_dump(exclude={"metadata"}, exclude_none=True)
        return Seen(text=f"{self.steps}: {said}", reward=1.0, done=self.steps == self.most)

    @property
    def state(self) -> State:
        return State(step_count=self.steps)  # raises before the first reset


class Text(Action):
    """One field of text."""

    message: str = Field(min_length=1, description="what to say.")


class Number(Action):
    """One whole number."""

    column: int = Field(ge=0, lt=7)


class Measure(Action):
    """One number, with a field that never varies."""

    type: Literal["measure"] = "measure"
    size: float | None = Field(gt=0)


class Choice(Action):
    """One of several words."""

    move: Literal["left", "right", "left turn"]


class Switch(Action):
    """True or false."""

    on: bool


class Nothing(Action):
    """No field at all."""


class Point(BaseModel):
    """Part of an action, which refers to itself."""

    x: int
    y: int = 0
    next: Point | None = None


class Drawing(Action):
    """Several fields, one of them required."""

    title: str = Field(pattern="^[A-Z]")
    points: list[Point] = Field(default_factory=list, max_length=3)


class Even(Action):
    """A rule that no schema tells."""

    number: int

    @field_validator("number")
    @classmethod
    def even(cls, number: int) -> int:
        """Raise for odd numbers."""
        if number % 2:
            raise ValueError("it must be even")
        return number


class Door(Base):
    """Raises on what is illegal in its state, and takes any other move."""

    def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Seen:
        if action.move == "left":
            raise ValueError("the left door is locked")
        return super().step(action)


class Lone(Base):
    """For one session at a time."""

    SUPPORTS_CONCURRENT_SESSIONS = False


class Stuck(Base):
    """Never answers a step, until it is let go."""

    free = threading.Event()

    def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Seen:
        self.free.wait(60)
        return super().step(action)


class Huge(Base):
    """Shows more than a model can read, and at the second step more than is taken."""

    def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Seen:
        seen = super().step(action)
        return Seen(text="x" * (10**6 if self.steps == 1 else 17 * 2**20), reward=seen.reward)


class Numbers(Base):
    """Shows more than a text."""

    def step(self, action: Any, timeout_s: float | None = None, **more: Any) -> Seen:
        return Seen(text="two\nlines", hint=[1, 2], reward=None, done=True)


class Unmade(Base):
    """Cannot be made."""

    def __init__(self) -> None:
        super().__init__()
        raise RuntimeError("no display")


class Tools(MCPEnvironment):
    """Actions are calls of tools."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        mcp = FastMCP("tools")

        @mcp.tool
        def add(a: int, b: int = 1) -> int:
            """Add two numbers."""
            return a + b

        super().__init__(mcp)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Any:
        return Observation(metadata={"status": "ready"})

    def _step_impl(self, action: Any, timeout_s: float | None = None, **_: Any) -> Any:
        raise AssertionError("only tools are called")

    @property
    def state(self) -> State:
        return State()


SERVED: dict[str, tuple[type[Any], type[Action], int | None]] = {
    "text": (Base, Text, 8),
    "number": (Base, Number, 100),
    "measure": (Base, Measure, 100),
    "choice": (Base, Choice, 100),
    "switch": (Base, Switch, 100),
    "nothing": (Base, Nothing, 100),
    "drawing": (Base, Drawing, 100),
    "even": (Base, Even, 100),
    "door": (Door, Choice, 100),
    "lone": (Lone, Text, None),
    "three": (Base, Text, 3),
    "stuck": (Stuck, Text, 100),
    "huge": (Huge, Text, 100),
    "numbers": (Numbers, Text, 100),
    "unmade": (Unmade, Text, 100),
}


def served() -> FastAPI:
    """All of them, each under its name as the path."""
    app = FastAPI()

    @app.get("/free")
    def free() -> None:
        Stuck.free.set()

    for name, (kind, action, most) in SERVED.items():
        app.mount(f"/{name}", create_app(kind, action, Seen, max_concurrent_envs=most))
    tools = create_app(Tools, CallToolAction, CallToolObservation, max_concurrent_envs=100)
    app.mount("/tools", tools)
    return app


def main() -> None:
    """Serve them, or the `app` of a file, until stdin ends; print the port."""
    app = runpy.run_path(sys.argv[1])["app"] if sys.argv[1:] else served()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.listen(512)
    config = uvicorn.Config(
        app, log_level="critical", timeout_graceful_shutdown=1, ws="websockets-sansio"
    )
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
