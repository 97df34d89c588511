"""`rayrl synth`: play a teacher, keep its good episodes, and show them to a person.

What a student copies is what the teacher wrote, tics included, so the statistics and samples are
part of the program: they are printed every time, before anything is trained.
"""

from __future__ import annotations

import asyncio
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rayrl.cluster.open import make_environment, open_rollouts
from rayrl.config import Config, validate
from rayrl.config.mix import components, named_keys
from rayrl.environment.environment import Environment
from rayrl.environment.scoring import scores_of
from rayrl.errors import ConfigError, RunFailed, did_you_mean
from rayrl.report.console import episode_panel, new_console
from rayrl.report.statistics import eval_statistics
from rayrl.rollout.episode_io import read_episodes, write_episodes
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.folder import RunDir
from rayrl.run.journal import Journal, JournaledRollouts
from rayrl.run.progress_bar import ProgressBar
from rayrl.run.sampling.mixture import component_shares
from rayrl.run.stage import (
    EPISODES,
    already_finished,
    check_tasks,
    log_dropped,
    log_template_notes,
    seats_of,
    unplayed_note,
)
from rayrl.run.start_check import check_start
from rayrl.types import Episode, derive_seed

__all__ = [
    "Lengths",
    "Statistics",
    "Synthesized",
    "kept",
    "run",
    "samples",
    "statistics_of",
    "synth",
]

PLAYED = "played.jsonl"  # every episode, kept or not

COMMON = 8  # reply texts listed
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Median, 95th percentile and greatest of a count."""

    median: float
    p95: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Lengths:
        """Of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1])


@dataclass(frozen=True, slots=True)
class Statistics:
    """What there is to know of a set of episodes before learning from it.

    Attributes:
        turns: replies per episode.
        characters: of a reply.
        common: reply texts with every number written as `#`, and how often each was said.
        distinct: how many such texts there are.
        replies: how many replies.
    """

    turns: Lengths
    characters: Lengths
    common: tuple[tuple[str, int], ...]
    distinct: int
    replies: int


@dataclass(frozen=True, slots=True)
class Synthesized:
    """What a teacher played.

    Attributes:
        played: every episode, in the order of the tasks.
        kept: those with the scores that `synth.keep` asks for.
        file: where the kept ones are.
    """

    played: Sequence[Episode]
    kept: Sequence[Episode]
    file: Path


def run(config: Config) -> None:
    """Play, keep and write, and print what was kept."""
    console = new_console()
    found = asyncio.run(synth(config))
    for component, own in components(config).items():
        played, good = (
            [e for e in episodes if not component or e.env == component]
            for episodes in (found.played, found.kept)
        )
        if component:
            console.print(f"\n{component}", style="bold", markup=False)
        if played:
            console.print(summary(played, good, make_environment(own, component)))
    for episode in samples(found.kept, config.synth.show):
        console.print(episode_panel(episode))
    names = {episode.id for episode in found.kept}
    for episode in [e for e in found.played if e.id not in names][: min(1, config.synth.show)]:
        console.print(episode_panel(episode, f"{episode.id} (not kept)"))
    missing = unplayed(found.played)
    if missing:
        console.print(unplayed_note(missing), style="yellow")
    console.print(f"{len(found.kept)} episodes in {found.file}", highlight=False, markup=False)


async def synth(config: Config) -> Synthesized:
    """Play a teacher and write the episodes that are kept; a finished run is read again.

    While episodes are unplayed the file has what was kept so far and the run is not finished.

    Raises:
        ConfigError: a setting cannot work.
        RunFailed: nothing is kept, or the environment fails too often (`env.failure_budget`).
    """
    validate(config, "synth")
    check_start(config, "synth")
    with RunDir(config.run.dir, config, begin=False, verb="synth") as folder:
        out = Path(config.synth.out) if config.synth.out else folder.path / EPISODES
        everything = folder.path / PLAYED
        if folder.finished is not None and out.is_file():
            print(already_finished(folder.path))
            return Synthesized([*read_episodes(everything)], [*read_episodes(out)], out)
        played = await _play(config, everything, folder.begin)
        good = kept(played, config.synth.keep, mixed=bool(config.env.mix))
        if not good:
            raise RunFailed(_nothing_kept(config, played))
        write_whole(out, good)
        if not unplayed(played):
            folder.finish({"played": len(played), "kept": len(good), "file": str(out)})
        return Synthesized(played, good, out)


