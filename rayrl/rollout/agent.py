"""Agents: an environment's interface to the player of one seat."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, Protocol, get_args

from rayrl.chat.requests import ApiError
from rayrl.chat.text_protocol import describe_lines, parse_lines, results_text
from rayrl.chat.tools import ParsedCall, Toolkit, add_to_first_message, parse_calls
from rayrl.environment.randomness import EPISODE
from rayrl.errors import EnvError, safe_repr
from rayrl.rollout.conversation import Conversation, ConversationNames, Point, Throttling
from rayrl.rollout.programs.dialogue import Answer, Dialogue
from rayrl.rollout.programs.program import Endpoint, Finished, program
from rayrl.rollout.resume import EpisodeResume
from rayrl.types import (
    Message,
    Reply,
    Role,
    Task,
    ToolCall,
    Turn,
    assistant,
    derive_seed,
    tool,
    user,
)

__all__ = ["Activity", "Agent", "Options", "Player"]

_ROLES = get_args(Role)
_YIELD_EVERY = 64  # turns; lets other coroutines run even if no player ever waits
_LAST_ROUND = "No more tool calls are possible: answer now."


@dataclass(frozen=True, slots=True)
class Options:
    """Options for answering one turn.

    Attributes:
        seed: for sampling the answer.
        state: key of the state the model acts in.
        max_tokens: overrides the player's own limit.
        tools: JSON schemas of the functions offered.
        temperature: overrides the player's own.
    """

    seed: int
    state: str = ""
    max_tokens: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    temperature: float | None = None


class Player(Protocol):
    """Anything that can answer for a seat: a policy, a script, a remote model, a person.

    A player serves many conversations at once and stores its per-conversation state in the
    `Conversation`. Three members are optional: `opens_thought`, whether its replies begin inside
    a thought; `end(conversation)`, called once when a conversation is over; and
    `resume(conversation, turn)`, called instead of `answer` for a turn recorded in an earlier
    attempt, which must restore the player's state in the conversation as of after that turn.
    """

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        """Answer `new`, which is not yet in `conversation.messages`; the caller adds both.

        Raises:
            InfraError: the player could not answer; the episode is retried.
        """
        ...


def _invalid(new: Sequence[object], state: object, max_tokens: object, temperature: object) -> str:
    """Describe what is invalid in the arguments of a call; empty if they are valid."""
    for message in new:
        if not isinstance(message, Message):
            return (
                f"with {safe_repr(message)}: pass a string, rayrl.user(text) or rayrl.system(text)"
            )
        content: object = message.content
        if not isinstance(content, str):
            return f"with a message whose content is {safe_repr(content)}: it must be a string"
        if message.role not in _ROLES:
            return f"with the role {message.role!r}: it must be one of {', '.join(_ROLES)}"
    if not isinstance(state, str | None):
        return f"with state={safe_repr(state)}: it must be a string, such as repr(board)"
    if not (max_tokens is None or (isinstance(max_tokens, Integral) and int(max_tokens) >= 0)):
        return f"with max_tokens={safe_repr(max_tokens)}: it must be a whole number, 0 or more"
    if temperature is not None and not (
        isinstance(temperature, Real) and 0 <= float(temperature) < math.inf
    ):
        return f"with temperature={safe_repr(temperature)}: it must be a number, 0 or more"
    return ""


@dataclass(slots=True, eq=False)
class Activity:
    """What a seat's agent and its branches have done together.

    Attributes:
        called: number of calls by the environment.
        awaited: number of those calls that were awaited.
        waiting: number of calls that wait for the player right now.
        tool_calls: number of tool calls the model made.
        tool_errors: number of those that failed.
        used_tools: whether it was ever offered tools.
        conversations: all of them.
        error: the first exception that the player raised, if any.
        closed: whether the episode is over.
    """

    called: int = 0
    awaited: int = 0
    waiting: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    used_tools: bool = False
    conversations: list[Conversation] = field(default_factory=list)
    error: Exception | None = None
    closed: bool = False


class Agent:
    """One seat of an episode. Calling it sends messages and returns the reply.

    Args:
        player: answers for the seat.
        seat: name of the parameter of the environment's coroutine.
        episode: id of the episode, the prefix of its session names.
        seed: of the episode; turn k is answered with `derive_seed(seed, seat, k)`, that of a
            branch with its name after the seat's.
        resume: the episode's turns: those recorded earlier, which are replayed before the player
            is called, and those made in this attempt. Shared by the seats of an episode.
        task: of the episode.
        throttling: where the player counts its delays; shared by the seats of an episode.
    """

    def __init__(
        self,
        player: Player,
        *,
        seat: str = "agent",
        episode: str = "episode",
        seed: int = 0,
        resume: EpisodeResume | None = None,
        task: Task | None = None,
        throttling: Throttling | None = None,
    ) -> None:
        self.player = player
        self.seat = seat
        self.seed = seed
        self.resume = resume or EpisodeResume()
        self.activity = Activity()
        self._in_turn = False
        self._names = ConversationNames(f"{episode}/{seat}")
        self._conversation = Conversation(self._names.path, seat, task, throttling)
        self.activity.conversations.append(self._conversation)
        self._dialogue: Dialogue | None = None

    @property
    def session(self) -> str:
        """Name of the current conversation."""
        return self._conversation.session

    @property
    def turns(self) -> int:
        """Number of turns so far; a branch counts on from those before it."""
        return self._conversation.turns

    @property
    def tool_calls(self) -> int:
        """Number of tool calls the model made in this seat, branches included."""
        return self.activity.tool_calls

    @property
    def tool_errors(self) -> int:
        """Number of those that failed."""
        return self.activity.tool_errors

    @property
    def record(self) -> list[Turn]:
        """Turns of the whole episode so far; for a fork, only its own."""
        return self.resume.turns

    @property
    def messages(self) -> list[Message]:
        """Messages of the current conversation, replies included."""
        return self._conversation.messages

    def __call__(
        self,
        prompt: str | Message | Sequence[Message],
        *,
        tools: Sequence[Callable[..., Any]] = (),
        protocol: Literal["native", "text"] = "native",
        tool_rounds: int = 8,
        state: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> Coroutine[Any, Any, Reply]:
        """Send messages and wait for the reply: `reply = await agent(prompt)`.

        Args:
            prompt: a string from the user, a message, or several messages.
            tools: typed functions, sync or async, that the model may call before it answers. Their
                exceptions are reported to the model and counted.
            protocol: how the model calls tools. "native" uses the chat template or the server's
                API, with JSON arguments. "text" uses lines of the form `CALL name: argument`, which
                work with every model and template.
            tool_rounds: maximum rounds of tool calls before the model must answer.
            state: key of the state the model acts in, for comparing decisions inside a group; by
                default the text of the new messages.
            max_tokens: per completion; overrides the player's own limit.
            temperature: overrides the player's own. What is sampled at 0 is not trained on.

        Returns:
            The model's last text, with all tool calls made before it.
        """
        self.activity.called += 1  # counted here so that a missing `await` is noticed
        return self._respond(prompt, tools, protocol, tool_rounds, state, max_tokens, temperature)

    async def _respond(
        self,
        prompt: str | Message | Sequence[Message],
        tools: Sequence[Callable[..., Any]],
        protocol: str,
        tool_rounds: int,
        state: str | None,
        max_tokens: int | None,
        temperature: float | None,
    ) -> Reply:
        self.activity.awaited += 1
        new: tuple[Message, ...]
        if isinstance(prompt, str):
            new = (user(str(prompt)),)
        elif isinstance(prompt, Message):
            new = (prompt,)
        else:
            new = tuple(prompt)
        if tools:
            if protocol not in ("native", "text"):
                raise EnvError(f"protocol={protocol!r}: must be 'native' or 'text'")
            if tool_rounds < 0:
                raise EnvError(f"tool_rounds={tool_rounds}: must be 0 or more")
            as_text = protocol == "text"
            return await self._tool_loop(
                new, Toolkit(tools), as_text, tool_rounds, state, max_tokens, temperature
            )
        turn = await self.turn(new, state, max_tokens, temperature)
        return Reply(turn.text, turn.finish)

    async def turn(
        self,
        new: tuple[Message, ...],
        state: str | None,
        max_tokens: int | None,
        temperature: float | None,
        tools: tuple[Mapping[str, Any], ...] = (),
    ) -> Turn:
        """Call the model once, without running any tools it calls."""
        activity = self.activity
        if activity.closed:
            raise EnvError(f"the episode is over: {self.seat!r} can no longer be called")
        if self._in_turn:
            raise EnvError(
                f"{self.seat!r} was called again before it answered: await it first, or ask "
                f"`{self.seat}.branch()`"
            )
        if not new:
            raise EnvError(f"{self.seat!r} was called without a message: pass at least one")
        # players rely on valid arguments
        if problem := _invalid(new, state, max_tokens, temperature):
            raise EnvError(f"{self.seat!r} was called {problem}")
        if state is None:
            state = new[0].content if len(new) == 1 else "\n".join([m.content for m in new])
        conversation = self._conversation
        seed = derive_seed(self.seed, self.seat + conversation.name, conversation.turns)
        self._in_turn = True
        own = EPISODE.get()
        EPISODE.set(None)  # the player must not draw from the episode's generators
        try:
            turn = None if self.resume.fresh else await self._replay(new, state, tools)
            if turn is None:
                options = Options(seed, state, max_tokens, tools, temperature)
                activity.waiting += 1
                try:
                    turn = await self.player.answer(conversation, new, options)
                finally:
                    activity.waiting -= 1
                name, origin = conversation.name, conversation.origin
                if tools or name:
                    turn = replace(turn, tools=tools, conversation=name, origin=origin)
        except Exception as error:
            activity.error = activity.error or error
            raise
        finally:
            self._in_turn = False
            EPISODE.set(own)
        conversation.messages += new
        reply = assistant(turn.text)
        if tools:
            calls = parse_calls(turn.text, thinking=self.opens_thought)
            reply = replace(reply, tool_calls=self._with_ids(calls))
        conversation.messages.append(reply)
        conversation.turns += 1
        conversation.mark()
        self.resume.add(turn)
        if conversation.turns % _YIELD_EVERY == 0:
            await asyncio.sleep(0)
        return turn

    async def _replay(
        self, new: tuple[Message, ...], state: str, tools: tuple[Mapping[str, Any], ...]
    ) -> Turn | None:
        """Return the next recorded turn as the player's answer; None if none is left."""
        conversation = self._conversation
        turn = await self.resume.replay(conversation, new, tools)
        resume_player = getattr(self.player, "resume", None)
        if turn is not None and resume_player is not None:
            resume_player(conversation, turn)
        # the key must match those of the group's other episodes, which the current code computes
        return turn if turn is None or turn.state == state else replace(turn, state=state)

    async def _tool_loop(
        self,
        new: tuple[Message, ...],
        toolkit: Toolkit,
        as_text: bool,
        rounds: int,
        state: str | None,
        max_tokens: int | None,
        temperature: float | None,
    ) -> Reply:
        self.activity.used_tools = True
        schemas, conversation = toolkit.schemas, self._conversation
        introduced = {f"CALL {name}" for name in toolkit.tools} if as_text else set()
        if introduced - conversation.tools:
            new = tuple(add_to_first_message(new, describe_lines(schemas)))
        made: list[ToolCall] = []
        for left in range(rounds, -1, -1):
            offered = () if as_text else schemas
            turn = await self.turn(new, state, max_tokens, temperature, offered)
            conversation.tools |= introduced
            cut = turn.finish == "length"
            if as_text:
                calls = parse_lines(turn.text, schemas, cut=cut, thinking=self.opens_thought)
            else:
                calls = parse_calls(turn.text, cut=cut, thinking=self.opens_thought)
            if not calls or not left:
                break
            with_ids = self._with_ids(calls) if as_text else self.messages[-1].tool_calls
            made += with_ids
            results = []
            for call in calls:
                result, failed = await toolkit.run(call)
                self.activity.tool_calls += 1
                self.activity.tool_errors += failed
                results.append(result)
            if left == 1:
                results[-1] += f"\n{_LAST_ROUND}"
            if as_text:
                new = (user(results_text(calls, results)),)
            else:
                new = tuple(tool(r, call.id) for r, call in zip(results, with_ids, strict=True))
            state = None
        return Reply(turn.text, turn.finish, tuple(made))

    def _with_ids(self, calls: Sequence[ParsedCall]) -> tuple[ToolCall, ...]:
        start = self._conversation.calls
        self._conversation.calls += len(calls)
        return tuple(
            ToolCall(f"call_{start + k}", call.name, call.arguments) for k, call in enumerate(calls)
        )

    @property
    def opens_thought(self) -> bool:
        """Whether the model's replies begin inside a thought."""
        return getattr(self.player, "opens_thought", False)

    def endpoint(
        self, *, own_limits: bool = False, own_temperature: bool = False
    ) -> AbstractAsyncContextManager[Endpoint]:
        """Let programs ask the model over HTTP: `async with agent.endpoint() as at:`.

        The server speaks OpenAI's chat completions and Responses and Anthropic's Messages. Each
        request is a turn: one that goes on from earlier messages appends to their ids, any other
        begins a branch. The run's sampling settings replace those of requests.

        Args:
            own_limits: requests' own `max_tokens` replace the run's.
            own_temperature: requests' own `temperature` replaces the run's. Replies at 0 are not
                trained on.
        """
        from rayrl.rollout.programs.server import open_endpoint  # its imports take their time

        return open_endpoint(self, own_limits=own_limits, own_temperature=own_temperature)

    async def program(
        self,
        command: Sequence[str | PathLike[str]],
        *,
        own_limits: bool = False,
        own_temperature: bool = False,
        **options: Any,
    ) -> Finished:
        """Run a program that asks the model as this agent, and wait for its end.

        Short for `rayrl.program` within `endpoint`, whose arguments it takes.
        """
        async with self.endpoint(own_limits=own_limits, own_temperature=own_temperature) as at:
            return await program(command, at, **options)

    async def respond(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        after: Answer | None = None,
    ) -> Answer:
        """Answer a request as `endpoint` does, without a server.

        Args:
            messages: all messages so far, in the format of OpenAI's chat completions.
            tools: likewise.
            after: an answer of this method; `messages` are those that follow it.

        Returns:
            The assistant's message, whose attribute `turn` is the turn.

        Raises:
            EnvError: the messages or tools are invalid, or the episode is over.
        """
        self._dialogue = self._dialogue or Dialogue(self)
        try:
            return await self._dialogue.respond(messages, tools, after=after)
        except ApiError as error:
            raise EnvError(f"{self.seat}.respond(): {error}") from error

    def restart(self) -> None:
        """Start an empty conversation with the model; the episode continues."""
        name, old = self._names.next(), self._conversation
        self._conversation = old.follow(self._names.path + name, name, old.turns, empty=True)
        self.activity.conversations.append(self._conversation)

    @property
    def point(self) -> Point:
        """Where the conversation is now, for `branch(at=…)` later."""
        return Point(self.session, self.turns)

    def branch(self, name: str = "", *, empty: bool = False, at: Point | None = None) -> Agent:
        """Create another agent of this seat, whose turns are recorded and trained on too.

        It goes on from the conversation so far and can be asked at the same time as this one: for
        sub-agents, several attempts, a critic.

        Args:
            name: what seeds and resumed episodes know it by; by default its number among this
                agent's. Name branches that are created in an order which may vary.
            empty: begin an empty conversation instead.
            at: go on from an earlier point of any agent of this seat instead.

        Raises:
            EnvError: the name is not a Python identifier, or there is no such point.
        """
        if name and not (isinstance(name, str) and name.isidentifier()):
            raise EnvError(f"branch({safe_repr(name)}): a name consists of letters, digits and _")
        name, path, old = self._names.next(name), self._names.path, self._conversation
        new = self._copy(ConversationNames(path, name))
        if empty:
            new._conversation = Conversation(
                path + name, self.seat, old.task, old.throttling, name=name
            )
        else:
            of, turns = at or self.point
            sessions = {one.session: one for one in self.activity.conversations}
            if of not in sessions or turns not in sessions[of].marks:
                raise EnvError(f"branch(at={at}): {self.seat!r} was never there")
            new._conversation = sessions[of].follow(path + name, name, turns)
        self.activity.conversations.append(new._conversation)
        return new

    def fork(self) -> Agent:
        """Create an independent agent with a copy of the conversation, for branching checks."""
        old, path = self._conversation, self._names.next_fork(self.session)
        new = self._copy(ConversationNames(path, self._names.prefix))
        new.activity, new.resume = Activity(), EpisodeResume()
        new._conversation = old.follow(path, old.name, old.turns)
        new.activity.conversations.append(new._conversation)
        return new

    def _copy(self, names: ConversationNames) -> Agent:
        new = copy.copy(self)
        new._names = names
        new._in_turn = False
        new._dialogue = None
        return new

    def close(self) -> None:
        """End the seat's conversations; calling an agent of it afterwards raises EnvError."""
        activity = self.activity
        activity.closed = True
        end = getattr(self.player, "end", None)
        while activity.conversations:
            conversation = activity.conversations.pop(0)
            if end is not None:
                end(conversation)
