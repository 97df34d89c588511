"""Nothing that others wrote drives the terminal."""

from __future__ import annotations

import io
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table

from rayrl import cli
from rayrl.cli import compose
from rayrl.commands.play import play
from rayrl.config import Config
from rayrl.errors import RunFailed
from rayrl.report.console import episode_panel, new_console
from rayrl.rollout.players import HumanPlayer
from rayrl.run.progress_bar import ProgressBar
from rayrl.terminal import visible
from rayrl.types import Episode, Failure, Message, Task, Turn
from tests.test_cli import program

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\x00\x7f\ud83d"
ANY = st.text(st.characters(exclude_categories=()), max_size=40)


def controls(text: str) -> set[str]:
    """Characters that a terminal obeys, but for newlines and tabs."""
    return {one for one in text if unicodedata.category(one) in ("Cc", "Cs")} - {"\n", "\t"}


@settings(max_examples=200)
@given(ANY)
def test_what_is_visible_does_nothing(text: str) -> None:
    shown = visible(text)
    assert not controls(shown)
    shown.encode()
    kept = "".join(one for one in text if not controls(one))
    assert visible(kept) == kept
    assert visible(shown) == shown


def test_what_they_look_like() -> None:
    assert visible("a\x1b[2J\tb\r\nc\x9b\x7f\ud83d") == "a␛[2J\tb␍\nc\\x9b\\x7f\\ud83d"
    assert visible("Grüße, 世界 🙂\n") == "Grüße, 世界 🙂\n"


def episode(failed: bool = False) -> Episode:
    turn = Turn("agent", (Message("user", EVIL), Message("system", EVIL)), EVIL, "stop")
    failure = Failure("env", EVIL) if failed else None
    scores = {} if failed else {"agent": {EVIL: 1.0}}
    return Episode(EVIL, "e", Task(seed=0), 0, (turn,), scores, {"agent": 1.0}, failure)


@pytest.mark.parametrize("failed", [False, True])
def test_a_console_prints_none(failed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = new_console()
    console.print(EVIL, markup=False)
    console.print(episode_panel(episode(failed)))
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.rule(EVIL)
    out = capsys.readouterr().out
    assert "␛" in out
    assert not controls(out)


def test_an_error_prints_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Config) -> None:
        raise RunFailed(f"the server said {EVIL}")

    program(monkeypatch, "train", run)
    assert cli.main(["train"]) == 1
    err = capsys.readouterr().err
    assert "the server said ␛]0;owned" in err
    assert not controls(err)


async def test_a_person_is_shown_none() -> None:
    out = io.StringIO()
    player = HumanPlayer(lambda prompt: "yes", out)
    from rayrl.rollout.agent import Conversation, Options

    await player.answer(Conversation("s", "agent"), (Message("user", EVIL),), Options(0))
    assert "␛" in out.getvalue()
    assert not controls(out.getvalue())


async def test_play_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    screen = Console(file=io.StringIO(), width=100, color_system=None)
    config = compose(["env.name=copyword", "play.seat=agent"], verb="play")
    await play(config, screen, read=lambda prompt: EVIL)
    assert isinstance(screen.file, io.StringIO)
    assert not controls(screen.file.getvalue())


@pytest.mark.parametrize("tty", [False, True])
def test_a_bar_shows_none(tty: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: tty  # type: ignore[method-assign]
    with ProgressBar("title\x9b", 3, stream=stream) as bar:
        bar.update(3, {"reward": "0\x9b1"})
        bar.note("note\x9b")
    assert "\x9b" not in stream.getvalue()
    assert "note\\x9b" in stream.getvalue()
    sys.stdout.flush()