async def _play(config: Config, file: Path, begun: Callable[[], None]) -> list[Episode]:
    """Play `synth.episodes` tasks, one episode each, in the order of the tasks.

    Args:
        file: where each is written as it ends; those it has already are not played again.
        begun: called when all that plays has started.
    """
    plans: list[GroupPlan] = []
    seats: dict[str, dict[str, str]] = {}
    for (component, own), n in zip(components(config).items(), _counts(config), strict=True):
        environment = make_environment(own, component).training(
            own.env.held_out, own.env.duplicates
        )
        log_dropped(environment)
        with named_keys(component):
            seats[component] = seats_of(environment, own, config.synth.player)
        seed = derive_seed(config.run.seed, "synth", *filter(None, [component]))
        tasks = environment.tasks(seed, n)
        check_tasks(environment, tasks)
        prefix = f"synth-{component}" if component else "synth"
        plans += [
            GroupPlan(f"{prefix}-{k}", t, 1, derive_seed(seed, "play", k), component=component)
            for k, t in enumerate(tasks)
        ]
    log_template_notes(config, [who for players in seats.values() for who in players.values()])
    journal = Journal(file, plans, seats)
    with ProgressBar(f"{config.run.name}: {config.synth.player}", len(plans)) as bar:
        play = JournaledRollouts([journal], bar, config.endpoint.max_tokens_total)
        play.check_budget()
        async with open_rollouts(config, seats=seats, setting="synth.player") as rollouts:
            begun()
            played = await play.collect(rollouts, journal)
    groups = [*played.groups, *played.dropped]
    if not played.infra_failures:
        journal.seal(groups)
    by_id = {group.id: group for group in groups}
    return [episode for plan in plans for episode in by_id[plan.id].episodes]


def _counts(config: Config) -> list[int]:
    """Episodes of each component: `synth.episodes` by weight, the largest remainders rounded up."""
    if not config.env.mix:
        return [config.synth.episodes]
    exact = [share * config.synth.episodes for share in component_shares(config).values()]
    counts = [math.floor(one) for one in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: config.synth.episodes - sum(counts)]:
        counts[i] += 1
    return counts


def unplayed(episodes: Iterable[Episode]) -> int:
    """How many failed for no fault of their environment, so that they are to be played again."""
    return sum(e.failure is not None and e.failure.kind == "infra" for e in episodes)


