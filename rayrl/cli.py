"""The command line: a verb, settings as `key=value`, and errors that say what to do.

The only importer of Hydra. Composition is Hydra's (files of `conf/` over the dataclass defaults,
groups chosen on the command line); the settings themselves are merged and checked by
`rayrl.config`, so that a file, a stage of a recipe and the command line fail with the same words.
Nothing heavy is imported before all settings are known and of the right type; whether they make
sense, each verb's `run` checks, as for a script that calls it.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import platform
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from rayrl.commands.folder_names import WRITING, named
from rayrl.commands.help_pages import completion, usage, verb_page
from rayrl.config.yaml_files import check_option, conf_dir, is_no_option, options
from rayrl.errors import ConfigError, RayrlError, RunFailed, clip, did_you_mean
from rayrl.terminal import visible

if TYPE_CHECKING:
    from rayrl.config import Config

__all__ = ["compose", "main"]

VERBS = {
    "recipe": ("rayrl.commands.recipe", "run every stage of a recipe, and resume where it stopped"),
    "synth": ("rayrl.commands.synth", "play a teacher and keep its good episodes"),
    "sft": ("rayrl.commands.sft", "fine-tune on kept episodes"),
    "train": ("rayrl.loop", "reinforcement learning"),
    "eval": ("rayrl.commands.evaluate", "play without learning and print the table"),
    "play": ("rayrl.commands.play", "play against a model in this terminal, or watch it"),
    "serve": ("rayrl.commands.serve", "answer OpenAI-compatible HTTP requests with a model"),
    "report": ("rayrl.report.collect", "write RUN/report.html: rayrl report RUN"),
    "replay": (
        "rayrl.commands.replay",
        "play stored episodes again: rayrl replay FILE [EPISODE_ID]",
    ),
    "plan": ("rayrl.commands.plan", "print what would run and what will not fit; starts nothing"),
    "env": ("rayrl.commands.env_check", "environments: rayrl env list | check [NAME] | new NAME"),
    "model": (
        "rayrl.commands.model_fetch",
        "fetch a small pretrained model: rayrl model fetch smollm2-135m",
    ),
}

MOST_SAID = 30_000  # characters of an error: it may hold what an environment raised
PYTHON = platform.python_version()


@dataclass(frozen=True)
class Arguments:
    """A command line, taken apart."""

    verb: str
    settings: tuple[str, ...]
    words: tuple[str, ...]  # what is neither a setting nor an option: a run folder, a name
    config_dir: Path | None
    every: bool = False  # of a plan: settings that are left at their defaults as well


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Its exit status: 0, 1 failed, 2 wrong use, 130 interrupted, 143 ended by SIGTERM.
    """
    gc.set_threshold(50_000, 10, 10)  # a quarter of the time of large imports
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has had enough of it (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _run(words: Sequence[str]) -> int:
    """Run the command that `words` are; see `main`."""
    debug = os.environ.get("RAYRL_DEBUG", "") not in ("", "0")
    try:
        if asked := _page(words):
            print(asked)
            return 0
        arguments = parse(words)
        if arguments.verb == "env" and arguments.words[:1] in (("list",), ("new",)):
            print(_environments(arguments))
            return 0
        config = configuration(arguments)
    except RayrlError as error:
        if debug:
            raise
        return _complain(error, 2)
    with _sigterm_interrupts() as terminated:
        try:
            run = importlib.import_module(VERBS[arguments.verb][0]).run
            run(config, every=True) if arguments.every else run(config)
        except KeyboardInterrupt:
            print(_stopped(arguments.verb, config, words, terminated), file=sys.stderr)
            return 143 if terminated else 130
        except RayrlError as error:
            if debug:
                raise
            return _complain(error, 2 if isinstance(error, ConfigError) else 1)
        except OSError as error:  # a broken pipe among them
            if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return _complain(RunFailed(_full_disk(error, config)), 1)
    return 0


@contextmanager
def _sigterm_interrupts() -> Iterator[list[int]]:
    """Within, the first SIGTERM ends the program in order, as Ctrl-C does; `timeout` sends two.

    Gives:
        The signals that came.
    """
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        interrupt = signal.getsignal(signal.SIGINT)  # asyncio has one of its own
        if len(came) > 1:
            return
        if not callable(interrupt):  # ignored, as where a shell script started us with &
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _page(words: Sequence[str]) -> str:
    """The page that the words ask for; empty if they ask for none."""
    if words[:1] == ["--version"]:
        found = {name: version(name) for name in ("rayrl", "ray", "torch", "transformers")}
        return ", ".join(f"{name} {one}" for name, one in found.items()) + f", Python {PYTHON}"
    if words and words[0].startswith("--completion"):
        _, equals, shell = words[0].partition("=")
        return completion(shell if equals else "".join(words[1:2]), [*VERBS])
    helps = [word for word in words if word in ("-h", "--help")]
    if words[:1] == ["help"] or (helps and words[0] in VERBS):
        verb = next((word for word in words if word in VERBS), "")
        return verb_page(verb) if verb else usage(VERBS)
    return usage(VERBS) if helps or not words else ""


def _full_disk(error: OSError, config: Config) -> str:
    """What to say where nobody nearer has said it."""
    file = error.filename or config.run.dir
    return (
        f"{file}: the disk is full, so something was not written. Free some space and run the same "
        f"command again: it goes on from what {config.run.dir} has."
    )


def _stopped(verb: str, config: Config, words: Sequence[str], signals: Sequence[int]) -> str:
    """What to say after Ctrl-C; to a log, after a signal, in one line."""
    resumes = verb in ("recipe", *WRITING)
    if signals:
        then = f"; the same command resumes from {config.run.dir}" if resumes else ""
        return f"rayrl: stopped by {signal.Signals(signals[0]).name}{then}"
    if not resumes:
        return "\nStopped."
    command = shlex.join([*_program(), *words])
    return f"\nStopped. The same command resumes from {config.run.dir}:\n  {command}"


def _program() -> list[str]:
    """How this program was started, to be typed again."""
    if Path(sys.argv[0]).name == "rayrl":
        return ["rayrl"]
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    return [python, "-m", "rayrl"]


def parse(words: Sequence[str]) -> Arguments:
    """Take a command line apart.

    Raises:
        ConfigError: an unknown verb or option, or a word that belongs nowhere.
    """
    verb, *rest = words
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS) or f" There are: {', '.join(VERBS)}."
        raise ConfigError(f"{verb}: there is no such verb.{near}")
    settings: list[str] = []
    others: list[str] = []
    config_dir: Path | None = None
    every = False
    while rest:
        word = rest.pop(0)
        if word == "--config-dir" or word.startswith("--config-dir="):
            _, _, value = word.partition("=")
            value = value or (rest.pop(0) if rest else "")
            config_dir = Path(value).resolve()
            if not value or not config_dir.is_dir():
                raise ConfigError(f"--config-dir {value}: there is no such folder.")
        elif word == "--all":
            if verb != "plan":
                raise ConfigError(f"--all: {verb} has no such option, only `rayrl plan --all` has.")
            every = True
        elif word.startswith("-"):
            raise ConfigError(f"{word}: there is no such option.{_meant(word)} See rayrl --help.")
        elif "=" in word:
            settings.append(word)
        else:
            others.append(word)
    allowed = {"report": 1, "replay": 2, "env": 3, "model": 3}.get(verb, 0)
    if len(others) > allowed:
        raise ConfigError(
            f"{others[allowed]}: not understood. A setting is written key=value, as train.steps=50."
        )
    return Arguments(verb, tuple(settings), tuple(others), config_dir, every)


