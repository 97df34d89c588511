"""Environment code in child processes that can be killed.

Code that blocks the event loop (`time.sleep`, a C call, an endless loop) would stop every other
episode of its worker, and no deadline could end it. Here each live episode runs in a process of its
own, kept for the next episode and killed with everything it started when it is late. The players
stay in the parent; what is said travels over a socket. What a child sends is JSON, never pickles.

This protects the worker from code that hangs or crashes. It is no sandbox against hostile code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cloudpickle

from rayrl.environment.environment import Environment, EnvSpec
from rayrl.environment.randomness import EpisodeRandom
from rayrl.errors import ConfigError, EnvError, described, message_of, traceback_of
from rayrl.rollout.agent import Agent, Conversation, Options
from rayrl.rollout.episode_io import message_from_json, message_to_json
from rayrl.types import Message, Scores, Task, Turn

__all__ = ["SubprocessEnv", "child"]

_HEAD = struct.Struct(">I")
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from rayrl.rollout.subprocess_env import child; child(int(sys.argv[1]))"
)


class SubprocessEnv:
    """An environment whose episodes run in child processes; an async context manager.

        async with SubprocessEnv(env, slots=8) as isolated:
            async for group in play_groups(isolated, plans, players, concurrency=8): ...

    Args:
        env: what to play. A child makes it again from `env.spec`.
        slots: processes, and so live episodes; each starts when it is first needed.

    Attributes:
        environment: to be played instead of `env`; what the context manager gives.
    """

    def __init__(self, env: Environment, slots: int) -> None:
        async def play(task: Task, *agents: Agent) -> Scores:
            return await self._play(task, agents)

        self.environment = env.with_play(play, slots)
        self._spec = env.spec
        self._free = asyncio.Semaphore(slots)
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()

    async def __aenter__(self) -> Environment:
        return self.environment

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every child."""
        for one in list(self._all):
            self._drop(one)

    async def _play(self, task: Task, agents: Sequence[Agent]) -> Scores:
        async with self._free:
            one = self._idle.pop() if self._idle else self._new()
            try:
                scores = await one.play(task, agents)
            except _CodeFailed as failed:
                self._idle.append(one)  # its code raised, the process is fine
                error = EnvError(failed.message)
                error.add_note(failed.trace)
                raise error from None
            except BaseException:
                self._drop(one)
                raise
            self._idle.append(one)
            return scores

    def _new(self) -> _Child:
        one = _Child(self._spec)
        self._all.add(one)
        return one

    def _drop(self, one: _Child) -> None:
        self._all.discard(one)
        if one in self._idle:
            self._idle.remove(one)
        one.kill()


class _Start(NamedTuple):
    """An episode for a child: conversations by seat, and the episode's seed."""

    task: Task
    sessions: Mapping[str, str]
    seed: int


class _CodeFailed(Exception):
    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.message, self.trace = message, trace


