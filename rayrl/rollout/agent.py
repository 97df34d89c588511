"""What an environment talks to: one seat's conversation with whoever answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, Protocol, get_args

from rayrl.chat.text_protocol import describe_lines, parse_lines, results_text
from rayrl.chat.tools import ParsedCall, Toolkit, add_to_first_message, parse_calls
from rayrl.environment.randomness import EPISODE
from rayrl.errors import EnvError, shown
from rayrl.rollout.resume import EpisodeResume
from rayrl.types import Message, Reply, Role, ToolCall, Turn, assistant, derive_seed, tool, user

__all__ = ["Agent", "Conversation", "Options", "Player"]

_ROLES = get_args(Role)
_BREATHE = 64  # turns after which other coroutines get the event loop even if nothing ever waits
_LAST_ROUND = "No more tool calls are possible: answer now."


class Conversation:
    """What has been said between one seat and its player. Players may keep their own state here.

    Attributes:
        session: name of the conversation, unique in a run.
        seat: who answers.
        messages: everything said so far, replies included.
        ids: the same as ids, for players that have tokens.
        finished: whether the last completion ended its turn itself.
        tools: names of the tools the model has been told about.
        held_s: seconds its player held requests back to keep to a limit; no deadline counts them.
    """

    __slots__ = ("finished", "held_s", "ids", "messages", "seat", "session", "tools")

    def __init__(self, session: str, seat: str) -> None:
        self.session = session
        self.seat = seat
        self.messages: list[Message] = []
        self.ids: list[int] = []
        self.finished = True
        self.tools: set[str] = set()
        self.held_s = 0.0

    def copy(self, session: str) -> Conversation:
        """The same words under another name."""
        new = Conversation(session, self.seat)
        new.messages, new.ids = list(self.messages), list(self.ids)
        new.finished, new.tools = self.finished, set(self.tools)
        return new


@dataclass(frozen=True, slots=True)
class Options:
    """How one turn is to be answered.

    Attributes:
        seed: for whatever is random in the answer.
        state: key of the state the model acts in.
        max_tokens: instead of the player's own limit.
        tools: JSON schemas of the functions offered.
    """

    seed: int
    state: str = ""
    max_tokens: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


class Player(Protocol):
    """Whoever answers: a policy, a script, a remote model, a person.

    A player serves many conversations at once and keeps what it knows of one in the conversation.
    It may have `opens_thought`, whether its replies begin within a thought, and
    `end(conversation)`, called once when a conversation is over, and
    `resume(conversation, turn)`, called instead of `answer` for a turn it gave in an earlier
    attempt: it brings what it keeps in the conversation to where it was after that turn.
    """

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        """Answer `new`, which is not yet in `conversation.messages`; the caller adds both.

        Raises:
            InfraError: no answer could be had; the episode is played again.
        """
        ...


def _wrong(new: Sequence[object], state: object, max_tokens: object) -> str:
    """What is wrong with a question of the environment's, or nothing."""
    for message in new:
        if not isinstance(message, Message):
            return f"with {shown(message)}: pass a text, rayrl.user(text) or rayrl.system(text)"
        content: object = message.content
        if not isinstance(content, str):
            return f"with a message whose content is {shown(content)}: it must be a text"
        if message.role not in _ROLES:
            return f"with the role {message.role!r}: it must be one of {', '.join(_ROLES)}"
    if not isinstance(state, str | None):
        return f"with state={shown(state)}: it must be a text, such as repr(board)"
    if not (max_tokens is None or (isinstance(max_tokens, Integral) and int(max_tokens) >= 0)):
        return f"with max_tokens={shown(max_tokens)}: it must be a whole number, 0 or more"
    return ""


