"""Requests with all messages so far: which conversation they go on, and what programs may do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayrl import Agent, EnvError
from rayrl.chat.tools import format_call
from rayrl.conversations import transcripts
from rayrl.rollout.players import PolicyPlayer, ScriptedPlayer
from rayrl.rollout.programs.dialogue import Dialogue
from rayrl.types import Sampling
from tests.act import Instant, chat

Json = dict[str, Any]
TOOL = {"type": "function", "function": {"name": "look", "strict": True, "parameters": None}}


def said(role: str, content: Any, **more: Any) -> Json:
    return {"role": role, "content": content, **more}


def policy(*texts: str) -> tuple[Agent, Instant]:
    engine = Instant(chat(), texts)
    return Agent(PolicyPlayer(chat(), engine, Sampling(max_tokens=99)), episode="e"), engine


async def test_a_request_goes_on_what_it_repeats() -> None:
    agent, engine = policy("yes", "no")
    messages = [said("system", "s"), said("user", "a")]
    for text in "bcd":
        messages += [await agent.respond(messages), said("user", text)]
    await agent.respond(messages)
    assert len(transcripts(agent.record)) == 1
    assert [len(turn.prompt) for turn in agent.record] == [2, 1, 1, 1]
    assert engine.requests[3].prompt_ids[: agent.record[3].offset] == tuple(
        i for turn in agent.record[:3] for i in (*turn.prompt_ids, *turn.completion_ids)
    )


async def test_only_what_follows_an_answer_is_as_good_as_all_messages() -> None:
    whole, engine = policy("yes", "no", "perhaps")
    short, other = policy("yes", "no", "perhaps")
    messages = [said("user", "a")]
    answers = [await short.respond(messages)]
    assert answers[0] == await whole.respond(messages)
    messages.append(answers[0])
    for text in "bcde":
        answers.append(await short.respond([said("user", text)], after=answers[-1]))
        assert answers[-1].turn is short.record[-1]
        messages.append(said("user", text))
        assert await whole.respond(messages) == answers[-1]
        messages.append(answers[-1])
    # both know afterwards what there was, and go on from anywhere in it
    early = [*messages[:4], said("user", "another")]
    assert await short.respond(early) == await whole.respond(early)
    await short.respond([said("user", "once more")], after=answers[2])
    await whole.respond([*messages[:6], said("user", "once more")])
    assert short.record == whole.record
    assert [one.prompt_ids for one in engine.requests] == [one.prompt_ids for one in other.requests]
    assert len({turn.conversation for turn in short.record}) == 3
    with pytest.raises(EnvError, match="must be an answer of this agent"):
        await whole.respond([said("user", "x")], after=answers[0])


async def test_messages_that_a_caller_changes_are_read_again() -> None:
    agent, _ = policy("yes")
    messages = [said("user", "a")]
    messages += [await agent.respond(messages), said("user", "b")]
    await agent.respond(messages)
    messages[0]["content"] = "changed"
    await agent.respond(messages)
    assert [len(turn.prompt) for turn in agent.record] == [1, 1, 3]
    assert agent.record[2].prompt[0].content == "changed"


async def test_another_way_on_is_a_branch_with_the_same_ids() -> None:
    agent, engine = policy("yes", "no", "perhaps")
    start = [said("user", "a")]
    first = [*start, await agent.respond(start)]
    one, two = [*first, said("user", "b")], [*first, said("user", "c")]
    await agent.respond(one)
    await agent.respond(two)
    assert [turn.offset > 0 for turn in agent.record] == [False, True, True]
    shared = agent.record[1].offset
    assert engine.requests[1].prompt_ids[:shared] == engine.requests[2].prompt_ids[:shared]
    origin = agent.record[2].origin
    assert origin is not None
    assert (origin.conversation, origin.turns) == (agent.record[0].conversation, 1)
    assert len(transcripts(agent.record)) == 2


async def test_the_same_request_at_once_is_sampled_again_each_time() -> None:
    agent, engine = policy(*map(str, range(50)))
    await asyncio.gather(*[agent.respond([said("user", "a")]) for _ in range(5)])
    assert len({request.seed for request in engine.requests}) == 5
    assert len({turn.conversation for turn in agent.record}) == 5
    engine.requests.clear()
    other, again = policy(*map(str, range(50)))
    await asyncio.gather(*[other.respond([said("user", "a")]) for _ in range(5)])
    assert [turn.text for turn in other.record] == [turn.text for turn in agent.record]
    assert len(again.requests) == 5


@pytest.mark.parametrize(
    "echo",
    [
        lambda reply: reply,
        lambda reply: {**reply, "refusal": None, "content": reply["content"] or ""},
        lambda reply: {**reply, "content": [{"type": "text", "text": reply["content"] or ""}]},
    ],
)
async def test_replies_come_back_as_libraries_write_them(echo: Any) -> None:
    call = format_call("look", {"at": "it", "b": [1, {"c": None}]})
    for text in ("hello ", call, f"well\n{call}\n{call}"):
        agent, _ = policy(text)
        messages = [said("user", "a")]
        reply = await agent.respond(messages, [TOOL])
        messages += [echo(reply)]
        messages += [
            said("tool", "seen", tool_call_id=one["id"]) for one in reply.get("tool_calls", ())
        ] or [said("user", "b")]
        await agent.respond(messages, [TOOL])
        assert len({turn.conversation for turn in agent.record}) == 1


async def test_a_reply_that_is_repeated_otherwise_begins_a_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dialogue, "warned", False)
    for _ in range(2):  # each process says it once
        agent, _ = policy("yes")
        first, *rest = said("user", "a"), said("assistant", "\x1b[31mnever"), said("user", "b")
        await agent.respond([first])
        await agent.respond([first, *rest])
        await agent.respond([first, said("assistant", "nor this"), said("user", "c")])
        assert [turn.offset for turn in agent.record] == [0, 0, 0]
    told = capsys.readouterr().err
    assert told.count("a request repeats messages[1] otherwise than the model wrote it") == 1
    assert "\x1b" not in told


async def test_a_later_reply_that_is_repeated_otherwise_is_new_text_after_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dialogue, "warned", False)
    agent, _ = policy("yes")
    messages = [said("user", "a")]
    messages += [await agent.respond(messages), said("user", "b")]
    await agent.respond(messages)
    await agent.respond([*messages, said("assistant", "never"), said("user", "c")])
    assert "repeats messages[3] otherwise" in capsys.readouterr().err
    first = agent.record[0]
    shared = len(first.prompt_ids) + len(first.completion_ids)
    assert [turn.offset for turn in agent.record] == [0, shared, shared]


async def test_examples_of_the_program_are_no_replies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dialogue, "warned", False)
    agent, _ = policy("yes")
    examples = [said("user", "1 + 1"), said("assistant", "2")]
    for question in ("2 + 2", "3 + 3"):
        messages = [*examples, said("user", question)]
        messages += [await agent.respond(messages), said("user", "sure?")]
        await agent.respond(messages)
    assert capsys.readouterr().err == ""
    assert len(transcripts(agent.record)) == 2


async def test_a_broken_call_is_text() -> None:
    agent, _ = policy('<tool_call>{"name": "look", </tool_call>')
    reply = await agent.respond([said("user", "a")], [TOOL])
    assert reply["content"].startswith("<tool_call>")
    assert "tool_calls" not in reply


@pytest.mark.parametrize(
    ("messages", "tools", "what"),
    [
        ([said("user", "a"), said("assistant", "b")], [], "messages"),
        ([said("wizard", "a")], [], r"messages\[0\].role"),
        ([said("user", [{"type": "image_url"}])], [], r"messages\[0\].content\[0\].type"),
        ([said("tool", "a", tool_call_id="x")], [], r"messages\[0\].tool_call_id"),
        ([said("user", "a")], [{"type": "function"}], r"tools\[0\].function"),
        ([{"role": "assistant", "content": "", "tool_calls": 3}], [], r"messages\[0\].tool_calls"),
        (["a"], [], r"messages\[0\]"),
    ],
)
async def test_invalid_requests_change_nothing(messages: Any, tools: Any, what: str) -> None:
    agent, engine = policy("yes")
    with pytest.raises(EnvError, match=what):
        await agent.respond(messages, tools)
    assert (agent.record, engine.requests, agent.activity.error) == ([], [], None)
    assert await agent.respond([said("user", "a")]) == said("assistant", "yes")


async def test_players_without_ids_answer_too() -> None:
    agent = Agent(ScriptedPlayer(lambda messages, rng: str(len(messages))), episode="e")
    messages = [said("user", "a")]
    for _ in range(2):
        messages += [await agent.respond(messages), said("user", "more")]
    assert [message["content"] for message in messages] == ["a", "1", "more", "3", "more"]
