"""Evaluations of a run that learns: when they are due, the best model, and an early end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rayrl.config import Config
from rayrl.config.mix import components, eval_cells
from rayrl.config.stop_rule import NoProgress, parse_stop_rule
from rayrl.environment.environment import Environment
from rayrl.errors import ConfigError, did_you_mean
from rayrl.run.evaluation.checks import check_prefixes
from rayrl.run.evaluation.evaluations import (
    RESERVED,
    Evaluations,
    RolloutBackend,
    best_evaluation,
    powers,
    since_best,
)
from rayrl.run.folder import RunDir
from rayrl.run.metrics import summary
from rayrl.run.stage import MODEL_BEST

__all__ = ["Evaluator", "check_metrics"]

SUFFIXES = ("low", "high", "gain", "gain_low", "gain_high")  # of a metric's own metrics


class Exporter(Protocol):
    """The part of `cluster.LearnerGroup` that keeps the best model."""

    async def export(self, folder: str | Path) -> None: ...


class Evaluator:
    """Plays `eval.cells` with the weights of some versions, and draws the conclusions.

    What it says of a version depends on the evaluations up to it alone, so that a run which makes
    steps again decides again as it had decided.

    Args:
        rollouts: plays, on replicas that hold the version to be evaluated.
        learner: exports the best model.
        verb: train or sft, whose `steps` and `stop_when` count.
        notify: called with each message for the user.
    """

    def __init__(
        self,
        config: Config,
        folder: RunDir,
        rollouts: RolloutBackend,
        learner: Exporter,
        verb: str,
        notify: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._notify = config, folder, notify
        self._rollouts, self._learner = rollouts, learner
        self._steps = config.train.steps if verb == "train" else config.sft.steps
        self._stop_key, self._stop_when = _stop_when(config, verb)
        self._rule = parse_stop_rule(self._stop_key, self._stop_when)
        self._found = Evaluations(config, folder, notify)
        if folder.went_back and (intact := folder.latest_checkpoint()):
            self._found.forget_after(intact.step)

    def __contains__(self, version: int) -> bool:
        """Whether that version was evaluated."""
        return version in self._found

    def is_due(self, version: int) -> bool:
        """Whether `eval.every` wants this version evaluated."""
        every = self._config.eval.every
        if version == 0:
            return bool(every) and self._config.eval.at_start
        return bool(every) and (version % every == 0 or version == self._steps)

    async def evaluate(self, version: int, held: int) -> dict[str, float]:
        """Play what is missing of the evaluation of a version, and export it if it is the best.

        Args:
            held: the version that the replicas hold.

        Returns:
            See `eval_metrics`; nothing if the replicas hold a newer one, because the learner was
            lost, or if a reply came from other weights.

        Raises:
            ConfigError: `run.keep_best` or `stop_when` names no metric of the evaluation.
            RunFailed: the environment failed too often (`env.failure_budget`).
        """
        found, best = self._found, self._config.run.keep_best
        if version not in found:
            if version < held:
                self._notify(f"version {version} is not evaluated: replicas have newer ones")
                return {}
            if not await found.play(self._rollouts, version):
                return {}
            self._notify(summary(found.metrics(version), found.checks(version)))
        if self._rule:
            self._check_metric(self._stop_key, self._rule.metric, version)
        if best:
            self._check_metric("run.keep_best", best, version)
            if best_evaluation(found.until(version), best).version == version:
                with self._folder.whole(MODEL_BEST) as path:
                    await self._learner.export(path)
        return found.metrics(version)

    def _check_metric(self, key: str, metric: str, version: int) -> None:
        """Raise ConfigError if the evaluation of `version` lacks a metric that a setting names."""
        names = self._found.names(version)
        paired = key == "run.keep_best" or isinstance(self._rule, NoProgress)
        if metric not in (names if paired else self._found.metrics(version)):
            names += [] if paired else self._found.checks(version)
            raise _unknown_metric(key, metric, names)

    def is_over(self, version: int) -> bool:
        """Whether the evaluations up to this version, which has one, meet `stop_when`."""
        if self._rule is None or version not in self._found:
            return False
        evaluated = self._found.until(version)
        if isinstance(self._rule, NoProgress):
            met = since_best(evaluated, self._rule.metric) >= self._rule.times
        else:
            of_each = [self._found.metrics(one.version) for one in evaluated]
            met = self._rule.is_met([metrics.get(self._rule.metric) for metrics in of_each])
        if met:
            self._notify(f"ended by {self._stop_key}={self._stop_when}")
        return met

    def by_step(self, version: int) -> dict[int, dict[str, float]]:
        """Metrics of the evaluations up to this version, by the step that made their weights."""
        found = self._found
        return {one.version - 1: found.metrics(one.version) for one in found.until(version)}

    def start_metrics(self) -> dict[str, float]:
        """Metrics of the evaluation before the first step, as `eval_start/…`; none without it."""
        at_start = self._found.metrics(0) if 0 in self._found else {}
        return {f"eval_start/{key.removeprefix('eval/')}": v for key, v in at_start.items()}

    def result(self, version: int) -> dict[str, Any]:
        """What a run that ended with this version says of its best model."""
        evaluated, metric = self._found.until(version), self._config.run.keep_best
        if not metric or not evaluated:
            return {}
        best = best_evaluation(evaluated, metric).version
        value = self._found.metrics(best)[metric]
        return {"best": {"model": MODEL_BEST, "version": best, metric: value}}


def check_metrics(config: Config, environments: Mapping[str, Environment], verb: str) -> None:
    """Raise ConfigError if `run.keep_best` or `stop_when` names what cannot be measured.

    Called before anything is written. A score that the environment declares but does not return,
    or a check does not count, is found by `Evaluator.evaluate`.

    Args:
        environments: by component of the mixture; without one, under an empty name.
    """
    cells = {
        cell: _declared(environments[component].configure(args))
        for component, own in components(config).items()
        for cell, args in eval_cells(own, component).items()
    }
    prefixes = {cell: f"eval/{cell}" if len(cells) > 1 else "eval" for cell in cells}
    every = [f"{prefixes[cell]}/{name}" for cell, declared in cells.items() for name in declared]
    names = list(dict.fromkeys(every))
    if (best := config.run.keep_best) and best not in names:
        raise _unknown_metric("run.keep_best", best, names)
    checks = check_prefixes(config, environments)
    for cell, prefix in prefixes.items():
        if f"{prefix}/" in checks.values():
            raise ConfigError(
                f"eval.cells.{cell}: an exhaustive check of the environment has that name, and "
                "metrics of both would be called the same; name the cell otherwise"
            )
    key, stop_when = _stop_when(config, verb)
    rule = parse_stop_rule(key, stop_when)
    if rule is None:
        return
    known = names
    if not isinstance(rule, NoProgress):
        if rule.metric.startswith(tuple(checks.values())):
            return  # what a check counts is known when it has run
        known = [*names, *(f"{name}/{suffix}" for name in names for suffix in SUFFIXES)]
        known += [f"{name}/pass@{k}" for name in names for k in powers(config.eval.samples)]
        known.append("eval/failed")
        known += [prefix + rule.metric.rpartition("/")[2] for prefix in checks.values()]
        names += [f"{prefix}…" for prefix in checks.values()]
    if rule.metric not in known:
        raise _unknown_metric(key, rule.metric, known, shown=names)


def _declared(environment: Environment) -> list[str]:
    """Names of what an evaluation of the environment measures."""
    declared = [*environment.rewards, *environment.group_rewards, "tool_calls", "tool_errors"]
    if len(environment.seats) > 1:
        declared = [f"{seat}.{name}" for seat in environment.seats for name in declared]
    return ["reward", *(f"score/{n}" if n in RESERVED else n for n in declared)]


def _stop_when(config: Config, verb: str) -> tuple[str, str]:
    """Key and value of the setting."""
    text = config.train.stop_when if verb == "train" else config.sft.stop_when
    return f"{verb}.stop_when", text


def _unknown_metric(
    key: str, metric: str, known: list[str], shown: list[str] | None = None
) -> ConfigError:
    return ConfigError(
        f"{key}: {metric!r} is no metric of the evaluations.{did_you_mean(metric, known)} They "
        f"have: {', '.join(shown or known)}."
    )
