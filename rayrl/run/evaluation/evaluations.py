"""Evaluations while training: the same episodes at every version, so that differences are paired.

    RUN/evaluations/version_000010.jsonl   episodes, in the order in which they end; then sorted
    RUN/evaluations/version_000010.json    values of each episode; exists once all were played

Every version of the weights plays the same tasks with the same seeds. What one version gained over
another is the mean of its differences episode by episode, whose interval is narrower than that of
two independent draws by what the tasks have in common.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from rayrl.cluster.open import make_environment
from rayrl.cluster.parts import greedy_player
from rayrl.cluster.rollouts import CollectedGroups
from rayrl.cluster.workers.env_worker import WorkerJob
from rayrl.config import Config
from rayrl.config.mix import components, eval_cells
from rayrl.environment.environment import Environment
from rayrl.environment.scoring import scores_of
from rayrl.environment.tasks import task_key
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.evaluation.checks import check_prefixes, run_checks
from rayrl.run.evaluation.intervals import mean_interval, score_interval
from rayrl.run.folder import RunDir
from rayrl.run.journal import Journal
from rayrl.run.stage import evaluation_plans, seats_of
from rayrl.types import Episode, Group

__all__ = [
    "RESERVED",
    "CellValues",
    "Evaluations",
    "RolloutBackend",
    "VersionValues",
    "best_evaluation",
    "eval_metrics",
    "gain",
    "mixes_versions",
    "pass_at_k",
    "powers",
    "since_best",
]

FOLDER = "evaluations"
RESERVED = ("reward", "version", "failed")  # a score called so is logged as score/NAME


@dataclass(frozen=True, slots=True)
class CellValues:
    """What the episodes of a cell came to, in the order of their plans.

    Attributes:
        tasks: (n,) number of each episode's task; episodes of equal tasks have the same.
        values: by metric, (n,) one per episode; None where it failed or has none.
    """

    tasks: Sequence[int]
    values: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class VersionValues:
    """What the episodes of one weights version came to.

    Attributes:
        failed: episodes without scores.
        checks: what exhaustive checks found, by their metrics (`eval/unbeatable/losing`, say).
    """

    version: int
    cells: Mapping[str, CellValues]
    failed: int = 0
    checks: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VersionValues:
        """Restore from `dataclasses.asdict`."""
        cells = {cell: CellValues(**values) for cell, values in data["cells"].items()}
        return cls(data["version"], cells, data["failed"], data.get("checks", {}))

    def metrics(self) -> Iterator[tuple[str, str, str]]:
        """Each metric as `eval/win`, with several cells `eval/CELL/win`; its cell and name."""
        for cell, one in self.cells.items():
            prefix = f"eval/{cell}" if len(self.cells) > 1 else "eval"
            for name in one.values:
                yield f"{prefix}/{name}", cell, name

    def of(self, metric: str) -> tuple[Sequence[int], Sequence[float | None]]:
        """Tasks and values of a metric, (n,) each.

        Raises:
            KeyError: the evaluation did not measure it.
        """
        cell, name = {key: (cell, name) for key, cell, name in self.metrics()}[metric]
        return self.cells[cell].tasks, self.cells[cell].values[name]


class RolloutBackend(Protocol):
    """The part of `cluster.Rollouts` that an evaluation needs."""

    async def collect(
        self,
        plans: Sequence[GroupPlan],
        min_version: int,
        on_group: Callable[[Group], None],
        known: Mapping[str, Group],
    ) -> CollectedGroups:
        """See `cluster.Rollouts`."""
        ...

    @property
    def job(self) -> WorkerJob:
        """What is played."""
        ...


class Evaluations:
    """The evaluations of a run.

    What has ended is read from the folder and not played again, an unfinished one episode by
    episode. All that follows from them is computed from those up to a version, so a run that makes
    steps again decides again as it had decided.

    Args:
        notify: called with each message for the user.
    """

    def __init__(self, config: Config, folder: RunDir, notify: Callable[[str], None]) -> None:
        self._config, self._folder, self._notify = config, folder, notify
        self._done: dict[int, VersionValues] = {}
        self._metrics: dict[int, dict[str, float]] = {}
        self._environments: dict[str, Environment] = {}  # what is evaluated, by component
        for file in sorted((folder.path / FOLDER).glob("version_*.json")):
            if (data := folder.read_json(f"{FOLDER}/{file.name}")) is not None:
                found = VersionValues.from_dict(data)
                self._done[found.version] = found

    def forget_after(self, version: int) -> None:
        """Drop evaluations of versions after this one: those weights are lost."""
        for file in (self._folder.path / FOLDER).glob("version_*.json*"):
            if int(file.stem.removeprefix("version_")) > version:
                file.unlink()
        self._done = {at: one for at, one in self._done.items() if at <= version}
        self._metrics.clear()

    def until(self, version: int) -> list[VersionValues]:
        """Those of versions up to this one, oldest first."""
        return [one for at, one in sorted(self._done.items()) if at <= version]

    def __contains__(self, version: int) -> bool:
        """Whether that version was evaluated."""
        return version in self._done

    def names(self, version: int) -> list[str]:
        """What the evaluation of a version measured of each episode: metrics that can be paired."""
        return [name for name, *_ in self._done[version].metrics()]

    def checks(self, version: int) -> Mapping[str, float]:
        """What exhaustive checks found of a version, by their metrics."""
        return self._done[version].checks

    def metrics(self, version: int) -> dict[str, float]:
        """Metrics of one evaluation, with its gain over the first; see `eval_metrics`."""
        if version not in self._metrics:
            first, now = self.until(version)[0], self._done[version]
            then = first if first is not now else None
            self._metrics[version] = eval_metrics(now, then, self._config.eval.samples)
        return self._metrics[version]

    async def play(self, rollouts: RolloutBackend, version: int) -> bool:
        """Play what is missing of the evaluation of `version`, which the replicas hold.

        Returns:
            Whether it is whole; not if a reply came from other weights: then it is left out.

        Raises:
            RunFailed: the environment failed too often (`env.failure_budget`).
        """
        config = self._config
        plans: dict[str, list[GroupPlan]] = {}
        seats: dict[str, dict[str, str]] = {}
        for name, own in components(config).items():
            if name not in self._environments:  # a data file may change meanwhile
                whole = make_environment(own, name)
                evaluated = whole.evaluation(own.env.held_out, own.env.duplicates)
                self._environments[name] = evaluated
            environment = self._environments[name]
            seats[name] = seats_of(environment, own, "model")
            for cell, args in eval_cells(own, name).items():
                seats[cell] = seats[name]
                of_cell = evaluation_plans(environment.configure(args), own, cell, name)
                plans[cell] = [
                    replace(one, id=f"eval-{version}-{one.id}", temperature=own.eval.temperature)
                    for one in of_cell
                ]
        every_plan = [plan for of_cell in plans.values() for plan in of_cell]
        file = self._folder.path / FOLDER / f"version_{version:06d}.jsonl"
        journal = Journal(file, every_plan, seats)
        if journal.known:
            n = len(journal.known)
            self._notify(f"{n} of {len(every_plan)} episodes of the evaluation were played before")
        try:
            played = await rollouts.collect(
                every_plan, min_version=version, on_group=journal.add, known=journal.known
            )
        finally:
            journal.close()
        groups = [*played.groups, *played.dropped]
        if any(mixes_versions(group, version) for group in groups):
            file.unlink()
            self._notify(
                f"the evaluation of version {version} is left out: some replies came from other "
                "weights"
            )
            return False
        journal.seal(groups)
        found = replace(
            _values(version, plans, groups),
            checks=await self._check(self._environments, rollouts, version),
        )
        self._folder.write_json(f"{FOLDER}/{file.stem}.json", asdict(found))
        self._done[version] = found
        return True

    async def _check(
        self, environments: Mapping[str, Environment], rollouts: RolloutBackend, version: int
    ) -> dict[str, float]:
        prefixes = check_prefixes(self._config, environments)
        if not prefixes:
            return {}
        open_player = partial(greedy_player, rollouts.job, min_version=version)
        found = await run_checks(self._config, environments, open_player)
        return {
            f"{prefixes[name]}{key}": float(value)
            for name, counts in found.items()
            for key, value in counts.items()
        }


def mixes_versions(group: Group, version: int) -> bool:
    """Whether a trained seat's reply in the group came from other weights than `version`."""
    return any(
        span.version != version
        for episode in group.episodes
        for turn in episode.turns
        if turn.seat in group.trainable
        for span in turn.versions
    )


