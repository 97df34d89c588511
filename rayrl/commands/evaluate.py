"""`rayrl eval`: play without learning, and say what it came to with intervals.

Every cell plays the same tasks whoever is evaluated, and never a training task: their seeds come
from `run.seed` and the cell's name only. An environment's exhaustive checks follow, if the player
is a model that decodes greedily.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rayrl.cluster.open import make_environment, open_rollouts
from rayrl.cluster.parts import greedy_player
from rayrl.cluster.rollouts import CollectedGroups
from rayrl.config import Config, validate
from rayrl.config.mix import components, env_label, eval_cells
from rayrl.environment.environment import Environment
from rayrl.environment.tasks import task_key
from rayrl.report.console import new_console
from rayrl.report.statistics import eval_statistics
from rayrl.report.table import Cell, Result, rich_table
from rayrl.run.evaluation.checks import run_checks
from rayrl.run.folder import RunDir
from rayrl.run.journal import Journal, JournaledRollouts
from rayrl.run.progress_bar import ProgressBar
from rayrl.run.stage import (
    already_finished,
    evaluation_plans,
    log_template_notes,
    row_name,
    seats_of,
    unplayed_note,
)
from rayrl.run.start_check import check_start
from rayrl.types import Usage

__all__ = ["cell_of", "evaluate", "play_cells", "run"]

FILE = "eval.json"


def run(config: Config) -> None:
    """Evaluate, and print the table."""
    console = new_console()
    result = asyncio.run(evaluate(config))
    console.print(rich_table([result]))
    if result.unplayed:
        console.print(unplayed_note(result.unplayed), style="yellow")
    console.print(f"Written to {Path(config.run.dir) / FILE}", highlight=False, markup=False)


async def evaluate(config: Config) -> Result:
    """Evaluate, and write eval.json and the episodes; a finished evaluation is read again.

    Raises:
        ConfigError: a setting cannot work.
        RunFailed: the environment fails too often (`env.failure_budget`).
    """
    validate(config, "eval")
    check_start(config, "eval")
    with RunDir(config.run.dir, config, begin=False, verb="eval") as folder:
        file = folder.path / FILE
        if folder.finished is not None and file.is_file():
            print(already_finished(folder.path))
            folder.begin()
            result = replace(Result.load(file), prices=prices(config))  # may be other ones now
            result.save(file)
            return result
        result = await play_cells(config, folder)
        result.save(file)
        if not result.unplayed:
            folder.finish({"figures": FILE})
        return result


async def play_cells(config: Config, folder: RunDir | None = None) -> Result:
    """Play every cell of `config.eval`, then the environment's checks.

    Args:
        config: `eval.player` says who plays the seats that `env.seats` leaves to the policy.
        folder: where the episodes are written; None writes none.

    Raises:
        RunFailed: the environment fails too often (`env.failure_budget`).
    """
    name = row_name(config, config.eval.player)
    environments: dict[str, Environment] = {}
    seats: dict[str, dict[str, str]] = {}
    configured: dict[str, Environment] = {}
    cell_args: dict[str, dict[str, Any]] = {}
    journals: dict[str, Journal] = {}
    for component, own in components(config).items():
        environment = make_environment(own, component).evaluation(
            own.env.held_out, own.env.duplicates
        )
        environments[component] = environment
        seats[component] = seats_of(environment, own, config.eval.player)
        for cell, args in eval_cells(own, component).items():
            configured[cell], cell_args[cell] = environment.configure(args), args
            seats[cell] = seats[component]
            file = folder.episodes_file(len(journals)) if folder else None
            plans = evaluation_plans(configured[cell], own, cell, component)
            journals[cell] = Journal(file, plans, seats)
    total = len(journals) * config.eval.episodes
    log_template_notes(config, [who for players in seats.values() for who in players.values()])
    measured: dict[str, Cell] = {}
    checks: Mapping[str, Mapping[str, float]] = {}
    budget = config.endpoint.max_tokens_total
    with ProgressBar(f"eval {name}", total) as bar:
        play = JournaledRollouts([*journals.values()], bar, budget)
        play.check_budget()
        at = config.eval.temperature
        async with open_rollouts(config, seats=seats, temperature=at) as rollouts:
            if folder is not None:
                folder.begin()
            for cell, journal in journals.items():
                played = await play.collect(rollouts, journal)
                args = cell_args[cell]
                measured[cell] = cell_of(configured[cell], args, played, journal.usage)
                if not played.infra_failures:
                    journal.seal([*played.groups, *played.dropped])
            if config.eval.player == "model":
                checks = await run_checks(
                    config, environments, partial(greedy_player, rollouts.job)
                )
    about = {"tasks": note} if (note := _about_tasks(config, environments)) else {}
    return Result(name, measured, checks, _settings(config) | about, prices(config))


def _about_tasks(config: Config, environments: Mapping[str, Environment]) -> str:
    """Which tasks these are; empty if a function makes them of seeds that training does not use."""
    notes = {
        component: _about_own_tasks(own, environments[component])
        for component, own in components(config).items()
    }
    return "; ".join(f"{name}: {note}" if name else note for name, note in notes.items() if note)


def _about_own_tasks(config: Config, environment: Environment) -> str:
    if environment.eval_source is not None:
        return "the environment's own evaluation tasks"
    if not isinstance(environment.source, Sequence):
        return ""
    source = make_environment(config).source
    assert isinstance(source, Sequence)
    n, held_out = len(source), len(environment.source)
    if n == held_out:
        return f"all {n}, which training sees as well (env.held_out={config.env.held_out:g})"
    return f"{held_out} of {n}, held out from training (env.held_out={config.env.held_out:g})"


def cell_of(
    environment: Environment,
    args: Mapping[str, Any],
    played: CollectedGroups,
    usage: Usage | None = None,
) -> Cell:
    """Aggregate the episodes of a cell; of failed ones only the number is reported."""
    episodes = [episode for group in played.groups for episode in group.episodes]
    failed = sum(len(group.episodes) for group in played.dropped)
    statistics = eval_statistics(episodes, environment.statistics_function)
    unplayed, refused = played.infra_failures, played.refused
    distinct = len({task_key(episode.task) for episode in episodes})
    tasks = distinct if distinct < len(episodes) else 0
    return Cell(dict(args), len(episodes), failed, statistics, usage, unplayed, refused, tasks)


def _model(config: Config) -> str:
    played = {"model": config.model.path, "endpoint": config.endpoint.model}
    return played.get(config.eval.player, "")


def prices(config: Config) -> tuple[float, float]:
    """Of a million tokens read and written."""
    return (config.endpoint.price_in, config.endpoint.price_out)


def _settings(config: Config) -> dict[str, Any]:
    return {
        "env": env_label(config),
        "env_args": dict(config.env.args),
        "player": config.eval.player,
        "model": _model(config),
        "temperature": config.eval.temperature,
        "max_tokens": config.sampling.max_tokens,
        "seed": config.run.seed,
    }