def write_whole(file: Path, episodes: Sequence[Episode]) -> None:
    """Write a file of episodes that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    write_episodes(partial, episodes)
    partial.replace(file)


def _nothing_kept(config: Config, played: Sequence[Episode]) -> str:
    best: dict[str, float] = {}
    for episode in played:
        for name, value in scores_of(episode).items():
            best[name] = max(value, best.get(name, value))
    found = ", ".join(f"{name} {value:.3g}" for name, value in best.items()) or "none"
    asked = ", ".join(f"{name} {value:g}" for name, value in config.synth.keep.items())
    return (
        f"none of {len(played)} episodes has all of synth.keep ({asked}); the best scores were "
        f"{found}. Lower synth.keep, or use a better synth.player than {config.synth.player!r}."
    )


def kept(
    episodes: Sequence[Episode], least: Mapping[str, float], *, mixed: bool = False
) -> list[Episode]:
    """Episodes that did not fail and have every score of `least`, at or above its value.

    With several seats a score counts for each (`win`) or for one (`x.win`).

    Args:
        mixed: of several environments; a score counts for those that have it.

    Raises:
        ConfigError: a score that no episode has.
    """
    good = [(episode, scores_of(episode)) for episode in episodes if episode.failure is None]
    known = dict.fromkeys(name for _, scores in good for name in scores)
    for name, value in least.items() if good else ():
        if not _called(name, known):
            near = did_you_mean(name, known) or f" There are: {', '.join(known)}."
            raise ConfigError(
                f"synth.keep.{name}={value:g}: the environment gives no such score.{near}"
            )
    if not mixed:
        return [episode for episode, scores in good if _good_enough(scores, least)]
    have: dict[str, set[str]] = {}  # scores by environment
    for episode, scores in good:
        have.setdefault(episode.env, set()).update(scores)
    asked = {
        env: {name: value for name, value in least.items() if _called(name, scores)}
        for env, scores in have.items()
    }
    return [episode for episode, scores in good if _good_enough(scores, asked[episode.env])]


def _called(name: str, scores: Iterable[str]) -> list[str]:
    """The scores that `name` means: of that name, or every seat's."""
    return [score for score in scores if score == name or score.endswith(f".{name}")]


def _good_enough(scores: Mapping[str, float], least: Mapping[str, float]) -> bool:
    found = {name: [scores[score] for score in _called(name, scores)] for name in least}
    return all(values and min(values) >= least[name] for name, values in found.items())


def statistics_of(episodes: Sequence[Episode]) -> Statistics:
    """Statistics of at least one episode with at least one turn."""
    replies = [turn.text for episode in episodes for turn in episode.turns]
    texts = Counter(_NUMBER.sub("#", text) for text in replies)
    return Statistics(
        turns=Lengths.of([len(episode.turns) for episode in episodes]),
        characters=Lengths.of([len(text) for text in replies]),
        common=tuple(texts.most_common(COMMON)),
        distinct=len(texts),
        replies=len(replies),
    )


def samples(episodes: Sequence[Episode], n: int) -> list[Episode]:
    """`n` episodes, evenly from all of them, so from the whole range of tasks."""
    n = min(n, len(episodes))
    return [episodes[(2 * i + 1) * len(episodes) // (2 * n)] for i in range(n)]


def summary(played: Sequence[Episode], good: Sequence[Episode], env: Environment) -> RenderableType:
    """The statistics for a terminal."""
    parts: list[RenderableType] = []
    failed = sum(episode.failure is not None for episode in played)
    lost = f", {failed} failed" if failed else ""
    share = 100 * len(good) / len(played)
    parts.append(Text(f"{len(played)} episodes played{lost}, {len(good)} kept ({share:.1f}%)"))
    figures = {
        name: eval_statistics(set_, env.statistics_function)
        for name, set_ in (("played", played), ("kept", good))
    }
    table = Table()
    table.add_column("")
    for name in figures["played"]:
        table.add_column(Text(name), justify="right")
    for name, row in figures.items():
        table.add_row(
            name, *(row[column].text() if column in row else "–" for column in figures["played"])
        )
    parts.append(table)
    if any(episode.turns for episode in good):
        parts += _lengths(statistics_of(good))
    return Group(*parts)


def _lengths(found: Statistics) -> list[RenderableType]:
    sizes = Table()
    for name in ("kept", "median", "95%", "most"):
        sizes.add_column(name, justify="left" if name == "kept" else "right")
    for name, lengths in (
        ("replies per episode", found.turns),
        ("characters per reply", found.characters),
    ):
        sizes.add_row(name, f"{lengths.median:g}", f"{lengths.p95:g}", f"{lengths.most:g}")
    common = Table(title_justify="left", title=f"{found.distinct} different texts (numbers as #)")
    common.add_column("share", justify="right")
    common.add_column("reply")
    for text, count in found.common:
        common.add_row(f"{100 * count / found.replies:.1f}%", Text(text))
    return [sizes, common]
