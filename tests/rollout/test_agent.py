from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from rayrl.chat.renderer import Chat
from rayrl.chat.tools import CUT_OFF, Tool, format_call
from rayrl.errors import EnvError, InfraError
from rayrl.rollout.agent import Agent, Options
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.players import HumanPlayer, PolicyPlayer, ScriptedPlayer
from rayrl.types import (
    Completion,
    Message,
    Request,
    Sampling,
    Turn,
    VersionSpan,
    assistant,
    derive_seed,
    system,
    user,
)
from tests.act import HERMES, Instant, InTurn, build_tokenizer, chat


def script(*texts: str) -> ScriptedPlayer:
    """Generates the given texts in order."""
    return ScriptedPlayer(lambda messages, rng: texts[sum(m.role == "assistant" for m in messages)])


def policy(*texts: str, **sampling: Any) -> tuple[PolicyPlayer, Instant]:
    engine = Instant(chat(), texts)
    return PolicyPlayer(chat(), engine, Sampling(**sampling)), engine


def ids_of(turns: Sequence[Turn]) -> tuple[int, ...]:
    return tuple(i for turn in turns for i in (*turn.prompt_ids, *turn.completion_ids))


async def test_a_conversation_is_the_concatenation_of_its_turns() -> None:
    player, engine = policy("one")
    agent = Agent(player, episode="e", seed=5)
    assert await agent([system("s"), user("a")]) == "one"
    assert await agent("b") == "one"
    first, second = agent.record
    assert first.offset == 0
    assert second.offset == len(first.prompt_ids) + len(first.completion_ids)
    talk = [system("s"), user("a"), assistant("one"), user("b")]
    assert engine.requests[1].prompt_ids == ids_of([first]) + second.prompt_ids
    assert engine.requests[1].prompt_ids == chat().start(talk)
    assert agent.messages == [*talk, assistant("one")]
    assert (first.text, first.finish, first.state) == ("one", "stop", "s\na")
    assert first.completion_ids == chat().reply("one")
    assert first.rollout_logprobs == (-0.5,) * len(first.completion_ids)
    assert first.versions == (VersionSpan(3, 0, len(first.completion_ids)),)
    assert [r.seed for r in engine.requests] == [derive_seed(5, "agent", k) for k in (0, 1)]
    assert [r.session for r in engine.requests] == ["e/agent"] * 2
    assert engine.requests[0].stop_ids == chat().stop_ids


async def test_a_truncated_reply_is_closed_by_untrained_ids() -> None:
    player, _ = policy("the lazy dog", max_tokens=2)
    agent = Agent(player)
    reply = await agent("a")
    assert reply.finish == "length"
    await agent("b")
    first, second = agent.record
    assert chat().stop_ids[0] not in first.completion_ids
    assert second.prompt_ids[0] == chat().stop_ids[0]


async def test_options_of_one_call() -> None:
    player, engine = policy("the lazy dog", max_tokens=9)
    agent = Agent(player)
    await agent("a", max_tokens=3, state="key", temperature=0.5)
    await agent("b", temperature=0)
    await agent("c", temperature=1.0)  # as the run's
    await agent("d")
    assert engine.requests[0].sampling == Sampling(max_tokens=3, temperature=0.5)
    assert [one.sampling.temperature for one in engine.requests] == [0.5, 0.0, 1.0, 1.0]
    assert agent.record[0].state == "key"
    assert [turn.temperature for turn in agent.record] == [0.5, 0.0, None, None]


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, "1"])
async def test_a_temperature_that_is_none(wrong: Any) -> None:
    agent = Agent(policy("the lazy dog")[0])
    with pytest.raises(EnvError, match=r"with temperature=.*: it must be a number, 0 or more"):
        await agent("a", temperature=wrong)


async def test_restart_begins_a_new_conversation() -> None:
    player, engine = policy("one")
    agent = Agent(player, episode="e")
    await agent("a")
    agent.restart()
    await agent("b")
    assert [turn.offset for turn in agent.record] == [0, 0]
    assert engine.requests[1].session == "e/agent/1"
    assert engine.requests[1].prompt_ids == chat().start([user("b")])
    assert engine.requests[1].seed == derive_seed(0, "agent/1", 1)
    agent.close()
    agent.close()
    assert engine.released == ["e/agent", "e/agent/1"]


async def test_a_fork_is_independent() -> None:
    player, engine = policy("one")
    agent = Agent(player, episode="e")
    await agent("a")
    other = agent.fork()
    await agent("b")
    await other("c")
    assert engine.requests[2].prompt_ids == chat().start([user("a"), assistant("one"), user("c")])
    assert engine.requests[2].seed == engine.requests[1].seed
    assert len({r.session for r in engine.requests}) == 2
    assert len(agent.messages) == 4
    assert (agent.turns, other.turns, len(agent.record), len(other.record)) == (2, 2, 2, 1)