def _values(
    version: int, plans: Mapping[str, Sequence[GroupPlan]], groups: Sequence[Group]
) -> VersionValues:
    """Values of all episodes by cell, in the order of the plans."""
    by_id = {group.id: group for group in groups}
    failed = sum(not group.complete for group in groups)
    cells: dict[str, CellValues] = {}
    for cell, of_cell in plans.items():
        rows = [_episode_values(by_id[plan.id]) for plan in of_cell]
        names = dict.fromkeys(name for row in rows for name in row)
        number: dict[str, int] = {}
        tasks = [number.setdefault(task_key(plan.task), len(number)) for plan in of_cell]
        cells[cell] = CellValues(tasks, {name: [row.get(name) for row in rows] for name in names})
    return VersionValues(version, cells, failed)


def _episode_values(group: Group) -> dict[str, float]:
    """Reward (the mean over trained seats) and scores of a group's only episode."""
    episode: Episode = group.episodes[0]
    if episode.failure is not None:
        return {}
    scores = {
        f"score/{name}" if name in RESERVED else name: value
        for name, value in scores_of(episode).items()
    }
    return {"reward": statistics.fmean(episode.rewards[s] for s in group.trainable), **scores}


def eval_metrics(
    now: VersionValues, first: VersionValues | None = None, samples: int = 1
) -> dict[str, float]:
    """Metrics of an evaluation, those that are not finite left out.

    Args:
        first: the run's first evaluation, that `gain` is over.
        samples: episodes of each task, the largest k of pass@k.

    Returns:
        `eval/version`, `eval/failed`, and of each metric (`eval/win`, say) its mean, the 95%
        interval `eval/win/low` and `/high`, the paired gain over `first` with its interval
        (`/gain`, `/gain_low`, `/gain_high`), and, of one that is 0 or 1 in every episode, pass@k
        for k = 2, 4, … and `samples`; and what exhaustive checks found.
    """
    metrics = {"eval/version": float(now.version), "eval/failed": float(now.failed), **now.checks}
    for metric, _, _ in now.metrics():
        tasks, values = now.of(metric)
        having = [(task, v) for task, v in zip(tasks, values, strict=True) if v is not None]
        numbers, clusters = [v for _, v in having], [task for task, _ in having]
        mean, low, high = score_interval(numbers, clusters)
        metrics |= {metric: mean, f"{metric}/low": low, f"{metric}/high": high}
        if set(numbers) <= {0.0, 1.0}:
            metrics |= {
                f"{metric}/pass@{k}": share
                for k in powers(samples)
                if (share := _mean_pass_at_k(having, k)) is not None
            }
        if first is not None and (found := gain(now, first, metric)) is not None:
            names = ("gain", "gain_low", "gain_high")
            metrics |= {f"{metric}/{n}": v for n, v in zip(names, found, strict=True)}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def gain(now: VersionValues, then: VersionValues, metric: str) -> tuple[float, float, float] | None:
    """Mean paired difference `now - then` and its 95% interval; None if no episode is in both.

    Pairs are episodes of the same task and seed that have a value in both evaluations. Intervals
    are Student's t over tasks (`mean_interval`), infinite for a single task.
    """
    try:
        tasks, ours = now.of(metric)
        _, theirs = then.of(metric)
    except KeyError:
        return None
    pairs = [
        (new - old, task)
        for task, new, old in zip(tasks, ours, theirs, strict=True)
        if new is not None and old is not None
    ]
    return mean_interval(*map(list, zip(*pairs, strict=True))) if pairs else None


