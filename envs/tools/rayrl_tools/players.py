"""Players that actually use the tools: they know the question forms, never the answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rayrl import Message, format_call, format_line

from .questions import FORMS, Form

__all__ = ["clumsy", "perfect"]

# How each fact reads in a document.
_READ = {
    "altitude": r"(\d+) metres above",
    "birthplace": r"born in (\w+)",
    "born": r"in the year (\d+)",
    "founded": r"[Ff]ounded in (\d+)",
    "inhabitants": r"(\d+) inhabitants",
    "inventor": r"invented by (\w+ \w+)",
    "price": r"(\d+) crowns",
    "river": r"river (\w+)",
    "sold": r"[Ff]irst sold in the year (\d+)",
    "town": r"made in (\w+)",
}
_HIT = re.compile(r"\[(d\d+)\] (.+) \(\w+\)$", re.MULTILINE)
_DOCUMENT = re.compile(r"^(?:RESULT \w+: )?(.+?) \((?:town|person|product)\): (.+)$", re.MULTILINE)
_RESULT = re.compile(r"^(?:RESULT calculator: )?(-?[\d.]+)$", re.MULTILINE)
_PARAMETERS = {"search": "query", "open_document": "document", "calculator": "expression"}


@dataclass
class _Known:
    """The results of the tools so far."""

    ids: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    results: list[str] = field(default_factory=list)

    @classmethod
    def after(cls, messages: Sequence[Message]) -> _Known:
        known = cls()
        for message in messages:
            known.ids.update({title: name for name, title in _HIT.findall(message.content)})
            known.documents.update(_DOCUMENT.findall(message.content))
            known.results += _RESULT.findall(message.content)
        return known


def perfect(messages: Sequence[Message]) -> str:
    """Return the next reply of a player that makes all possible calls at once."""
    question = next(number for number, m in enumerate(messages) if m.role == "user")
    results = [m for m in messages[question + 1 :] if m.role != "assistant"]
    known = _Known.after(results)
    form, titles, numbers = _parse_question(messages[question].content)
    calls: dict[tuple[str, str], None] = {}  # in order, each once
    values = []
    for path in form.paths:
        start, *facts = path.split(".")
        value = titles[int(start)]
        for fact in facts:
            if value not in known.documents:
                opening = value in known.ids
                name = "open_document" if opening else "search"
                calls[name, known.ids[value] if opening else value] = None
                break
            value = _read(known.documents[value], fact)
        values.append(value)
    if not calls and form.work and not known.results:
        calls["calculator", form.work.format(*values, **numbers)] = None
    if calls:
        return "\n".join(_format(name, argument, messages) for name, argument in calls)
    return f"<answer>{known.results[-1] if form.work else values[0]}</answer>"


def clumsy(messages: Sequence[Message]) -> str:
    """Make three kinds of invalid calls in two replies, then play like `perfect`."""
    replies = sum(message.role == "assistant" for message in messages)
    if replies == 0:
        return (
            "CALL search"
            if _is_text_protocol(messages)
            else '<tool_call>{"name": "search", </tool_call>'
        )
    if replies == 1:
        wrong = [("serch", "a town"), ("calculator", "two plus two")]
        return "\n".join(_format(name, argument, messages) for name, argument in wrong)
    return perfect(messages)


def _is_text_protocol(messages: Sequence[Message]) -> bool:
    return "CALL search:" in messages[0].content


def _format(name: str, argument: str, messages: Sequence[Message]) -> str:
    if _is_text_protocol(messages):
        return format_line(name, argument)
    return format_call(name, {_PARAMETERS.get(name, "query"): argument})


def _parse_question(question: str) -> tuple[Form, list[str], dict[str, str]]:
    """Return the form of a question, its titles in the form's order, and its numbers."""
    for form in FORMS:
        pattern = re.escape(form.text)
        for slot in (*map(str, range(len(form.kinds))), "a", "b"):
            value = r"\d" if slot in "ab" else r"[A-Z]\w+(?: \w+)?"
            pattern = pattern.replace(re.escape(f"{{{slot}}}"), f"(?P<_{slot}>{value})")
        found = re.fullmatch(pattern, question)
        if found:
            titles = [found[f"_{number}"] for number in range(len(form.kinds))]
            numbers = {k[1:]: v for k, v in found.groupdict().items() if k in ("_a", "_b")}
            return form, titles, numbers
    raise ValueError(f"no question form matches {question!r}")


def _read(document: str, fact: str) -> str:
    found = re.search(_READ[fact], document)
    if found is None:
        raise ValueError(f"{fact!r} is not in {document!r}")
    return found[1]