async def test_invalid_tool_loop_arguments() -> None:
    agent = Agent(policy("one")[0], episode="e")

    def double(x: int) -> int:
        return 2 * x

    with pytest.raises(EnvError, match="protocol='lines'"):
        await agent("a", tools=[double], protocol="lines")  # type: ignore[arg-type]
    with pytest.raises(EnvError, match="tool_rounds=-1"):
        await agent("a", tools=[double], tool_rounds=-1)


async def test_a_fork_continues_the_call_ids() -> None:
    call = format_call("double", {"x": 2})
    agent = Agent(policy(call)[0], episode="e")

    def double(x: int) -> int:
        return 2 * x

    await agent("a", tools=[double], tool_rounds=1)
    other = agent.fork()
    await other("b", tools=[double], tool_rounds=1)
    names = [c.id for message in other.messages for c in message.tool_calls]
    assert len(names) == len(set(names)) == 4


async def test_forks_of_forks_have_distinct_sessions() -> None:
    player, engine = policy("one")
    agent = Agent(player, episode="e")
    await agent("a")
    one, two = agent.fork(), agent.fork()
    for name, fork in enumerate((one, two, one.fork(), two.fork(), one.fork().fork())):
        await fork(f"said to {name}")
    assert len({request.session for request in engine.requests}) == 6


class Broken:
    """A generator that fails as configured."""

    def __init__(self, answer: Completion | Exception) -> None:
        self.answer = answer

    async def generate(self, request: Request) -> Completion:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (InfraError("gone"), "gone"),
        (Completion((1,), (-1.0,), (), "abort"), "aborted"),
        (Completion((1, 2), (-1.0,), (), "stop"), "2 ids but 1 logprobs"),
    ],
)
async def test_a_failed_generation_leaves_no_trace(answer: Any, said: str) -> None:
    agent = Agent(PolicyPlayer(chat(), Broken(answer), Sampling()))
    with pytest.raises(InfraError, match=said):
        await agent("a")
    assert isinstance(agent.activity.error, InfraError)
    assert (agent.messages, agent.record, agent.turns) == ([], [], 0)
    assert agent._conversation.ids == []


async def test_no_tokens_for_a_reply() -> None:
    agent = Agent(PolicyPlayer(chat(), Broken(Completion((), (), (), "length")), Sampling()))
    reply = await agent("a")
    assert (reply, reply.finish) == ("", "length")
    await agent("b")
    assert agent.record[1].prompt_ids[0] == chat().stop_ids[0]


async def test_misuse_is_reported() -> None:
    async def slow(messages: Sequence[Message], rng: Any) -> str:
        await asyncio.sleep(0)
        return "a"

    agent = Agent(ScriptedPlayer(slow))
    with pytest.raises(EnvError, match="without a message"):
        await agent([])
    first, second = await asyncio.gather(agent("x"), agent("x"), return_exceptions=True)
    assert first == "a"
    assert isinstance(second, EnvError)
    assert "called again before it answered" in str(second)
    agent.close()
    with pytest.raises(EnvError, match="the episode is over"):
        await agent("x")


async def test_a_cancelled_call_can_be_repeated() -> None:
    release = asyncio.Event()

    class Slow:
        async def answer(
            self, conversation: Conversation, new: Sequence[Message], options: Options
        ) -> Turn:
            await release.wait()
            return Turn("agent", tuple(new), "late", "stop")

    agent = Agent(Slow())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(agent("a"), 0.01)
    release.set()
    assert await agent("b") == "late"
    assert agent.messages == [user("b"), assistant("late")]
    assert agent.activity.error is None


# ---- tools


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def double(number: int) -> int:
    """Double."""
    return 2 * number


async def divide(a: float, b: float) -> float:
    """Divide."""
    return a / b


async def test_the_tool_loop() -> None:
    calls = f"{format_call('add', {'a': 1, 'b': 2})}\n{format_call('divide', {'a': 1, 'b': 0})}"
    agent = Agent(script(calls, "three"))
    reply = await agent("1 + 2?", tools=[add, divide])
    assert reply == "three"
    assert [(c.id, c.name) for c in reply.tool_calls] == [("call_0", "add"), ("call_1", "divide")]
    assert (agent.turns, agent.tool_calls, agent.tool_errors) == (2, 2, 1)
    question, called, three, error, answer = agent.messages
    assert called.tool_calls == reply.tool_calls
    assert called.content == calls
    assert (three.role, three.content, three.tool_call_id) == ("tool", "3", "call_0")
    assert error.content == "Error: divide raised ZeroDivisionError: float division by zero"
    assert [turn.prompt for turn in agent.record] == [(question,), (three, error)]
    assert answer.tool_calls == ()


