"""What a model's chat template does of its own, and what that means where ids are only appended.

A template renders a whole conversation; rayrl renders its beginning once and then appends ids. For
plain ChatML the two are the same. Where they are not, the difference is found here by rendering
probe conversations, and said in a sentence that a person can act on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rayrl.chat.renderer import Chat
from rayrl.chat.template import gap, render
from rayrl.types import assistant, system, user

__all__ = ["describe_template"]

_HEARD, _THOUGHT, _SAID, _NEXT, _RULE = (f"RAYRLPROBE{word}" for word in "ABCDE")
_REPLY = f"<think>\n{_THOUGHT}\n</think>\n\n{_SAID}"
_TOOL = {
    "type": "function",
    "function": {
        "name": "PROBETOOL",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}


def describe_template(chat: Chat) -> list[str]:
    """Sentences on what the template does besides putting messages one after the other.

    Each says what it does and what rayrl does about it. Empty for a template that only appends.
    """
    tokenizer = chat.tokenizer
    again = [*_opening(tokenizer), *_thoughts(tokenizer), *_spaces(tokenizer)]
    return [
        *_system(chat),
        *_roles(tokenizer),
        *(again or _otherwise(chat)),
        *_date(tokenizer),
        *_begin_and_end(chat),
        *_tools(chat),
    ]


def _system(chat: Chat) -> Iterator[str]:
    tokenizer = chat.tokenizer
    alone, both = (
        render(tokenizer, [user(_HEARD)]),
        render(tokenizer, [system(_RULE), user(_HEARD)]),
    )
    if both is None or _RULE not in both:
        what = "refuses system messages" if both is None else "leaves system messages out"
        yield f"it {what}; rayrl puts their text before the next user message"
        return
    own = _default_system(tokenizer)
    if own:
        yield (
            f"it begins with a system message of its own where none is given ({_short(own)}); "
            "rayrl leaves it: send a system message to replace it"
        )
        listing = render(tokenizer, [user(_HEARD)], [_TOOL]) or own
        if chat.speaks_tools and own not in listing:
            yield "with tools it leaves that system message out; rayrl does so too"
    talk = [system(_RULE), user(_HEARD), assistant(_SAID), user(_NEXT)]
    later = render(tokenizer, talk) or ""
    if alone and both.find(_RULE) >= 0 and later.find(_RULE) > later.find(_SAID) > 0:
        yield (
            "it moves the system message to the last user message; rayrl leaves it in the first, "
            "where the model read it"
        )


def _default_system(tokenizer: Any) -> str:
    """The system message that the template adds; empty without one."""
    alone = render(tokenizer, [user(_HEARD)]) or ""
    both = render(tokenizer, [system(_RULE), user(_HEARD)]) or ""
    before, _, between = both.partition(_HEARD)[0].partition(_RULE)
    opening = alone.partition(_HEARD)[0]
    if opening.startswith(before) and opening.endswith(between):
        return opening[len(before) : len(opening) - len(between)].strip()
    return ""


def _roles(tokenizer: Any) -> Iterator[str]:
    if render(tokenizer, [user(_HEARD), user(_NEXT)]) is None:
        yield (
            "it refuses two messages of one role in a row; rayrl joins them with an empty line "
            "between"
        )


def _opening(tokenizer: Any) -> Iterator[str]:
    """What stands between a user's message and the reply: when asked for, and when rendered again.

    With tools or thoughts some templates write more there.
    """
    asked = (render(tokenizer, [user(_HEARD)]) or "").partition(_HEARD)[2]
    again = _between(render(tokenizer, [user(_HEARD), assistant(_SAID), user(_NEXT)]) or "")
    if "<think>" in asked and "</think>" not in asked:
        yield (
            "it opens the model's thought itself; a reply begins inside it, so its text has "
            "</think> without <think>"
        )
    if asked == again:
        return
    if asked.startswith(again):
        yield (
            f"it asks for a reply with {asked[len(again) :]!r} and leaves that out when a "
            "conversation is rendered again; rayrl keeps it, as the model read it"
        )
    elif again.startswith(asked):
        yield (
            f"it writes {again[len(asked) :]!r} before earlier replies when a conversation is "
            "rendered again; rayrl does not, because the model did not"
        )
    else:
        yield (
            f"it writes {again!r} before earlier replies but asks for one with {asked!r}; rayrl "
            "keeps what the model read"
        )


def _between(text: str) -> str:
    return text.partition(_HEARD)[2].partition(_SAID)[0]


def _thoughts(tokenizer: Any) -> Iterator[str]:
    text = render(tokenizer, [user(_HEARD), assistant(_REPLY), user(_NEXT)]) or ""
    if _SAID in text and _THOUGHT not in text:
        yield (
            "it drops earlier <think> blocks when a conversation is rendered again; rayrl keeps "
            "them, because it trains on exactly the ids that were sampled"
        )
    elif _THOUGHT in text and _REPLY not in text:
        yield (
            "it writes earlier <think> blocks in another way when a conversation is rendered "
            "again; rayrl keeps them as they were sampled"
        )


def _spaces(tokenizer: Any) -> Iterator[str]:
    talk = [user(f"  {_HEARD}  "), assistant(f"  {_SAID}  "), user(_NEXT)]
    text = render(tokenizer, talk) or ""
    heard, said = (f"  {word}  " in text for word in (_HEARD, _SAID))
    if not heard:
        yield "it strips white space around messages; rayrl does so too"
    if not said:
        yield (
            "it strips white space around earlier replies when a conversation is rendered again; "
            "rayrl keeps them as they were sampled"
        )
    plain = render(tokenizer, [user(_HEARD), assistant(_SAID), user(_NEXT)]) or ""
    space = gap(plain.partition(_SAID)[2], tokenizer)
    if space:
        yield f"it writes {space!r} between a reply and its end of turn; rayrl does not"


def _date(tokenizer: Any) -> Iterator[str]:
    text = render(tokenizer, [user(_HEARD)]) or ""
    if "strftime_now" in str(tokenizer.chat_template) and time.strftime("%Y") in text:
        yield (
            "it writes today's date into every conversation, so the same task has other ids "
            "tomorrow; rayrl leaves it"
        )


def _begin_and_end(chat: Chat) -> Iterator[str]:
    tokenizer = chat.tokenizer
    begin: str | None = getattr(tokenizer, "bos_token", None)
    text = render(tokenizer, [user(_HEARD)]) or ""
    if begin:
        added = _begins_with(tokenizer, begin)
        if text.startswith(begin * 2):
            yield f"it begins with {begin!r} twice; rayrl leaves both"
        elif added and text.startswith(begin):
            yield (
                f"it begins with {begin!r}, as the tokenizer does with every text; rayrl has it "
                "once"
            )
        elif added:
            yield (
                f"the tokenizer begins every text with {begin!r}, the template does not; rayrl "
                "does as the template"
            )
    if len(chat.stop_ids) > 1:
        end, other = (repr(tokenizer.decode([one])) for one in chat.stop_ids[:2])
        yield (
            f"it ends a turn with {end}, but the tokenizer's end of text is {other}; a reply ends "
            f"with either, and {end} is written after one that ended with {other}"
        )


def _begins_with(tokenizer: Any, begin: str) -> bool:
    ids = tokenizer.backend_tokenizer.encode("x", add_special_tokens=True).ids
    return bool(ids) and ids[0] == tokenizer.convert_tokens_to_ids(begin)


def _tools(chat: Chat) -> Iterator[str]:
    if chat.speaks_tools:
        return
    listed = "PROBETOOL" in (render(chat.tokenizer, [user(_HEARD)], [_TOOL]) or "")
    what = "writes tool calls in a form of its own" if listed else "has no place for tools"
    yield f"it {what}; rayrl describes them in the first message"


def _otherwise(chat: Chat) -> Iterator[str]:
    """The last resort: a talk of three turns, appended and rendered again."""
    talk = [user(_HEARD)]
    ids = chat.start(talk)
    for reply, new in ((_SAID, _NEXT), (_RULE, _HEARD)):
        ids += chat.reply(reply) + chat.extend([user(new)], True)
        talk += [assistant(reply), user(new)]
    appended, again = str(chat.tokenizer.decode(ids)), render(chat.tokenizer, talk)
    if again is not None and appended != again:
        at = next((k for k, (a, b) in enumerate(zip(appended, again, strict=False)) if a != b), 0)
        yield (
            f"rendered again, a conversation reads {_short(again[at:])} where rayrl has appended "
            f"{_short(appended[at:])}; rayrl keeps what the model read"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
