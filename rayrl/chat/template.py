"""Render chat templates, and adapt messages and tool schemas to what templates accept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayrl.types import Message

__all__ = ["fold", "gap_before_eos", "render", "without_punctuation"]


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str | None:
    """Render messages up to the start of the model's reply; None if the template refuses them.

    Templates raise arbitrary exceptions for messages that they do not support.
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
    """Merge messages for templates without system messages, or whose roles must alternate.

    System messages become user messages, and consecutive messages of a role become one.
    """
    groups: list[list[Message]] = []
    for message in messages:
        if message.role == "system":
            message = replace(message, role="user")
        if groups and groups[-1][-1].role == message.role != "tool":
            groups[-1].append(message)
        else:
            groups.append([message])
    return [
        replace(group[-1], content="\n\n".join([message.content for message in group]))
        for group in groups
    ]


def gap_before_eos(after: str, tokenizer: Any) -> str:
    """Return the white space that a template writes between a reply and the end-of-text token.

    Args:
        after: what the template writes after a reply.
    """
    end = getattr(tokenizer, "eos_token", None)
    stripped = after.lstrip()
    return after[: len(after) - len(stripped)] if end and stripped.startswith(end) else ""


def without_punctuation(value: Any, tokens: Collection[str]) -> Any:
    """Replace punctuation, and strings that contain one of `tokens`, by "x" in JSON data.

    The structure stays, and so do all other words.
    """
    if isinstance(value, str):
        if any(token in value for token in tokens):
            return "x" * len(value)
        return "".join(c if c.isalnum() or c in " _" else "x" for c in value)
    if isinstance(value, Mapping):
        replaced = {}
        for index, (key, item) in enumerate(value.items()):
            word = without_punctuation(key, tokens)
            unique = key if word == key else f"{word}{index}"
            replaced[unique] = without_punctuation(item, tokens)
        return replaced
    if isinstance(value, list | tuple):
        return [without_punctuation(item, tokens) for item in value]
    return value