async def test_tool_rounds_are_limited() -> None:
    call = format_call("add", {"a": 1, "b": 1})
    agent = Agent(script(*[call] * 9))
    reply = await agent("?", tools=[add], tool_rounds=2)
    assert reply == call
    assert (agent.turns, agent.tool_calls) == (3, 2)
    assert agent.messages[2].content == "2"
    assert agent.messages[4].content == "2\nNo more tool calls are possible: answer now."


async def test_tools_are_only_parsed_when_offered() -> None:
    call = format_call("add", {"a": 1, "b": 1})
    assert await Agent(script(call))("?") == call


async def test_a_policy_with_tools_keeps_its_ids() -> None:
    call = format_call("add", {"a": 1, "b": 2})
    player, engine = policy(call, max_tokens=99)
    agent = Agent(player)
    await agent("1 + 2?", tools=[add], tool_rounds=1)
    await agent("and?", tools=[add, divide], tool_rounds=1)
    prompts = [chat().tokenizer.decode(turn.prompt_ids) for turn in agent.record]
    assert '"name": "add"' in prompts[0]
    assert prompts[1].startswith("\n<|im_start|>user\n<tool_response>3\nNo more")
    assert '"name": "divide"' in prompts[2]
    assert '"name": "add"' not in prompts[2]  # introduced before
    assert engine.requests[-1].prompt_ids == ids_of(agent.record)[: -len(chat().reply(call))]


async def test_a_truncated_call_is_not_run() -> None:
    begun = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2'
    whole = format_call("add", {"a": 1, "b": 1})
    room = len(chat().encode(whole + begun))
    engine = InTurn(chat(), whole + begun + "3}}</tool_call>", "3")
    agent = Agent(PolicyPlayer(chat(), engine, Sampling(max_tokens=room)))
    reply = await agent("1 + 23?", tools=[add])
    assert [message.content for message in agent.messages if message.role == "tool"] == [
        "2",
        f"Error: {CUT_OFF}",
    ]
    assert (agent.tool_calls, agent.tool_errors, reply) == (2, 1, "3")
    first, second = agent.record
    assert (first.finish, second.prompt_ids[0]) == ("length", chat().stop_ids[0])


async def test_the_tool_loop_appends_what_the_template_would_write() -> None:
    one = Chat(build_tokenizer(HERMES))
    calls = [("add", {"a": 1, "b": 2}), ("divide", {"a": 1, "b": 0})]
    said = "Both.\n" + "\n".join(format_call(*call) for call in calls)
    engine = InTurn(one, said, format_call("add", {"a": 3, "b": 4}), "7", "no")
    agent = Agent(PolicyPlayer(one, engine, Sampling(max_tokens=200)))
    assert await agent([system("rules"), user("1 + 2, 1 / 0?")], tools=[add, divide]) == "7"
    await agent("sure?", tools=[add, divide])
    ids = [i for turn in agent.record for i in (*turn.prompt_ids, *turn.completion_ids)]
    assert [*engine.requests[-1].prompt_ids, *one.reply("no")] == ids

    def called(number: int, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{number}", "type": "function", "function": function}

    error = "Error: divide raised ZeroDivisionError: float division by zero"
    talk = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "1 + 2, 1 / 0?"},
        {
            "role": "assistant",
            "content": "Both.",
            "tool_calls": [called(k, *call) for k, call in enumerate(calls)],
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_0"},
        {"role": "tool", "content": error, "tool_call_id": "call_1"},
        {"role": "assistant", "content": "", "tool_calls": [called(2, "add", {"a": 3, "b": 4})]},
        {"role": "tool", "content": "7", "tool_call_id": "call_2"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "no"},
    ]
    schemas = [Tool.from_function(add).schema, Tool.from_function(divide).schema]
    text = one.tokenizer.apply_chat_template(talk, tools=schemas, tokenize=False)
    assert one.tokenizer.decode(ids) + "\n" == text  # a model ends at its end of turn
    rendered, is_reply = one.render(agent.record)  # the training data of a warm start
    assert list(rendered) == ids
    sampled = [i for turn in agent.record for i in turn.completion_ids]
    assert [i for i, mine in zip(rendered, is_reply, strict=True) if mine] == sampled


# ---- tools as lines