class Agent:
    """One seat of an episode. Calling it says something and returns the reply.

    Args:
        player: who answers.
        seat: name of the parameter of the environment's coroutine.
        episode: id of the episode, the beginning of the sessions' names.
        seed: of the episode; turn k is answered with `derive_seed(seed, seat, k)`.
        course: of the episode: turns made earlier, which are played again before the player is
            asked, and those made now. The seats of an episode share one.

    Attributes:
        called: times the environment called it.
        awaited: of these, those it awaited.
        turns: times the model was asked.
        tool_calls: tool calls it made.
        tool_errors: those that went wrong.
        waiting: whether it waits for the player right now.
        error: what the player raised, if it did.
    """

    def __init__(
        self,
        player: Player,
        *,
        seat: str = "agent",
        episode: str = "episode",
        seed: int = 0,
        course: EpisodeResume | None = None,
    ) -> None:
        self.player = player
        self.seat = seat
        self.episode = episode
        self.seed = seed
        self.course = course or EpisodeResume()
        self.called = self.awaited = 0
        self.turns = 0
        self.tool_calls = 0
        self.tool_errors = 0
        self.used_tools = False
        self.waiting = False
        self.closed = False
        self.error: Exception | None = None
        self._asked = False
        self._number = 0
        self._named = 0
        self._path = f"{episode}/{seat}"  # what the names of its conversations begin with
        self._thinking: bool = getattr(player, "opens_thought", False)
        self._conversation = Conversation(f"{self._path}/0", seat)
        self._sessions = [self._conversation]

    @property
    def session(self) -> str:
        """Name of the current conversation."""
        return self._conversation.session

    @property
    def held_s(self) -> float:
        """Seconds its player held requests back to keep to a limit."""
        return sum(conversation.held_s for conversation in self._sessions)

    @property
    def record(self) -> list[Turn]:
        """The turns of its episode so far; of a fork, its own."""
        return self.course.turns

    @property
    def messages(self) -> list[Message]:
        """The current conversation, replies included."""
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
    ) -> Coroutine[Any, Any, Reply]:
        """Say something and wait for the reply: `reply = await agent(prompt)`.

        Args:
            prompt: a text from the user, a message, or several.
            tools: typed functions, sync or async, that the model may call before it answers. What
                they raise is told to the model and counted.
            protocol: how it calls them. "native" is the player's own way: the chat template's or
                the server's, with JSON arguments. "text" is a line, `CALL name: argument`, which
                every model and every template can do.
            tool_rounds: times it may call tools before it must answer.
            state: key of the state the model acts in, for comparing decisions inside a group; by
                default the text of the new messages.
            max_tokens: of each completion, instead of the player's own limit.

        Returns:
            The last text the model wrote, with all tool calls made on the way.
        """
        self.called += 1  # here, where it is seen even if nobody awaits
        return self._say(prompt, tools, protocol, tool_rounds, state, max_tokens)

    async def _say(
        self,
        prompt: str | Message | Sequence[Message],
        tools: Sequence[Callable[..., Any]],
        protocol: str,
        tool_rounds: int,
        state: str | None,
        max_tokens: int | None,
    ) -> Reply:
        self.awaited += 1
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
            as_lines = protocol == "text"
            return await self._tool_loop(
                new, Toolkit(tools), as_lines, tool_rounds, state, max_tokens
            )
        turn = await self.turn(new, state, max_tokens, ())
        return Reply(turn.text, turn.finish)

    async def turn(
        self,
        new: tuple[Message, ...],
        state: str | None,
        max_tokens: int | None,
        tools: tuple[Mapping[str, Any], ...],
    ) -> Turn:
        """One call of the model: the part of `__call__` below tools."""
        if self.closed:
            raise EnvError(f"the episode is over: {self.seat!r} cannot be asked any more")
        if self._asked:
            raise EnvError(f"{self.seat!r} was asked again before it answered: await it first")
        if not new:
            raise EnvError(f"{self.seat!r} was asked without a message: pass at least one")
        if wrong := _wrong(new, state, max_tokens):  # or its player, which trusts us, would break
            raise EnvError(f"{self.seat!r} was asked {wrong}")
        if state is None:
            state = new[0].content if len(new) == 1 else "\n".join([m.content for m in new])
        conversation = self._conversation
        seed = derive_seed(self.seed, self.seat, self.turns)
        self._asked = True
        own = EPISODE.get()
        EPISODE.set(None)  # how often the player draws is no part of the episode
        try:
            turn = None if self.course.fresh else await self._recorded(new, state, tools)
            if turn is None:
                self.waiting = True
                options = Options(seed, state, max_tokens, tools)
                turn = await self.player.answer(conversation, new, options)
                turn = replace(turn, tools=tools) if tools else turn
        except Exception as error:
            self.error = error
            raise
        finally:
            self._asked = self.waiting = False
            EPISODE.set(own)
        self.turns += 1
        conversation.messages += new
        reply = assistant(turn.text)
        if tools:
            calls = parse_calls(turn.text, thinking=self._thinking)
            reply = replace(reply, tool_calls=self._name_calls(calls))
        conversation.messages.append(reply)
        self.course.add(turn)
        if self.turns % _BREATHE == 0:
            await asyncio.sleep(0)
        return turn

    async def _recorded(
        self, new: tuple[Message, ...], state: str, tools: tuple[Mapping[str, Any], ...]
    ) -> Turn | None:
        """The turn that was made earlier, as the player's answer; None if there is none left."""
        conversation = self._conversation
        turn = await self.course.again(self.seat, new, tools, len(conversation.ids))
        resume = getattr(self.player, "resume", None)
        if turn is not None and resume is not None:
            resume(conversation, turn)
        # the key is for comparing with siblings, which have today's
        return turn if turn is None or turn.state == state else replace(turn, state=state)

    async def _tool_loop(
        self,
        new: tuple[Message, ...],
        toolkit: Toolkit,
        as_lines: bool,
        rounds: int,
        state: str | None,
        max_tokens: int | None,
    ) -> Reply:
        self.used_tools = True
        schemas, conversation = toolkit.schemas, self._conversation
        told = {f"CALL {name}" for name in toolkit.tools} if as_lines else set()
        if told - conversation.tools:
            new = tuple(add_to_first_message(new, describe_lines(schemas)))
        made: list[ToolCall] = []
        for left in range(rounds, -1, -1):
            turn = await self.turn(new, state, max_tokens, () if as_lines else schemas)
            conversation.tools |= told
            cut = turn.finish == "length"
            if as_lines:
                calls = parse_lines(turn.text, schemas, cut=cut, thinking=self._thinking)
            else:
                calls = parse_calls(turn.text, cut=cut, thinking=self._thinking)
            if not calls or not left:
                break
            named = self._name_calls(calls) if as_lines else self.messages[-1].tool_calls
            made += named
            results = [await self._run_tool(call, toolkit) for call in calls]
            if left == 1:
                results[-1] += f"\n{_LAST_ROUND}"
            if as_lines:
                new = (user(results_text(calls, results)),)
            else:
                new = tuple(tool(r, call.id) for r, call in zip(results, named, strict=True))
            state = None
        return Reply(turn.text, turn.finish, tuple(made))

    async def _run_tool(self, call: ParsedCall, toolkit: Toolkit) -> str:
        text, failed = await toolkit.run(call)
        self.tool_calls += 1
        self.tool_errors += failed
        return text

    def _name_calls(self, calls: Sequence[ParsedCall]) -> tuple[ToolCall, ...]:
        start = self._named
        self._named += len(calls)
        return tuple(
            ToolCall(f"call_{start + k}", call.name, call.arguments) for k, call in enumerate(calls)
        )

    def restart(self) -> None:
        """Begin a new conversation: the model forgets, the episode goes on."""
        self._open(Conversation(self._next_session(), self.seat))

    def fork(self) -> Agent:
        """An agent that has heard the same and goes on by itself, for checks that branch."""
        new = type(self)(
            self.player,
            seat=self.seat,
            episode=self.episode,
            seed=self.seed,
        )
        new.turns = self.turns
        self._number += 1  # the parent's name is in the child's, so that forks of forks differ too
        new._path = f"{self._conversation.session}+{self._number}"
        new._conversation = self._conversation.copy(new._path)
        new._named = self._named  # its calls go on in the same conversation
        new._sessions = [new._conversation]
        return new

    def close(self) -> None:
        """End its conversations; asking it again raises EnvError."""
        self.closed = True
        sessions, self._sessions = self._sessions, []
        end = getattr(self.player, "end", None)
        if end is not None:
            for conversation in sessions:
                end(conversation)

    def _next_session(self) -> str:
        self._number += 1
        return f"{self._path}/{self._number}"

    def _open(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._sessions.append(conversation)