def _meant(option: str) -> str:
    """What to write instead of an option that does not exist; `--learning-rate` is a setting."""
    from rayrl.config.load import unknown_key

    name = option.partition("=")[0]
    known = ["--all", "--config-dir", "--help", "--version", "--completion"]
    if near := get_close_matches(name, known, n=1, cutoff=0.7):
        return f" Did you mean {near[0]!r}?"
    key = name.lstrip("-").replace("-", "_")
    _, meant, names = str(unknown_key(key)).partition(" Did you mean ")
    return f" Settings are written key=value; did you mean {names}" if meant else ""


def configuration(arguments: Arguments) -> Config:
    """The configuration that a command runs with; its `run` validates it."""
    settings = list(arguments.settings)
    if arguments.verb == "report":
        return _of_run(arguments)
    if arguments.verb == "replay":
        return _of_replay(arguments)
    if arguments.verb == "model":
        return _of_fetch(arguments)
    if arguments.verb == "env":
        action, *names = arguments.words or ("check",)
        if action != "check" or len(names) > 1:
            near = did_you_mean(action, ["check", "list", "new"])
            raise ConfigError(
                f"env {' '.join(arguments.words)}: write rayrl env check [NAME], rayrl env list or "
                f"rayrl env new NAME [FOLDER].{near if action != 'check' else ''}"
            )
        settings += [f"env.name={name}" for name in names]
    return compose(settings, arguments.config_dir, arguments.verb)