async def test_the_tool_loop_with_the_text_protocol() -> None:
    calls = 'I need both.\nCALL double: 4\nCALL add: {"a": 1, "b": 2}\nCALL halve: 3'
    engine = InTurn(chat(), calls, "CALL double: four", "8 and 3", "again")
    agent = Agent(PolicyPlayer(chat(), engine, Sampling(max_tokens=99)))
    reply = await agent([system("rules"), user("?")], tools=[add, double], protocol="text")
    assert reply == "8 and 3"
    assert [call.name for call in reply.tool_calls] == ["double", "add", "halve", "double"]
    assert (agent.turns, agent.tool_calls, agent.tool_errors) == (3, 4, 2)
    await agent("again?", tools=[add, double], protocol="text")
    rules, question, said, results, _, wrong, *_ = agent.messages
    assert rules.content == (
        "rules\n\nYou can use these tools. Write each call as a line of its own and stop:\n"
        'CALL add: {"a": "integer", "b": "integer"} - Add two numbers.\n'
        "CALL double: number - Double.\nThe results come back in the next message."
    )
    assert (question, said.content) == (user("?"), calls)
    assert results == user(
        "RESULT double: 8\nRESULT add: 3\n"
        "RESULT halve: Error: there is no tool 'halve'. Tools: add, double."
    )
    assert wrong.content == (
        "RESULT double: Error: double: argument 'number': expected int, got 'four'"
    )
    assert agent.messages[-2] == user("again?")  # they were introduced before
    assert all(turn.tools == () for turn in agent.record)
    ids = ids_of(agent.record)
    assert ids == (*engine.requests[-1].prompt_ids, *chat().reply("again"))


async def test_the_last_round_of_the_text_protocol_and_a_restart() -> None:
    agent = Agent(script(*["CALL double: 2"] * 3))
    reply = await agent("?", tools=[double], protocol="text", tool_rounds=1)
    assert (reply, agent.turns, agent.tool_calls) == ("CALL double: 2", 2, 1)
    assert agent.messages[2].content == (
        "RESULT double: 4\nNo more tool calls are possible: answer now."
    )
    agent.restart()
    await agent("?", tools=[double], protocol="text", tool_rounds=1)
    assert agent.messages[0].content.startswith("You can use these tools.")


async def test_a_truncated_line_is_not_run() -> None:
    """`double: 12` may be a truncated `double: 123`."""
    room = len(chat().encode("CALL double: 12"))
    engine = InTurn(chat(), "CALL double: 123", "246")
    agent = Agent(PolicyPlayer(chat(), engine, Sampling(max_tokens=room)))
    await agent("?", tools=[double], protocol="text")
    assert agent.messages[2].content == f"RESULT double: Error: {CUT_OFF}"
    assert agent.tool_errors == 1


# ---- other players


async def test_scripted_players() -> None:
    seen = []

    async def careful(messages: Sequence[Message], rng: Any) -> str:
        seen.append([m.content for m in messages])
        return str(rng.randrange(10**9))

    replies = []
    for seed in (1, 1, 2):
        agent = Agent(ScriptedPlayer(careful), seed=seed)
        replies.append([await agent("a"), await agent("b")])
    assert replies[0] == replies[1] != replies[2]
    assert replies[0][0] != replies[0][1]
    assert seen[1] == ["a", replies[0][0], "b"]
    assert agent.record[0].completion_ids == ()

    def wrong(messages: Sequence[Message], rng: Any) -> str:
        raise KeyError("x")

    with pytest.raises(EnvError, match="player wrong raised KeyError: 'x'"):
        await Agent(ScriptedPlayer(wrong))("a")
    with pytest.raises(EnvError, match="returned None: it must return a string"):
        await Agent(ScriptedPlayer(lambda messages, rng: None))("a")  # type: ignore[arg-type, return-value]


async def test_a_person_at_the_terminal() -> None:
    out, asked = io.StringIO(), []

    def read(prompt: str) -> str:
        asked.append(prompt)
        return "4"

    agent = Agent(HumanPlayer(read, out, lambda line: f"<move>{line}</move>"), seat="x")
    assert await agent([system("rules"), user("board")]) == "<move>4</move>"
    assert out.getvalue() == "[system] rules\n\nboard\n\n"
    assert asked == ["x> "]


async def test_a_person_calls_tools() -> None:
    lines = iter(["CALL double: 4", "CALL double", "8"])
    out = io.StringIO()
    agent = Agent(HumanPlayer(lambda prompt: next(lines), out, lambda line: f"<a>{line}</a>"))
    assert await agent("2 * 4?", tools=[double]) == "<a>8</a>"
    assert agent.record[0].text == format_call("double", {"number": 4})
    assert (agent.tool_calls, agent.tool_errors) == (2, 1)
    shown = out.getvalue()
    assert shown.startswith("2 * 4?\n\nYou can use these tools.")
    assert shown.count("CALL double: number - Double.") == 1
    assert "[tool] 8\n" in shown
    lines = iter(["CALL double: 4", "8"])
    assert await agent("2 * 4?", tools=[double], protocol="text") == "<a>8</a>"
    assert agent.record[-2].text == "CALL double: 4"
