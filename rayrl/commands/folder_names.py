"""The run folder of a command line that names none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayrl.config import Config, RunConfig
from rayrl.environment.data_files import SUFFIXES

__all__ = ["WRITING", "named"]

WRITING = ("synth", "sft", "train", "eval")  # a folder of its own for each environment


def named(config: Config, given: Mapping[str, Any], verb: str) -> Config:
    """`config` with the run folder of `verb`, unless `given` or a file names one.

    Verbs do not share a folder, nor do environments, nor an evaluation and that of another player:
    runs/tictactoe-train, runs/tictactoe-eval-optimal. The folder that a file of conf/ names is its
    recipe's.
    """
    if verb == "plan" and not config.recipe:
        verb = "eval" if config.eval.player == "endpoint" else "train"
    run = config.run
    if verb not in WRITING or run.dir != f"runs/{run.name}" or {"run.name", "run.dir"} & {*given}:
        return config
    if verb == "eval":
        verb += _whose(config)
    if run.name == RunConfig().name:
        name = f"{_env_word(config)}-{verb}"
        return replace(config, run=replace(run, name=name))
    if config.recipe:
        return replace(config, run=replace(run, dir=f"runs/{run.name}-{verb}"))
    return config


def _whose(config: Config) -> str:
    """Who is evaluated, for the folder's name; nothing for the base."""
    from rayrl.run.stage import row_name

    who = row_name(config, config.eval.player)
    return "" if who == "base" else f"-{_word(who).removeprefix(_env_word(config) + '-')}"


def _env_word(config: Config) -> str:
    """The environment's name as part of a folder's: of `path/to/addition.py:sums` addition-sums,
    of `path/to/rows.jsonl` rows, of `hf:owner/name:test` name-test; of a mixture its components.
    Without any it is that of `sft.data`."""
    endings = "|".join(("py", *(suffix[1:] for suffix in SUFFIXES)))
    name = (config.env.name or "-".join(config.env.mix) or config.sft.data).rstrip("/")
    return _word(re.sub(rf"^.*/|^object:|\.({endings})(?=:|$)", "", name))


def _word(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")
