"""`rayrl replay FILE [EPISODE_ID]`: play stored episodes again by their recorded replies.

rayrl replay runs/tictactoe/synth/episodes.jsonl             does today's code play them the same?
rayrl replay FILE synth-3/0                                  one of them
rayrl replay FILE env.rewards.win=2 replay.out=new.jsonl     score them anew

Nothing is generated. The environment is that of the run the file lies in, unless env=NAME names
another; where its code says something else than it did, the episode is no longer its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from rayrl.cluster.open import make_environment
from rayrl.config import Config, validate
from rayrl.config.mix import components
from rayrl.environment.environment import Environment
from rayrl.environment.scoring import with_group_rewards
from rayrl.errors import ConfigError, DataError, EnvError, did_you_mean
from rayrl.report.console import new_console
from rayrl.rollout.agent import Options
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.episode_io import episode_to_json, read_episodes, restore_task
from rayrl.rollout.resume import EpisodeResume, ReplayMismatch
from rayrl.rollout.rollout import play_episode
from rayrl.rollout.subprocess_env import SubprocessEnv
from rayrl.run.files import write_atomic
from rayrl.types import Episode, Message, Turn

__all__ = ["KINDS", "Replayed", "replay", "run", "stored_episodes"]

KINDS = ("same", "scored differently", "diverged", "failed", "unfinished")
_LOOK_S = 0.1  # for others to go on, before a reply that was not recorded counts as needed
_DRAWN = 64  # tasks that show which classes an environment's tasks have
_UNASKED = "the environment asks for a reply that was not recorded"


@dataclass(frozen=True)
class Replayed:
    """A stored episode and what became of it.

    Attributes:
        stored: as it was.
        kind: one of KINDS.
        what: how it differs, in a line.
        difference: of the texts said, recorded against today's.
        episode: as it is scored today; None where it was not played to its end.
    """

    stored: Episode
    kind: str
    what: str = ""
    difference: str = ""
    episode: Episode | None = None


def run(config: Config) -> None:
    """Replay what `config.replay` names, print how it differs, and write it with today's scores.

    Raises:
        ConfigError: `replay.out` is among what is replayed.
        EnvError: an episode diverged or failed, or has other scores and nobody wanted them.
    """
    validate(config)
    settings = config.replay
    read, out = Path(settings.file).resolve(), Path(settings.out)
    if settings.out and (out.resolve() == read or read in out.resolve().parents):
        raise ConfigError(
            f"replay.out={settings.out}: what is replayed would be lost; name another file"
        )
    envs = {name: make_environment(own, name) for name, own in components(config).items()}
    stored = stored_episodes(settings.file, envs)
    wanted = _wanted(stored, settings.episode, settings.file)
    found: list[Replayed] = []
    for env in envs.values():
        own = [episode for episode in wanted if episode.env == env.name]
        found += asyncio.run(replay(env, own, config.env.deadline_s, config.env.isolated))
    place = {episode.id: k for k, episode in enumerate(wanted)}
    found.sort(key=lambda one: place[one.stored.id])
    if settings.episode:
        found = [one for one in found if one.stored.id == settings.episode]
    console = new_console()
    _show(found, settings.show, console)
    if settings.out:
        written = [one.episode for one in found if one.episode is not None]
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(episode_to_json(e), ensure_ascii=False) + "\n" for e in written]
        write_atomic(out, "".join(lines).encode())
        said = f"{len(written)} episodes with today's scores in {out}"
        console.print(said, markup=False, highlight=False)
    fine = KINDS[:2] if settings.out else KINDS[:1]
    wrong = sum(one.kind not in (*fine, "unfinished") for one in found)
    if wrong:
        names = " + ".join(env.name for env in envs.values())
        raise EnvError(f"{wrong} of {len(found)} episodes are not what they were with {names}")


def stored_episodes(file: str | Path, envs: Mapping[str, Environment]) -> list[Episode]:
    """The episodes of a file, their tasks in the classes that `envs` have today.

    Of an episode that was written twice the later line counts, as where a run was resumed.

    Raises:
        DataError: the file is malformed, or a task no longer fits its class.
        ConfigError: the episodes are another environment's.
    """
    found = list({episode.id: episode for episode in read_episodes(file)}.values())
    by_name = {env.name: env for env in envs.values()}
    others = sorted({episode.env for episode in found} - by_name.keys())
    if others:
        known = " or ".join(map(repr, by_name))
        key = f"env={others[0]} or env.name=…" if "" in envs else f"env.mix.{others[0]}.name=…"
        raise ConfigError(
            f"{file} has episodes of {', '.join(others)}, not of {known}: name theirs, {key}"
        )
    present = {episode.env for episode in found}
    kinds = {
        name: {type(task) for task in env.tasks(0, _DRAWN)}
        for name, env in by_name.items()
        if name in present
    }
    try:
        return [restore_task(episode, kinds[episode.env]) for episode in found]
    except DataError as error:
        raise DataError(f"{file}: {error}") from None


def _wanted(stored: Sequence[Episode], name: str, file: str) -> list[Episode]:
    """All, or one with its siblings: rewards over a group need them."""
    if not name:
        return list(stored)
    if name not in {episode.id for episode in stored}:
        near = did_you_mean(name, [episode.id for episode in stored])
        raise ConfigError(f"{file} has no episode {name!r}.{near}")
    return [episode for episode in stored if _group_of(episode.id) == _group_of(name)]


def _group_of(episode: str) -> str:
    return episode.rpartition("/")[0] or episode


async def replay(
    env: Environment,
    stored: Sequence[Episode],
    deadline_s: float | None = None,
    isolated: bool = False,
) -> list[Replayed]:
    """Play episodes again by their recorded replies, in their order.

    Args:
        env: today's.
        stored: whole groups, where `env` has rewards over a group.
        deadline_s: of one episode.
        isolated: run its code in a process of its own.
    """
    async with contextlib.AsyncExitStack() as stack:
        playing = await stack.enter_async_context(SubprocessEnv(env, 1)) if isolated else env
        found = [await _again(playing, episode, deadline_s) for episode in stored]
    groups: dict[str, list[int]] = {}
    for k, one in enumerate(found):
        groups.setdefault(_group_of(one.stored.id), []).append(k)
    for places in groups.values():
        for k, one in zip(places, _with_group(env, [found[k] for k in places]), strict=True):
            found[k] = one if one.episode is None else _compared(one.stored, one.episode)
    return found


class _Nobody:
    """Has no replies but the recorded ones."""

    trainable = False

    def __init__(self, course: EpisodeResume) -> None:
        self.course = course
        self.diverged: ReplayMismatch | None = None

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        """Let the others go on: they may end the episode without this reply, as they once did."""
        before = -1
        while before < self.course.replayed:
            before = self.course.replayed
            await asyncio.sleep(_LOOK_S)
        self.diverged = ReplayMismatch(_UNASKED, before, None, tuple(new))
        raise self.diverged

    def resume(self, conversation: Conversation, turn: Turn) -> None:
        """Ids are kept because a turn's place among them is compared."""
        conversation.ids += turn.prompt_ids
        conversation.ids += turn.completion_ids


