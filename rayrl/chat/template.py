"""What a chat template makes of messages, and messages and texts as it can take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayrl.types import Message

__all__ = ["fold", "gap", "render", "without_marks"]


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str | None:
    """What the template makes of messages, up to where the model is to answer; None if it refuses.

    Templates raise whatever they like about messages they do not take.
    """
    data = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            data, tools=tools, add_generation_prompt=True, tokenize=False
        )
    except Exception:
        return None
    return str(text)


def fold(messages: Sequence[Message]) -> list[Message]:
    """The same words for a template without system messages, or whose roles must alternate.

    A system message becomes the beginning of the user's message after it, and neighbours of one
    role become one message.
    """
    folded: list[list[Message]] = []
    for message in messages:
        one = replace(message, role="user") if message.role == "system" else message
        if folded and folded[-1][-1].role == one.role != "tool":
            folded[-1].append(one)
        else:
            folded.append([one])
    return [
        replace(some[-1], content="\n\n".join([one.content for one in some])) for some in folded
    ]


def gap(after: str, tokenizer: Any) -> str:
    """White space that a template writes between a reply and the end of text.

    Args:
        after: what it writes after a reply.
    """
    end = getattr(tokenizer, "eos_token", None)
    bare = after.lstrip()
    return after[: len(after) - len(bare)] if end and bare.startswith(end) else ""


def without_marks(value: Any, marks: Collection[str]) -> Any:
    """JSON without the punctuation of its texts and names, and without any of `marks`.

    What it is made of stays: as many items, and the same words.
    """
    if isinstance(value, str):
        if any(mark in value for mark in marks):
            return "x" * len(value)
        return "".join(c if c.isalnum() or c in " _" else "x" for c in value)
    if isinstance(value, Mapping):
        kept = {}
        for index, (key, one) in enumerate(value.items()):
            word = without_marks(key, marks)
            kept[key if word == key else f"{word}{index}"] = without_marks(one, marks)
        return kept
    if isinstance(value, list | tuple):
        return [without_marks(one, marks) for one in value]
    return value
