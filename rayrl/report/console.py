"""An episode for a person to read in a terminal. Text of models is never taken for markup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderHook
from rich.padding import Padding
from rich.panel import Panel
from rich.segment import Segment
from rich.text import Text

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
    """A console of this terminal that prints no control characters but its own."""
    console = Console()
    console.push_render_hook(_Visible())
    return console


class _Visible(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What is printed, each without control characters."""
        return [_Shown(one) for one in renderables]


class _Shown:
    def __init__(self, what: ConsoleRenderable) -> None:
        self.what = what

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.what, options):
            yield Segment(text if control else visible(text), style, control)


def message_text(message: Message) -> Text:
    """What was said to the model."""
    style = "dim italic" if message.role == "system" else ""
    label = "" if message.role == "user" else f"[{message.role}] "
    return Text(visible(f"{label}{message.content}"), style=style)


def reply_text(turn: Turn, seat: str = "") -> Text:
    """What the model said."""
    text = Text(f"{seat or turn.seat} ▸ ", style="bold cyan")
    text.append(visible(turn.text), style="not bold cyan")
    if turn.finish != "stop":
        text.append(f"  (cut off: {turn.finish})", style="not bold yellow")
    return text


def scores_text(scores: Mapping[str, Mapping[str, float]], rewards: Mapping[str, float]) -> Text:
    """Scores and reward of each seat in one line."""
    text = Text()
    for seat, of_seat in scores.items():
        if len(scores) > 1:
            text.append(f"{seat}: ", style="bold")
        for name, value in of_seat.items():
            text.append(f"{name} ", style="dim")
            text.append(f"{value:.3g}  ", style="bold")
        if seat in rewards:
            text.append("reward ", style="dim")
            text.append(f"{rewards[seat]:.3g}  ", style="bold green")
    return text


def task_text(episode: Episode) -> Text:
    """What the task holds, such as the right answer, without long texts that were said."""
    said = "\n".join(message.content for turn in episode.turns for message in turn.prompt)
    fields = {
        name: value
        for name, value in episode.task.to_dict().items()
        if name != "seed" and not (isinstance(value, str) and len(value) > 20 and value in said)
    }
    text = Text("task: " if fields else "", style="dim")
    text.append(visible("  ".join(f"{name} {value}" for name, value in fields.items())))
    return text


def episode_panel(episode: Episode, title: str = "") -> Panel:
    """The whole conversation, and beneath it the scores or what went wrong."""
    parts: list[Text | Padding] = []
    for turn in episode.turns:
        parts += [message_text(message) for message in turn.prompt]
        parts.append(Padding(reply_text(turn), (0, 0, 1, 2)))
    if episode.failure is not None:
        said = f"{episode.failure.kind} failure: {episode.failure.message}"
        parts.append(Text(visible(said), "red"))
    else:
        parts += [scores_text(episode.scores, episode.rewards), task_text(episode)]
    return Panel(Group(*parts), title=Text(title or episode.id), title_align="left", expand=False)
