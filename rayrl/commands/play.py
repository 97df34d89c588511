"""`rayrl play`: watch a model in this terminal, or take one of its seats.

rayrl play model.path=runs/tictactoe/rl2/model                     watch it play a task
rayrl play play.seat=agent                                         be the agent yourself
rayrl play env=tictactoe_versus play.seat=o model.path=…           play against it
rayrl play env.seats.agent=player:teacher                          watch a scripted player
rayrl play experiment=mixture play.component=words                 an environment of a mixture
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TextIO, cast

from rich.console import Console
from rich.text import Text

from rayrl.cluster.open import make_environment
from rayrl.cluster.parts import open_players
from rayrl.config import Config, validate
from rayrl.config.mix import component_of
from rayrl.environment.environment import Environment
from rayrl.environment.scoring import with_group_rewards
from rayrl.errors import ConfigError, did_you_mean
from rayrl.report.console import message_text, new_console, reply_text, scores_text, task_text
from rayrl.rollout.agent import Options, Player
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.players import HumanPlayer
from rayrl.rollout.rollout import play_episode
from rayrl.run.stage import log_template_notes, seats_of
from rayrl.run.start_check import check_start
from rayrl.terminal import visible
from rayrl.types import Episode, Message, Sampling, Turn, derive_seed

__all__ = ["Shown", "human", "outcome", "play", "run", "seats_for"]

WON = {True: "win", False: "loss"}


class Shown:
    """A player whose conversation is printed as it happens."""

    trainable = False

    def __init__(self, player: Player, seat: str, console: Console) -> None:
        self.player, self.seat, self.console = player, seat, console

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        """Print what is said, wait for the answer, print it."""
        for message in new:
            self.console.print(message_text(message))
        turn = await self.player.answer(conversation, new, options)
        self.console.print(reply_text(turn, self.seat))
        self.console.print()
        return turn

    def end(self, conversation: Conversation) -> None:
        """Pass on that the conversation is over."""
        end = getattr(self.player, "end", None)
        if end is not None:
            end(conversation)


def run(config: Config) -> None:
    """Play until the person has had enough, or `play.episodes` were watched."""
    validate(config, "play")
    check_start(config, "play")
    console = new_console()
    try:
        asyncio.run(play(config, console))
    except EOFError:
        console.print("\nThe input has ended.")


async def play(
    config: Config, console: Console, read: Callable[[str], str] = input
) -> list[Episode]:
    """Play `play.episodes` tasks one after the other and print them.

    With a person in a seat only that seat's messages are shown: the rival's thoughts are its own.

    Returns:
        The episodes.
    """
    component = config.play.component
    config = component_of(config, "play.component", component)
    environment = make_environment(config, component)
    seats = seats_for(environment, config)
    log_template_notes(config, seats.values())
    s = config.sampling
    sampling = Sampling(config.play.temperature, s.top_p, s.top_k, s.max_tokens, tuple(s.stop))
    mine = config.play.seat
    seed = derive_seed(config.run.seed, "play")
    tasks = environment.tasks(seed, config.play.episodes)
    played = []
    async with open_players(config, seats, sampling) as others:
        players: dict[str, Player] = dict(others)
        if mine:
            form = config.play.form or environment.form
            players[mine] = human(form, console, read)
        else:
            players = {seat: Shown(one, seat, console) for seat, one in players.items()}
        for number, task in enumerate(tasks):
            console.rule(f"episode {number + 1} of {len(tasks)}", align="left")
            episode = await play_episode(
                environment,
                task,
                players,
                id=f"play-{number}",
                seed=derive_seed(seed, number),
                deadline_s=None if mine else config.env.deadline_s,
            )
            (episode,) = with_group_rewards(environment, [episode])
            played.append(episode)
            if episode.failure is not None:
                console.print(visible(episode.failure.message), style="red", markup=False)
            else:
                if environment.ending_function is not None:
                    seat = mine or environment.seats[0]
                    console.print(Text(visible(environment.ending_function(episode, seat))))
                for line in outcome(environment, episode, mine):
                    console.print(line, style="bold")
                console.print(scores_text(episode.scores, episode.rewards))
                console.print(task_text(episode))
    return played


def outcome(environment: Environment, episode: Episode, mine: str = "") -> list[str]:
    """Who won, a line for each seat (or for the person's, if there is one).

    With several seats whoever has the highest score `win` has won. With one it is what the
    environment reports (`{"win/draw/loss": "loss"}`), or its score `win` if that is 0 or 1.
    """
    won = {seat: scores["win"] for seat, scores in episode.scores.items() if "win" in scores}
    found: dict[str, str] = {}
    if len(won) > 1:
        best = max(won.values())
        winners = [seat for seat, value in won.items() if value == best]
        for seat in won:
            found[seat] = "draw" if len(winners) == len(won) else WON[seat in winners]
    elif len(episode.scores) == 1:
        (seat,) = episode.scores
        reported = (
            environment.statistics_function(episode) if environment.statistics_function else {}
        )
        named = [value for value in reported.values() if isinstance(value, str)]
        if named:
            found[seat] = named[0]
        elif won.get(seat) in (0.0, 1.0):
            found[seat] = WON[won[seat] == 1.0]
    return [
        visible(_in_words("you" if seat == mine else seat, result))
        for seat, result in found.items()
        if not mine or seat == mine
    ]


def _in_words(who: str, result: str) -> str:
    said = {"win": f"{who} won", "loss": f"{who} lost", "draw": "a draw"}
    return f"{said.get(result, f'{who}: {result}')}."


def seats_for(environment: Environment, config: Config) -> dict[str, str]:
    """Who plays the seats that are not the person's: as `env.seats` says, else `play.player`.

    Raises:
        ConfigError: `play.seat` is not a seat.
    """
    mine = config.play.seat
    if mine and mine not in environment.seats:
        near = did_you_mean(mine, environment.seats)
        known = ", ".join(environment.seats)
        raise ConfigError(
            f"play.seat={mine}: {environment.name!r} has no such seat.{near} It has: {known}."
        )
    seats = seats_of(environment, config, config.play.player)
    return {seat: who for seat, who in seats.items() if seat != mine}


def human(form: str, console: Console, read: Callable[[str], str]) -> HumanPlayer:
    """The person at this terminal; what is typed takes the place of `{}` in `form`."""
    out = cast(TextIO, console.file)
    return HumanPlayer(read, out, form=lambda line: form.replace("{}", line.strip()))