def _environments(arguments: Arguments) -> str:
    """Do `env list` or `env new`, which have no settings; return what to print."""
    from rayrl.commands.env_packages import list_environments, new_environment

    action, *names = arguments.words
    if arguments.settings:
        raise ConfigError(f"env {action} has no settings: {arguments.settings[0]}")
    if action == "list":
        if names:
            raise ConfigError(f"env list {names[0]}: rayrl env check {names[0]} says more about it")
        return list_environments()
    if not names:
        raise ConfigError("env new: write rayrl env new NAME [FOLDER], as word-chain")
    return new_environment(*names)


def _of_run(arguments: Arguments) -> Config:
    if not arguments.words:
        raise ConfigError("report: which run? Write rayrl report RUN, as runs/tictactoe.")
    changes = {**dict(map(_setting, arguments.settings)), "run.dir": arguments.words[0]}
    return _stored(Path(arguments.words[0]), changes)


def _of_replay(arguments: Arguments) -> Config:
    """That of the run which wrote the file, unless files of conf/ are chosen instead."""
    from rayrl.run.stage import run_of

    if not arguments.words:
        raise ConfigError("replay: which file? Write rayrl replay FILE [EPISODE_ID].")
    run = run_of(Path(arguments.words[0]))
    changes = dict(map(_setting, arguments.settings))
    if run is None or not all("." in key for key in changes):
        config = compose(arguments.settings, arguments.config_dir)
    else:
        config = _stored(run, changes)
    file, episode = (*arguments.words, "")[:2]
    return replace(config, replay=replace(config.replay, file=file, episode=episode))


def _stored(run: Path, changes: dict[str, Any]) -> Config:
    """The configuration of a run, with changes."""
    from rayrl.config.load import with_settings
    from rayrl.run.folder import read_config

    return with_settings(read_config(run), changes)


def _of_fetch(arguments: Arguments) -> Config:
    if len(arguments.words) < 2 or arguments.words[0] != "fetch":
        raise ConfigError("model: write rayrl model fetch NAME [FOLDER], as smollm2-135m.")
    keys = zip(("fetch.name", "fetch.out"), arguments.words[1:], strict=False)
    return compose([*arguments.settings, *(f"{key}={value}" for key, value in keys)])


def compose(settings: Sequence[str] = (), config_dir: Path | None = None, verb: str = "") -> Config:
    """The configuration of `key=value` settings over the files they choose.

    Args:
        settings: as on the command line, in Hydra's grammar: `experiment=tictactoe`,
            `train.steps=5`, `recipe.rl1.learner.lr=1e-4`.
        config_dir: a folder with groups of your own (`experiment/mine.yaml`).
        verb: what will run. Of a recipe, a setting that one of its stages overrides is refused;
            `endpoint=URL` and `model=NAME` are about whoever plays.

    Raises:
        ConfigError: naming what is unknown or wrong and the nearest that is right.
    """
    from rayrl.config.load import from_dict, merged, nest

    folders = [conf_dir(), *([config_dir] if config_dir else [])]
    groups = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    chosen, stages = [], {}
    values: dict[str, Any] = {}
    short: dict[str, Any] = {}
    for text in settings:
        key, value = _setting(text)
        if key == "endpoint" or (key == "model" and is_no_option(key, value, folders)):
            short[key] = value
        elif key in groups:
            check_option(key, value, folders)
            chosen.append(f"{key}={'null' if value is None else value}")
        elif key.startswith("recipe."):
            stages[key] = value
        else:
            values[key] = value
    mixed = any(f"{key}.".startswith("env.mix.") for key in values)
    if mixed and not any(one.startswith(("env=", "experiment=")) for one in chosen):
        chosen.append("~env")  # conf/config.yaml has one for those who ask for none
    composed = _composed(chosen, folders)
    if short:
        config = from_dict(merged(composed, nest(values)))
        values = _in_full(short, values, config, verb, options("model", folders))
    config = _with_stages(from_dict(merged(composed, nest(values))), stages)
    if verb in ("recipe", "plan"):
        _refuse_hidden(config, values)
    return named(config, values, verb)


