"""Players: the policy in training, a scripted function, a person at a terminal."""

from __future__ import annotations

import asyncio
import copy
import inspect
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any, TextIO

from rayrl.chat.renderer import Chat
from rayrl.chat.text_protocol import describe_lines, parse_lines
from rayrl.chat.tools import format_call, new_tools, tool_name
from rayrl.config.registry import Registry, player_scheme
from rayrl.engine.protocol import Generator
from rayrl.environment.environment import Environment, PlayerFunction
from rayrl.environment.randomness import EpisodeRandom
from rayrl.environment.registry import load_scheme
from rayrl.errors import ConfigError, EnvError, InfraError, describe_error, safe_repr
from rayrl.rollout.agent import Options
from rayrl.rollout.conversation import Conversation
from rayrl.terminal import visible
from rayrl.types import Message, Request, Sampling, Turn

__all__ = ["HumanPlayer", "PolicyPlayer", "ScriptedPlayer", "player_function"]

PLAYER = "player:"  # before the name of the environment's own in `env.seats`


def player_function(environment: Environment, key: str, who: str) -> PlayerFunction:
    """The scripted player that `who`, the value of setting `key`, names.

    Args:
        who: `NAME` or `player:NAME` of the environment, a function from outside, or another
            library's `SCHEME:ID`.

    Raises:
        ConfigError: there is none; names the nearest of the environment's.
    """
    if scheme := player_scheme(who):
        return _by_scheme(scheme, environment, key, who)
    start = PLAYER if who.startswith(PLAYER) else ""
    known = {start + name: function for name, function in environment.players.items()}
    players = Registry(key, known)
    if who not in known and (start or ":" not in who):
        if not known:
            models = "model:PATH" if key.startswith("env.seats") else "model"
            raise ConfigError(
                f"{key}={who}: environment {environment.name!r} has no players of its own; choose "
                f"{models}, endpoint, or a function as module:function or path/to/file.py:function"
            )
        raise players.unknown(who)
    return players.resolve(who)


def _by_scheme(scheme: EntryPoint, environment: Environment, key: str, who: str) -> PlayerFunction:
    load = load_scheme(scheme, f"{key}={who}")
    try:
        function: PlayerFunction = load(who.partition(":")[2], environment)
    except ConfigError as error:
        raise ConfigError(f"{key}={who}: {error}") from error
    return function


class PolicyPlayer:
    """A model behind a generator: its turns have ids and logprobs and can be trained on.

    Args:
        chat: chat renderer of the model.
        client: generates completions.
        sampling: sampling settings.
        min_version: oldest weights that may answer; may be changed between episodes.
        trainable: whether its seat is trained.
        run_temperature: the run's, if `sampling` has another; turns record what they differ from.
    """

    def __init__(
        self,
        chat: Chat,
        client: Generator,
        sampling: Sampling,
        *,
        min_version: int = 0,
        trainable: bool = True,
        run_temperature: float | None = None,
    ) -> None:
        self.chat = chat
        self.client = client
        self.sampling = sampling
        self.run_temperature = sampling.temperature if run_temperature is None else run_temperature
        self.min_version = min_version
        self.trainable = trainable
        self.opens_thought = chat.opens_thought
        self._release = getattr(client, "release", None)

    def at_temperature(self, temperature: float) -> PolicyPlayer:
        """The same player, with the same generator, sampling at another temperature."""
        other = copy.copy(self)
        other.sampling = replace(self.sampling, temperature=temperature)
        return other

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        """Append the new messages' ids, generate, and record exactly the sampled ids."""
        chat, ids = self.chat, conversation.ids
        tools = new_tools(options.tools, conversation.tools)
        if ids:
            prompt_ids = chat.extend(new, conversation.finished, tools)
        else:
            prompt_ids = chat.start(new, tools)
        offset = len(ids)
        sampling = self.sampling
        if options.max_tokens is not None:
            sampling = replace(sampling, max_tokens=options.max_tokens)
        if options.temperature is not None:
            sampling = replace(sampling, temperature=options.temperature)
        is_own = sampling.temperature != self.run_temperature
        whole = (*ids, *prompt_ids)
        clock_time, began = time.time(), time.perf_counter()
        done = await self.client.generate(
            Request(
                session=conversation.session,
                prompt_ids=whole,
                sampling=sampling,
                stop_ids=chat.stop_ids,
                seed=options.seed,
                min_version=self.min_version,
            )
        )
        completion_ids = done.ids
        if done.finish == "abort":
            raise InfraError(f"generation of {conversation.session} was aborted")
        if len(done.rollout_logprobs) != len(completion_ids):
            raise InfraError(
                f"{conversation.session}: the engine gave {len(completion_ids)} ids but "
                f"{len(done.rollout_logprobs)} logprobs"
            )
        turn = Turn(
            seat=conversation.seat,
            prompt=tuple(new),
            text=chat.text(completion_ids),
            finish=done.finish,
            offset=offset,
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            rollout_logprobs=done.rollout_logprobs,
            versions=done.versions,
            state=options.state,
            tools=options.tools,
            began=clock_time,
            seconds=time.perf_counter() - began,
            temperature=sampling.temperature if is_own else None,
        )
        self.resume(conversation, turn)
        return turn

    def resume(self, conversation: Conversation, turn: Turn) -> None:
        """Append a turn's ids to the conversation."""
        ids = turn.completion_ids
        conversation.ids += turn.prompt_ids
        conversation.ids += ids
        conversation.finished = bool(ids) and ids[-1] == self.chat.stop_ids[0]
        if turn.tools:
            conversation.tools = conversation.tools.union(map(tool_name, turn.tools))

    def end(self, conversation: Conversation) -> None:
        """Let the generator release the conversation's state."""
        if self._release is not None and conversation.ids:
            self._release([conversation.session])