def since_best(evaluations: Sequence[VersionValues], metric: str) -> int:
    """How many evaluations, of those given oldest first, came after the best one."""
    best = best_evaluation(evaluations, metric)
    return sum(one.version > best.version for one in evaluations)


def best_evaluation(evaluations: Sequence[VersionValues], metric: str) -> VersionValues:
    """The best of the evaluations, oldest first: a later one must be better beyond doubt.

    It replaces the best so far if the lower bound of its paired gain over that is above 0. The
    highest value would often be that of a lucky evaluation.
    """
    best, *others = evaluations
    for one in others:
        found = gain(one, best, metric)
        if found is not None and found[1] > 0:
            best = one
    return best


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples is correct, of `correct` in `n` samples.

    1 - C(n - correct, k) / C(n, k) (M. Chen et al., Evaluating Large Language Models Trained on
    Code, 2021, arXiv 2107.03374, section 2.1).

    Raises:
        ValueError: if not 0 <= correct <= n or not 1 <= k <= n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n: {correct=}, {n=}, {k=}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def _mean_pass_at_k(samples: Sequence[tuple[int, float]], k: int) -> float | None:
    """Mean over the tasks that have k samples, as (task, 0 or 1); None without any."""
    by_task = defaultdict[int, list[float]](list)
    for task, value in samples:
        by_task[task].append(value)
    found = [pass_at_k(len(v), int(sum(v)), k) for v in by_task.values() if len(v) >= k]
    return statistics.fmean(found) if found else None


def powers(most: int) -> list[int]:
    """The k of pass@k: 2, 4, … up to `most`, and `most`; pass@1 is the mean."""
    found = [2**i for i in range(1, most.bit_length())]
    return found if not found or found[-1] == most else [*found, most]