def _in_full(
    short: Mapping[str, Any],
    values: Mapping[str, Any],
    config: Config,
    verb: str,
    models: Sequence[str],
) -> dict[str, Any]:
    """`values` with what `endpoint=URL` and `model=NAME` stand for, and no less than was set.

    Args:
        config: what `values` come to without them.
        verb: the player it asks for is the endpoint from now on; a plan without stages is read as
            if it were of an evaluation.
        models: what conf/model/ has.
    """
    full: dict[str, Any] = {}
    if verb == "plan" and not config.recipe:
        verb = "eval"
    player = f"{verb}.player" if verb in ("eval", "synth", "play") else ""
    if "endpoint" in short:
        full["endpoint.url"] = short["endpoint"]
        if player:
            full[player] = "endpoint"
    full |= values
    if "model" in short:
        asks = player and full.get(player, getattr(config, verb).player) == "endpoint"
        name = str(short["model"])
        if not asks and "/" not in name and not Path(name).is_dir():
            near = did_you_mean(name, models)
            raise ConfigError(
                f"model={name}: there is no conf/model/{name}.yaml and no directory {name!r} here."
                f"{near} There are: {', '.join(models)}; or name a Hugging Face directory, or with "
                "endpoint=URL a model of that server."
            )
        full["endpoint.model" if asks else "model.path"] = name
    return full


def _setting(text: str) -> tuple[str, Any]:
    """Key and value of one `key=value`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, _, value = text.partition("=")
        bare = value.strip("\"'")
        if not bare or {"'", '"'} <= {*bare}:
            bare = "a: b"
        inner, outer = "\"'" if "'" in bare else "'\""
        raise ConfigError(
            f"{text}: cannot be read. Write key=value; text with any of ,:=<>[]{{}}() has a second "
            f"pair of quotes: {outer}{key}={inner}{bare}{inner}{outer}."
        ) from error
    if override.is_sweep_override():
        raise ConfigError(f"{text}: several values; a list is written in brackets, as [1,2].")
    if override.is_delete():
        raise ConfigError(f"{text}: settings cannot be deleted; give it another value.")
    return override.key_or_group, override.value()


def _composed(chosen: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """What Hydra makes of the chosen files over the defaults, which type it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    from rayrl.config.load import schema, unknown_key, wrong_type

    ConfigStore.instance().store(name="schema", node=schema(), provider="rayrl")
    search = [f"hydra.searchpath=[{','.join(f'file://{one}' for one in folders[1:])}]"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3", job_name="rayrl"):
            node = hydra_compose("config", [*chosen, *(search if len(folders) > 1 else [])])
    except (HydraException, OmegaConfBaseException) as error:
        where = str(error).splitlines()[0].partition(":")[0]
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OmegaConfBaseException):
            cause = cause.__cause__ or cause.__context__
        if cause is None or not cause.full_key:
            raise ConfigError(str(error)) from error
        unknown = isinstance(cause, ConfigKeyError | ConfigAttributeError)
        what = unknown_key(str(cause.full_key)) if unknown else wrong_type(cause)
        raise ConfigError(f"{where}: {what}") from error
    return cast("dict[str, Any]", OmegaConf.to_container(node))  # nothing looked up yet


def _with_stages(config: Config, settings: dict[str, Any]) -> Config:
    """`config` with `recipe.STAGE.KEY=VALUE` applied to the stages of its recipe."""
    from rayrl.config.load import check_keys, nest

    stages = {stage.name: stage for stage in config.recipe}
    for key, value in settings.items():
        _, name, *rest = key.split(".", 2)
        if name not in stages:
            near = did_you_mean(name, stages) or f" There are: {', '.join(stages) or 'none'}."
            raise ConfigError(f"{key}: the recipe has no stage {name!r}.{near}")
        if not rest:
            raise ConfigError(f"{key}: write recipe.{name}.KEY=VALUE, as recipe.{name}.run.seed=1.")
        try:
            check_keys(nest({rest[0]: value}))
        except ConfigError as error:
            raise ConfigError(f"recipe.{name}.{error}") from error
        stages[name] = replace(stages[name], set={**stages[name].set, rest[0]: value})
    return replace(config, recipe=list(stages.values())) if settings else config


def _refuse_hidden(config: Config, values: dict[str, Any]) -> None:
    """Refuse a setting that a stage of the recipe sets itself: there it would do nothing."""
    for key, value in values.items():
        hiding = [stage.name for stage in config.recipe if key in stage.set]
        if hiding:
            ways = " ".join(f"recipe.{name}.{key}={value}" for name in hiding)
            raise ConfigError(
                f"{key}={value}: the recipe sets this itself for {' and '.join(hiding)}; say which "
                f"you mean: {ways}"
            )


def _complain(error: RayrlError, status: int) -> int:
    print(visible(clip(f"rayrl: {error}", MOST_SAID)), file=sys.stderr)
    return status