class ScriptedPlayer:
    """A player that calls a function of the conversation, such as an environment's teacher.

    Args:
        function: takes all messages and a random generator, and the task if it has a parameter of
            that name; may be async.
    """

    trainable = False

    def __init__(self, function: PlayerFunction) -> None:
        self.function = function
        self._takes_task = "task" in inspect.signature(function).parameters

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        """Call the function; its exceptions become EnvError."""
        messages = [*conversation.messages, *new]
        name = getattr(self.function, "__name__", "scripted player")
        more = {"task": conversation.task} if self._takes_task else {}
        try:
            with EpisodeRandom(options.seed, "player"):
                text = self.function(messages, random.Random(options.seed), **more)
                if inspect.isawaitable(text):
                    text = await text
        except Exception as error:
            raise EnvError(f"player {name} raised {describe_error(error)}") from error
        if not isinstance(text, str):
            raise EnvError(f"player {name} returned {safe_repr(text)}: it must return a string")
        return Turn(conversation.seat, tuple(new), text, "stop", state=options.state)


class HumanPlayer:
    """A person at a terminal.

    Args:
        read: reads one line; runs in a thread, so that other episodes continue. Default: `input`.
        out: where messages are printed.
        form: converts the line to the reply, e.g. puts a move into its tags. A line that calls a
            tool, `CALL name: argument`, is sent as a tool call.
    """

    trainable = False

    def __init__(
        self,
        read: Callable[[str], str] = input,
        out: TextIO | None = None,
        form: Callable[[str], str] = str,
    ) -> None:
        self.read = read
        self.out = out or sys.stdout
        self.form = form

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        """Show the new messages and read a line."""
        for message in new:
            label = "" if message.role == "user" else f"[{message.role}] "
            self._show(f"{label}{message.content}")
        tools = new_tools(options.tools, conversation.tools)
        if tools:
            self._show(describe_lines(tools))
            conversation.tools = conversation.tools.union(map(tool_name, tools))
        line = await asyncio.to_thread(self.read, f"{conversation.seat}{conversation.name}> ")
        text = self._reply(line, options.tools)
        return Turn(conversation.seat, tuple(new), text, "stop", state=options.state)

    def _show(self, text: str) -> None:
        print(f"{visible(text)}\n", file=self.out, flush=True)

    def _reply(self, line: str, tools: Sequence[Mapping[str, Any]]) -> str:
        calls = parse_lines(line, tools)
        if not calls:
            return self.form(line)
        if not tools:  # with protocol="text" the line itself is the call
            return line
        call = calls[0]
        if call.error:
            return f"<tool_call>{line}</tool_call>"
        return format_call(call.name, call.arguments)