async def _again(env: Environment, stored: Episode, deadline_s: float | None) -> Replayed:
    """One episode, without the rewards over its group."""
    if stored.failure is not None and stored.failure.kind != "env":
        return Replayed(stored, "unfinished", "it had not come to its end")
    course = EpisodeResume(stored.turns)
    nobody = _Nobody(course)
    try:
        episode = await play_episode(
            env,
            stored.task,
            dict.fromkeys(env.seats, nobody),
            id=stored.id,
            index=stored.index,
            seed=stored.seed,
            deadline_s=deadline_s,
            resume=course,
        )
    except ReplayMismatch as error:
        return _apart(stored, nobody.diverged or error)
    if nobody.diverged is not None:  # by a fork, or its code caught it
        return _apart(stored, nobody.diverged)
    episode = replace(
        stored,
        turns=episode.turns,
        scores=episode.scores,
        rewards=episode.rewards,
        facts=episode.facts,
        failure=episode.failure,
    )
    return Replayed(stored, "same", episode=episode)


def _apart(stored: Episode, error: ReplayMismatch) -> Replayed:
    """What to say of an episode that does not play the same."""
    what = f"at turn {error.matched} of {len(stored.turns)}: {error}"
    if error.failure is not None:
        return Replayed(stored, "failed", what)
    then = error.recorded.prompt if error.recorded is not None else ()
    difference = (
        ""
        if error.messages is None or error.messages == then
        else _difference(then, error.messages)
    )
    return Replayed(stored, "diverged", what, difference)


