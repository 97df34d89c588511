"""Notes on a model's chat template: where it differs from appending messages one after the other.

A template renders a whole conversation; rayrl renders its beginning once and then appends ids. For
plain ChatML the results are the same. Other differences are detected by rendering probe
conversations, and explained in one sentence each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rayrl.chat.renderer import Chat
from rayrl.chat.tokenizer import gap_before_eos, render
from rayrl.types import assistant, system, user

__all__ = ["describe_template"]

_QUESTION, _THOUGHT, _ANSWER, _NEXT, _RULE = (f"RAYRLPROBE{word}" for word in "ABCDE")
_REPLY = f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}"
_TOOL = {
    "type": "function",
    "function": {
        "name": "PROBETOOL",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}


def describe_template(chat: Chat) -> list[str]:
    """Describe what the template does besides putting messages one after the other.

    Each sentence says what the template does and what rayrl does about it. Empty for a template
    that only appends.
    """
    tokenizer = chat.tokenizer
    rewrites = [*_opening(tokenizer), *_thoughts(tokenizer), *_spaces(tokenizer)]
    return [
        *_system(chat),
        *_roles(tokenizer),
        *(rewrites or _other_rewrites(chat)),
        *_date(tokenizer),
        *_begin_and_end(chat),
        *_tools(chat),
    ]


def _system(chat: Chat) -> Iterator[str]:
    tokenizer = chat.tokenizer
    alone = render(tokenizer, [user(_QUESTION)])
    both = render(tokenizer, [system(_RULE), user(_QUESTION)])
    if both is None or _RULE not in both:
        problem = "refuses system messages" if both is None else "leaves system messages out"
        yield f"it {problem}; rayrl puts their text before the next user message"
        return
    default = _default_system(alone or "", both)
    if default:
        yield (
            "it begins with a system message of its own if none is given "
            f"({_shorten(default)}); rayrl leaves it: send a system message to replace it"
        )
        with_tools = render(tokenizer, [user(_QUESTION)], [_TOOL]) or default
        if chat.has_native_tools and default not in with_tools:
            yield "with tools it leaves that system message out; rayrl does so too"
    messages = [system(_RULE), user(_QUESTION), assistant(_ANSWER), user(_NEXT)]
    later = render(tokenizer, messages) or ""
    if alone and later.find(_RULE) > later.find(_ANSWER) > 0:
        yield (
            "it moves the system message to the last user message; rayrl leaves it in the first, "
            "where the model read it"
        )


def _default_system(alone: str, both: str) -> str:
    """Return the system message that the template adds, or an empty string.

    Args:
        alone: a user message rendered without a system message.
        both: the same with one.
    """
    before, _, between = both.partition(_QUESTION)[0].partition(_RULE)
    opening = alone.partition(_QUESTION)[0]
    if opening.startswith(before) and opening.endswith(between):
        return opening[len(before) : len(opening) - len(between)].strip()
    return ""


def _roles(tokenizer: Any) -> Iterator[str]:
    if render(tokenizer, [user(_QUESTION), user(_NEXT)]) is None:
        yield (
            "it refuses two messages of the same role in a row; rayrl joins them with an empty "
            "line between"
        )


def _opening(tokenizer: Any) -> Iterator[str]:
    """Compare the text between a user message and the reply before and after the model replied."""
    prompt = (render(tokenizer, [user(_QUESTION)]) or "").partition(_QUESTION)[2]
    whole = render(tokenizer, [user(_QUESTION), assistant(_ANSWER), user(_NEXT)]) or ""
    again = whole.partition(_QUESTION)[2].partition(_ANSWER)[0]
    if "<think>" in prompt and "</think>" not in prompt:
        yield (
            "it opens the model's thought itself; a reply begins inside it, so its text has "
            "</think> without <think>"
        )
    if prompt == again:
        return
    if prompt.startswith(again):
        yield (
            f"it asks for a reply with {prompt[len(again) :]!r} and leaves that out when a "
            "conversation is rendered again; rayrl keeps it, as the model read it"
        )
    elif again.startswith(prompt):
        yield (
            f"it writes {again[len(prompt) :]!r} before earlier replies when a conversation is "
            "rendered again; rayrl does not, because the model did not read it"
        )
    else:
        yield (
            f"it writes {again!r} before earlier replies but asks for one with {prompt!r}; rayrl "
            "keeps what the model read"
        )


def _thoughts(tokenizer: Any) -> Iterator[str]:
    text = render(tokenizer, [user(_QUESTION), assistant(_REPLY), user(_NEXT)]) or ""
    if _ANSWER in text and _THOUGHT not in text:
        yield (
            "it drops earlier <think> blocks when a conversation is rendered again; rayrl keeps "
            "them, because it trains on exactly the ids that were sampled"
        )
    elif _THOUGHT in text and _REPLY not in text:
        yield (
            "it reformats earlier <think> blocks when a conversation is rendered again; rayrl "
            "keeps them as they were sampled"
        )


def _spaces(tokenizer: Any) -> Iterator[str]:
    padded = [user(f"  {_QUESTION}  "), assistant(f"  {_ANSWER}  "), user(_NEXT)]
    text = render(tokenizer, padded) or ""
    if f"  {_QUESTION}  " not in text:
        yield "it strips white space around messages; rayrl does so too"
    if f"  {_ANSWER}  " not in text:
        yield (
            "it strips white space around earlier replies when a conversation is rendered again; "
            "rayrl keeps them as they were sampled"
        )
    plain = render(tokenizer, [user(_QUESTION), assistant(_ANSWER), user(_NEXT)]) or ""
    space = gap_before_eos(plain.partition(_ANSWER)[2], tokenizer)
    if space:
        yield f"it writes {space!r} between a reply and its end of turn; rayrl does not"


def _date(tokenizer: Any) -> Iterator[str]:
    text = render(tokenizer, [user(_QUESTION)]) or ""
    if "strftime_now" in str(tokenizer.chat_template) and time.strftime("%Y") in text:
        yield (
            "it writes today's date into every conversation, so the same task has different ids "
            "tomorrow; rayrl leaves it"
        )


def _begin_and_end(chat: Chat) -> Iterator[str]:
    tokenizer = chat.tokenizer
    bos: str | None = getattr(tokenizer, "bos_token", None)
    text = render(tokenizer, [user(_QUESTION)]) or ""
    if bos:
        ids = tokenizer.backend_tokenizer.encode("x", add_special_tokens=True).ids
        added = bool(ids) and ids[0] == tokenizer.convert_tokens_to_ids(bos)
        if text.startswith(bos * 2):
            yield f"it begins with {bos!r} twice; rayrl leaves both"
        elif added and text.startswith(bos):
            yield (
                f"it begins with {bos!r}, as the tokenizer does with every text; rayrl writes it "
                "once"
            )
        elif added:
            yield (
                f"the tokenizer begins every text with {bos!r}, the template does not; rayrl "
                "follows the template"
            )
    if len(chat.stop_ids) > 1:
        end, other = (repr(tokenizer.decode([token_id])) for token_id in chat.stop_ids[:2])
        yield (
            f"it ends a turn with {end}, but the tokenizer's end of text is {other}; either ends a "
            f"reply, and rayrl writes {end} after a reply that ended with {other}"
        )


def _tools(chat: Chat) -> Iterator[str]:
    if chat.has_native_tools:
        return
    listed = "PROBETOOL" in (render(chat.tokenizer, [user(_QUESTION)], [_TOOL]) or "")
    problem = "has its own format of tool calls" if listed else "does not support tools"
    yield f"it {problem}; rayrl describes them in the first message"


def _other_rewrites(chat: Chat) -> Iterator[str]:
    """Compare a conversation of three turns, appended, with the same one rendered at once."""
    messages = [user(_QUESTION)]
    ids = chat.start(messages)
    for reply, new in ((_ANSWER, _NEXT), (_RULE, _QUESTION)):
        ids += chat.reply(reply) + chat.extend([user(new)], True)
        messages += [assistant(reply), user(new)]
    appended, again = str(chat.tokenizer.decode(ids)), render(chat.tokenizer, messages)
    if again is not None and appended != again:
        at = next((k for k, (a, b) in enumerate(zip(appended, again, strict=False)) if a != b), 0)
        yield (
            f"rendered again, a conversation reads {_shorten(again[at:])} where rayrl appended "
            f"{_shorten(appended[at:])}; rayrl keeps what the model read"
        )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
