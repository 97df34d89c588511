"""Markdown as tests see it: its code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from rayrl import cli
from rayrl.commands import submit
from rayrl.config import validate

__all__ = ["ROOT", "blocks", "commands", "settings", "understand"]

ROOT = Path(__file__).resolve().parent.parent
SHELL = ("bash", "sh", "console")


def blocks(file: str) -> list[tuple[str, str]]:
    """Kind and text of each code block of a file of this repository."""
    text = (ROOT / file).read_text("utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(found: Iterable[tuple[str, str]]) -> list[str]:
    """Every command of the shell blocks, continued lines put together."""
    return [
        line
        for kind, text in found
        if kind in SHELL
        for line in text.replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]


def settings(lines: Iterable[str]) -> list[tuple[list[str], str]]:
    """Of the commands that run or submit rayrl: the words that go to it, and the whole line."""
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["jobs/submit"]:
            found.append((submit.options().parse_args(words[1:]).words, line))
        elif "rayrl" in words:
            found.append((words[words.index("rayrl") + 1 :], line))
    return found


def understand(words: list[str]) -> None:
    """Compose and check the configuration of a command line; starts nothing."""
    arguments = cli.parse(words)
    if arguments.verb == "report":  # of a run that is not there
        assert len(arguments.words) == 1
        return
    if arguments.verb == "env" and arguments.words[:1] != ("check",):  # without settings
        return
    validate(cli.configuration(arguments), arguments.verb)
