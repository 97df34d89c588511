"""Run environment code in child processes that can be killed.

Code that blocks the event loop (`time.sleep`, a C call, an endless loop) would block every other
episode of its worker, and no deadline could end it. Here each live episode runs in its own process,
which is reused for later episodes and killed, with everything it started, if it misses the
deadline. The players stay in the parent; messages and replies travel over a socket. A child sends
JSON, never pickles.

This protects the worker from code that hangs or crashes. It is not a sandbox for hostile code.
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
from rayrl.errors import (
    ConfigError,
    EnvError,
    InfraError,
    describe_error,
    error_message,
    format_traceback,
)
from rayrl.rollout.agent import Agent, Options
from rayrl.rollout.conversation import Conversation, Point
from rayrl.rollout.episode_io import message_from_json, message_to_json
from rayrl.types import Message, Result, Task, Turn

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
        environment: the environment to play instead of `env`; returned by the context manager.
    """

    def __init__(self, env: Environment, slots: int) -> None:
        async def play(task: Task, *agents: Agent) -> Result:
            return await self._play(task, agents)

        self.environment = env.with_play(play, slots)
        self._spec = env.spec
        self._slots = asyncio.Semaphore(slots)
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()

    async def __aenter__(self) -> Environment:
        return self.environment

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every child."""
        for child in list(self._children):
            self._kill(child)

    async def _play(self, task: Task, agents: Sequence[Agent]) -> Result:
        async with self._slots:
            if self._idle:
                child = self._idle.pop()
            else:
                child = _Child(self._spec)
                self._children.add(child)
            try:
                result = await child.play(task, agents)
            except _ChildError as raised:
                self._idle.append(child)  # the environment raised, the process is fine
                error = raised.kind(raised.message)
                error.add_note(raised.trace)
                raise error from None
            except BaseException:
                self._kill(child)
                raise
            self._idle.append(child)
            return result

    def _kill(self, child: _Child) -> None:
        self._children.discard(child)
        if child in self._idle:
            self._idle.remove(child)
        child.kill()


class _Start(NamedTuple):
    """An episode for a child to play, with session names by seat."""

    task: Task
    sessions: Mapping[str, str]
    seed: int


class _ChildError(Exception):
    """The environment raised in a child."""

    def __init__(self, message: str, trace: str, kind: type[Exception]) -> None:
        super().__init__(message)
        self.message, self.trace, self.kind = message, trace, kind


class _Child:
    """The parent's end of one process."""

    def __init__(self, spec: EnvSpec) -> None:
        self.spec = spec
        self.socket, child_socket = socket.socketpair()
        with child_socket:
            descriptor = child_socket.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(descriptor), json.dumps(sys.path)],
                pass_fds=(descriptor,),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that everything it starts can be killed with it
            )
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def play(self, task: Task, agents: Sequence[Agent]) -> Result:
        """Play one episode in the process, and answer the calls of its agents."""
        by_seat = {agent.seat: agent for agent in agents}
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(sock=self.socket)
            await self._send(self.spec)
            ready = await self._receive()
            if "failed" in ready:
                raise ConfigError(
                    f"environment {self.spec.ref!r} cannot run in its own process: "
                    f"{ready['failed']}"
                )
        sessions = {agent.seat: agent.session for agent in agents}
        await self._send(_Start(task, sessions, agents[0].seed))
        by_session = {agent.session: agent for agent in agents}  # will include forks and branches
        try:
            return await self._answer(by_seat, by_session)
        finally:
            for fork in set(by_session.values()) - set(agents):
                fork.close()

    async def _answer(self, by_seat: Mapping[str, Agent], by_session: dict[str, Agent]) -> Result:
        while True:
            frame = await self._receive()
            if "ask" in frame:
                turn = await by_session[frame["session"]].turn(
                    tuple(message_from_json(message) for message in frame["messages"]),
                    frame["state"],
                    frame["max_tokens"],
                    frame["temperature"],
                    tuple(frame["tools"]),
                )
                await self._send((frame["ask"], turn.text, turn.finish))
            elif "fork" in frame:
                by_session[frame["fork"]] = by_session[frame["of"]].fork()
            elif "branch" in frame:
                agent = by_session[frame["of"]]
                at = frame["at"] and Point(*frame["at"])
                new = agent.branch(frame["name"], empty=frame["empty"], at=at)
                by_session[frame["branch"]] = new
            elif "restart" in frame:
                agent = by_session[frame["restart"]] = by_session[frame["of"]]
                agent.restart()
            elif "failed" in frame:
                kind = InfraError if frame["infra"] else EnvError
                raise _ChildError(frame["failed"], frame["traceback"], kind)
            else:
                for seat, (used, calls, errors) in frame["tools"].items():
                    activity = by_seat[seat].activity
                    activity.used_tools = used
                    activity.tool_calls, activity.tool_errors = calls, errors
                return Result(frame["scores"], frame["facts"])

    async def _send(self, frame: object) -> None:
        assert self.writer is not None
        body = cloudpickle.dumps(frame)
        try:
            self.writer.write(_HEAD.pack(len(body)) + body)
            await self.writer.drain()
        except ConnectionError as error:
            raise self._exit_error() from error

    async def _receive(self) -> dict[str, Any]:
        assert self.reader is not None
        try:
            (size,) = _HEAD.unpack(await self.reader.readexactly(_HEAD.size))
            frame: dict[str, Any] = json.loads(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise self._exit_error() from error
        return frame

    def _exit_error(self) -> EnvError:
        try:
            code: int | None = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            code = None
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        return EnvError(f"its process exited unexpectedly ({how})")

    def kill(self) -> None:
        """Kill the process and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.writer is not None:
            self.writer.close()
        self.socket.close()


# ---- in the child


def child(descriptor: int) -> None:
    """Play episodes for the parent at the other end of a socket until it closes."""
    threading.Thread(target=_exit_with_parent, args=(descriptor,), daemon=True).start()
    asyncio.run(_serve(descriptor))


def _exit_with_parent(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP | getattr(select, "POLLRDHUP", 0))
    poll.poll()
    os._exit(0)  # even if the environment's code blocks


async def _serve(descriptor: int) -> None:
    from rayrl.environment.registry import environment_of

    sock = socket.socket(fileno=descriptor)
    reader, writer = await asyncio.open_connection(sock=sock)
    pipe = _Pipe(reader, writer)
    spec: EnvSpec = await pipe.receive()
    # a reference, because the event loop alone would let the task be garbage-collected
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
            agents = [
                _ChildAgent(_Parent(pipe), seat=seat, episode=session.rpartition("/")[0])
                for seat, session in start.sessions.items()
            ]
            with EpisodeRandom(start.seed, "environment"):
                scores, facts = env.result(await env.play(start.task, *agents))  # plain data
            did = {agent.seat: agent.activity for agent in agents}
            tools = {s: (a.used_tools, a.tool_calls, a.tool_errors) for s, a in did.items()}
            result: dict[str, Any] = {"scores": scores, "facts": facts, "tools": tools}
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # ends this episode, not the process
            infra = isinstance(error, InfraError)
            own = infra or isinstance(error, EnvError)
            failed = error_message(error) if own else describe_error(error)
            result = {"failed": failed, "traceback": format_traceback(error), "infra": infra}
        pipe.send(result)
        await writer.drain()


class _Pipe:
    """The child's end of the socket, with the pending calls by number."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.pending: dict[int, asyncio.Future[tuple[str, Any]]] = {}
        self.calls = 0
        self.tasks: asyncio.Queue[_Start] = asyncio.Queue()

    async def receive(self) -> Any:
        (size,) = _HEAD.unpack(await self.reader.readexactly(_HEAD.size))
        return pickle.loads(await self.reader.readexactly(size))

    def send(self, frame: dict[str, Any]) -> None:
        body = json.dumps(frame, default=_plain).encode()
        self.writer.write(_HEAD.pack(len(body)) + body)

    async def listen(self) -> None:
        while True:
            frame = await self.receive()
            if isinstance(frame, _Start):
                self.tasks.put_nowait(frame)
                continue
            number, text, finish = frame
            answer = self.pending.pop(number, None)
            if answer is not None and not answer.done():  # done: the call was cancelled
                answer.set_result((text, finish))


class _Parent:
    """The player of a child's agents: forwards calls to the parent's agents."""

    def __init__(self, pipe: _Pipe) -> None:
        self.pipe = pipe

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        pipe = self.pipe
        pipe.calls += 1
        reply = pipe.pending[pipe.calls] = asyncio.get_running_loop().create_future()
        pipe.send(
            {
                "ask": pipe.calls,
                "session": conversation.session,
                "messages": [message_to_json(message) for message in new],
                "state": options.state,
                "max_tokens": options.max_tokens,
                "temperature": options.temperature,
                "tools": list(options.tools),
            }
        )
        text, finish = await reply
        return Turn(conversation.seat, tuple(new), text, finish, state=options.state)


class _ChildAgent(Agent):
    """A child's agent; restarts, branches and forks are mirrored in the parent immediately."""

    def restart(self) -> None:
        """Start an empty conversation, here and in the parent."""
        old = self.session
        super().restart()
        self._notify("restart", self.session, of=old)

    def branch(self, name: str = "", *, empty: bool = False, at: Point | None = None) -> Agent:
        """Create another agent of the seat, here and in the parent."""
        new = super().branch(name, empty=empty, at=at)
        self._notify("branch", new.session, of=self.session, name=name, empty=empty, at=at)
        return new

    def fork(self) -> Agent:
        """Create an independent copy, here and in the parent."""
        new = super().fork()
        self._notify("fork", new.session, of=self.session)
        return new

    def _notify(self, action: str, session: str, **more: Any) -> None:
        player = self.player
        assert isinstance(player, _Parent)
        player.pipe.send({action: session, **more})


def _plain(value: object) -> object:
    try:
        return float(value)  # type: ignore[arg-type]  # a numpy scalar
    except (TypeError, ValueError):
        return repr(value)