class _Child:
    """The parent's end of one process."""

    def __init__(self, spec: EnvSpec) -> None:
        self.spec = spec
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that killing it takes along what it started
            )
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def play(self, task: Task, agents: Sequence[Agent]) -> Scores:
        """Let the process play one episode, and answer for its agents."""
        by_seat = {agent.seat: agent for agent in agents}
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(sock=self.socket)
            await self._send(self.spec)
            ready = await self._receive()
            if "failed" in ready:
                raise ConfigError(
                    f"environment {self.spec.ref!r} cannot run in a process of its own: "
                    f"{ready['failed']}"
                )
        sessions = {agent.seat: agent.session for agent in agents}
        await self._send(_Start(task, sessions, agents[0].seed))
        holders = {agent.session: agent for agent in agents}  # of conversations, forks' included
        try:
            return await self._answer(by_seat, holders)
        finally:
            for fork in set(holders.values()) - set(agents):
                fork.close()

    async def _answer(self, by_seat: Mapping[str, Agent], holders: dict[str, Agent]) -> Scores:
        while True:
            said = await self._receive()
            if "ask" in said:
                turn = await holders[said["session"]].turn(
                    tuple(message_from_json(message) for message in said["messages"]),
                    said["state"],
                    said["max_tokens"],
                    tuple(said["tools"]),
                )
                await self._send((said["ask"], turn.text, turn.finish))
            elif "fork" in said:
                holders[said["fork"]] = holders[said["of"]].fork()
            elif "restart" in said:
                agent = holders[said["restart"]] = holders[said["of"]]
                agent.restart()
            elif "failed" in said:
                raise _CodeFailed(said["failed"], said["traceback"])
            else:
                for seat, (used, calls, errors) in said["tools"].items():
                    agent = by_seat[seat]
                    agent.used_tools, agent.tool_calls, agent.tool_errors = used, calls, errors
                scores: Scores = said["scores"]
                return scores

    async def _send(self, what: object) -> None:
        assert self.writer is not None
        body = cloudpickle.dumps(what)
        try:
            self.writer.write(_HEAD.pack(len(body)) + body)
            await self.writer.drain()
        except ConnectionError as error:
            raise self._died() from error

    async def _receive(self) -> dict[str, Any]:
        assert self.reader is not None
        try:
            (size,) = _HEAD.unpack(await self.reader.readexactly(_HEAD.size))
            said: dict[str, Any] = json.loads(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise self._died() from error
        return said

    def _died(self) -> EnvError:
        try:
            code: int | None = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            code = None
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        return EnvError(f"its process ended by itself ({how})")

    def kill(self) -> None:
        """End the process and all it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.writer is not None:
            self.writer.close()
        self.socket.close()


# ---- in the child


def child(descriptor: int) -> None:
    """Play episodes for the parent at the other end of a socket, until it is gone."""
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    asyncio.run(_serve(descriptor))


def _end_with_parent(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP | getattr(select, "POLLRDHUP", 0))
    poll.poll()
    os._exit(0)  # whatever the environment's code is doing


async def _serve(descriptor: int) -> None:
    from rayrl.environment.registry import environment_of

    sock = socket.socket(fileno=descriptor)
    reader, writer = await asyncio.open_connection(sock=sock)
    pipe = _Pipe(reader, writer)
    spec: EnvSpec = await pipe.receive()
    # held on to, because the event loop alone would let it be collected
    listening = asyncio.create_task(pipe.listen())
    try:
        env = environment_of(spec)
    except Exception as error:
        pipe.send({"failed": str(error)})
        await writer.drain()
        return
    pipe.send({"ready": True})
    while not listening.done():
        start = await pipe.tasks.get()
        try:
            agents = [_remote(pipe, seat, session) for seat, session in start.sessions.items()]
            with EpisodeRandom(start.seed, "environment"):
                scores = env.scores(await env.play(start.task, *agents))  # as plain data
            tools = {a.seat: (a.used_tools, a.tool_calls, a.tool_errors) for a in agents}
            said: dict[str, Any] = {"scores": scores, "tools": tools}
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # it ends this episode, and not the process
            own = isinstance(error, EnvError)
            failed = message_of(error) if own else described(error)
            said = {"failed": failed, "traceback": traceback_of(error)}
        pipe.send(said)
        await writer.drain()


class _Pipe:
    """The child's end: frames in and out, and who waits for which answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.waiting: dict[int, asyncio.Future[tuple[str, Any]]] = {}
        self.asked = 0
        self.tasks: asyncio.Queue[_Start] = asyncio.Queue()

    async def receive(self) -> Any:
        (size,) = _HEAD.unpack(await self.reader.readexactly(_HEAD.size))
        return pickle.loads(await self.reader.readexactly(size))

    def send(self, said: dict[str, Any]) -> None:
        body = json.dumps(said, default=_plain).encode()
        self.writer.write(_HEAD.pack(len(body)) + body)

    async def listen(self) -> None:
        while True:
            frame = await self.receive()
            if isinstance(frame, _Start):
                self.tasks.put_nowait(frame)
                continue
            number, text, finish = frame
            waiting = self.waiting.pop(number, None)  # None: its code no longer waits
            if waiting is not None and not waiting.done():
                waiting.set_result((text, finish))


class _Parent:
    """The player of a child's agents: asks the parent's."""

    def __init__(self, pipe: _Pipe) -> None:
        self.pipe = pipe

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        pipe = self.pipe
        pipe.asked += 1
        waiting = pipe.waiting[pipe.asked] = asyncio.get_running_loop().create_future()
        pipe.send(
            {
                "ask": pipe.asked,
                "session": conversation.session,
                "messages": [message_to_json(message) for message in new],
                "state": options.state,
                "max_tokens": options.max_tokens,
                "tools": list(options.tools),
            }
        )
        text, finish = await waiting
        return Turn(conversation.seat, tuple(new), text, finish, state=options.state)


class _Remote(Agent):
    """A child's agent; the parent's one forgets and branches when it does, not at its next turn."""

    def restart(self) -> None:
        """Begin a new conversation, here and in the parent."""
        of = self.session
        super().restart()
        self._tell("restart", self.session, of)

    def fork(self) -> Agent:
        """Branch, here and in the parent."""
        new = super().fork()
        self._tell("fork", new.session, self.session)
        return new

    def _tell(self, what: str, session: str, of: str) -> None:
        player = self.player
        assert isinstance(player, _Parent)
        player.pipe.send({what: session, "of": of})


def _remote(pipe: _Pipe, seat: str, session: str) -> Agent:
    return _Remote(_Parent(pipe), seat=seat, episode=session.rsplit("/", 2)[0])


def _plain(value: object) -> object:
    try:
        return float(value)  # type: ignore[arg-type]  # a numpy scalar
    except (TypeError, ValueError):
        return repr(value)