def _difference(then: Sequence[Message], now: Sequence[Message]) -> str:
    def lines(messages: Sequence[Message]) -> list[str]:
        return [
            line
            for message in messages
            for line in f"[{message.role}] {message.content}".splitlines()
        ]

    return "\n".join(
        difflib.unified_diff(lines(then), lines(now), "recorded", "today", lineterm="")
    )


def _with_group(env: Environment, group: Sequence[Replayed]) -> list[Replayed]:
    """A group with its rewards; the stored ones where a sibling is missing or not scored today."""
    played = [one.episode for one in group if one.episode is not None]
    if sorted(episode.index for episode in played) == list(range(len(group))):
        scored = with_group_rewards(env, played)
        return [replace(one, episode=e) for one, e in zip(group, scored, strict=True)]
    return [replace(one, episode=_with_stored(env, one)) for one in group]


def _with_stored(env: Environment, one: Replayed) -> Episode | None:
    if one.episode is None or one.episode.failure is not None:
        return one.episode
    scores = {
        seat: {
            **of_seat,
            **{
                name: value
                for name, value in one.stored.scores.get(seat, {}).items()
                if name in env.group_rewards
            },
        }
        for seat, of_seat in one.episode.scores.items()
    }
    rewards = {seat: env.reward(of_seat) for seat, of_seat in scores.items()}
    return replace(one.episode, scores=scores, rewards=rewards)


def _compared(stored: Episode, episode: Episode) -> Replayed:
    """What differs between two ends of the same turns."""
    then, now = stored.failure, episode.failure
    if now is not None:
        if then is not None and then.message == now.message:
            return Replayed(stored, "same", episode=episode)
        return Replayed(stored, "failed", now.message, episode=episode)
    old, new = _figures(stored), _figures(episode)
    changed = [
        f"{name} {_number(old, name)} → {_number(new, name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if then is not None:
        changed = ["it had failed", *changed]
    kind = "scored differently" if changed else "same"
    return Replayed(stored, kind, ", ".join(changed), episode=episode)


def _figures(episode: Episode) -> dict[str, float]:
    """Scores and rewards by name, with several seats `seat.name`."""
    figures: dict[str, float] = {}
    for seat, scores in episode.scores.items():
        start = f"{seat}." if len(episode.scores) > 1 else ""
        total = "reward" if "reward" not in scores else "reward (weighted)"
        figures |= {f"{start}{name}": value for name, value in scores.items()}
        figures[f"{start}{total}"] = episode.rewards[seat]
    return figures


def _number(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.6g}" if name in figures else "–"


def _means(found: Sequence[Replayed]) -> list[str]:
    """Of the figures that changed, their means over the episodes that had and have them."""
    both: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        if one.episode is not None:
            old, new = _figures(one.stored), _figures(one.episode)
            for name in old.keys() & new.keys():
                both.setdefault(name, []).append((old[name], new[name]))
    return [
        f"{name} {fmean(a for a, _ in pairs):.4g} → {fmean(b for _, b in pairs):.4g}"
        for name, pairs in sorted(both.items())
        if any(a != b for a, b in pairs)
    ]


def _show(found: Sequence[Replayed], texts: int, console: Console) -> None:
    """A line for every episode that differs, the first differences of texts, and the counts."""
    for one in found:
        if one.kind == "same" and len(found) > 1:
            continue
        what = textwrap.shorten(one.what, 500)
        line = f"{one.stored.id}: {one.kind}" + (f" {what}" if what else "")
        console.print(line, markup=False, highlight=False)
        if one.difference and texts > 0:
            console.print(textwrap.indent(one.difference, "    "), markup=False, highlight=False)
            texts -= 1
    counts = Counter(one.kind for one in found)
    table = Table()
    for kind in KINDS:
        table.add_column(kind, justify="right")
    table.add_row(*(str(counts[kind]) for kind in KINDS))
    console.print(table)
    means = _means(found)
    if means:
        console.print(f"on average: {', '.join(means)}", markup=False, highlight=False)
