"""Episodes as text for a terminal; what models wrote is never interpreted as markup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderHook
from rich.padding import Padding
from rich.panel import Panel
from rich.segment import Segment
from rich.text import Text

from rayrl.conversations import beginning, seat_name
from rayrl.errors import clip
from rayrl.terminal import visible
from rayrl.types import Episode, Message, Turn

__all__ = [
    "episode_panel",
    "message_text",
    "new_console",
    "reply_text",
    "scores_text",
    "task_text",
]


def new_console() -> Console:
    """Return a console that prints no control characters except its own."""
    console = Console()
    console.push_render_hook(_EscapeControls())
    return console


class _EscapeControls(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Wrap each renderable so that its control characters are escaped."""
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else visible(text), style, control)


def message_text(message: Message) -> Text:
    """Format a message to the model."""
    style = "dim italic" if message.role == "system" else ""
    label = "" if message.role == "user" else f"[{message.role}] "
    return Text(visible(f"{label}{message.content}"), style=style)


def reply_text(turn: Turn, seat: str = "") -> Text:
    """Format the model's reply of a turn."""
    text = Text(visible(f"{seat or seat_name(turn)} ▸ "), style="bold cyan")
    text.append(visible(turn.text), style="not bold cyan")
    if turn.finish != "stop":
        text.append(f"  (cut off: {turn.finish})", style="not bold yellow")
    return text


def scores_text(scores: Mapping[str, Mapping[str, float]], rewards: Mapping[str, float]) -> Text:
    """Format scores and reward of each seat in one line."""
    text = Text()
    for seat, seat_scores in scores.items():
        if len(scores) > 1:
            text.append(f"{seat}: ", style="bold")
        for name, value in seat_scores.items():
            label = "score/reward" if name == "reward" else name  # beside the reward itself
            text.append(f"{label} ", style="dim")
            text.append(f"{value:.3g}  ", style="bold")
        if seat in rewards:
            text.append("reward ", style="dim")
            text.append(f"{rewards[seat]:.3g}  ", style="bold green")
    return text


def task_text(episode: Episode) -> Text:
    """Format a task's fields, such as the right answer, without long texts its prompts repeat, and
    the episode's facts."""
    prompts = "\n".join(message.content for turn in episode.turns for message in turn.prompt)
    fields = {
        name: value
        for name, value in episode.task.to_dict().items()
        if name != "seed" and not (isinstance(value, str) and len(value) > 20 and value in prompts)
    }
    text = _named("task", fields)
    if episode.facts:
        text = text.append("\n" if fields else "").append(_named("facts", episode.facts))
    return text


def _named(what: str, values: Mapping[str, Any]) -> Text:
    text = Text(f"{what}: " if values else "", style="dim")
    text.append(visible("  ".join(f"{name} {clip(str(value))}" for name, value in values.items())))
    return text


def episode_panel(episode: Episode, title: str = "") -> Panel:
    """Format a conversation, followed by its scores or its failure."""
    parts: list[Text | Padding] = []
    begun = set()
    for turn in episode.turns:
        if turn.conversation and seat_name(turn) not in begun:
            begun.add(seat_name(turn))
            parts.append(Text(visible(beginning(turn)), "dim italic"))
        parts += [message_text(message) for message in turn.prompt]
        parts.append(Padding(reply_text(turn), (0, 0, 1, 2)))
    if episode.failure is not None:
        failure = f"{episode.failure.kind} failure: {episode.failure.message}"
        parts.append(Text(visible(failure), "red"))
    else:
        parts += [scores_text(episode.scores, episode.rewards), task_text(episode)]
    return Panel(Group(*parts), title=Text(title or episode.id), title_align="left", expand=False)
