"""What `rayrl --help` and `rayrl VERB --help` print, and what shells complete."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayrl.config.yaml_files import conf_dir, options
from rayrl.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rayrl.config import Setting

__all__ = ["SHELLS", "completion", "usage", "verb_page"]

WIDTH = 100

USAGE = """\
usage: rayrl VERB [key=value ...] [--config-dir DIR]
       rayrl recipe experiment=tictactoe

verbs (rayrl VERB --help says more):
{verbs}

settings:
  experiment=NAME, env=NAME, algo=NAME, ...   choose a file of that folder in conf/
  train.steps=50                              change one setting
  model=DIR                                   the model of a Hugging Face directory
  endpoint=http://HOST/v1 model=NAME          eval, synth, play: a model behind a server
  recipe.rl1.train.steps=50                   change it for one stage of a recipe
  --config-dir DIR                            look for such files in DIR as well
  rayrl plan [key=value ...]                  shows what they lead to; --all: every setting

options:
  --version                                   say which rayrl, Python and Ray this is
  --completion bash|zsh|fish                  print a script that completes in that shell

environment:
  RAYRL_DEBUG=1                               show tracebacks
"""


@dataclass(frozen=True)
class Page:
    """What there is to say about a verb.

    Attributes:
        about: what it does and leaves behind.
        sections: of the settings, those that matter to it.
        examples: without `rayrl` and the verb.
    """

    about: str
    sections: tuple[str, ...]
    examples: tuple[str, ...]


PAGES: Mapping[str, Page] = {
    "recipe": Page(
        "Run every stage of a recipe in one process, each in RUN/STAGE, then print the table and "
        "write the report. A finished stage is not run again: the same command resumes.",
        ("run", "cluster"),
        ("experiment=tictactoe", "experiment=tictactoe run.name=mine recipe.rl1.train.steps=50"),
    ),
    "synth": Page(
        "Play a teacher (a scripted player, a model or a server) and keep its good episodes in "
        "RUN/episodes.jsonl, for `rayrl sft`.",
        ("synth", "env", "sampling", "run"),
        (
            "env=tictactoe synth.player=teacher synth.keep.win=1",
            "env=tictactoe endpoint=http://127.0.0.1:8000/v1 model=NAME",
        ),
    ),
    "sft": Page(
        "Fine-tune a model on the replies of kept episodes; leaves RUN/model.",
        ("sft", "model", "learner", "lora", "eval", "run"),
        (
            "env=tictactoe sft.data=runs/tictactoe-synth/episodes.jsonl",
            "env=tictactoe sft.data=episodes.jsonl model=models/smollm2-135m lora.rank=16",
        ),
    ),
    "train": Page(
        "Reinforcement learning: play groups of episodes, compare the rewards within each, update, "
        "push the weights. Leaves RUN/model; the same command resumes.",
        ("train", "algo", "sampling", "learner", "lora", "env", "eval", "model", "run"),
        (
            "env=tictactoe train.steps=50",
            "env.name=addition.py algo=rloo train.group_size=8 model=models/smollm2-135m",
            "env=tictactoe model=runs/tictactoe-sft/model train.max_lag=1",
        ),
    ),
    "eval": Page(
        "Play without learning, print the table with 95% intervals, write RUN/eval.json.",
        ("eval", "env", "sampling", "endpoint", "run"),
        (
            "env=tictactoe model=runs/tictactoe-train/model",
            "env=tictactoe eval.player=optimal",
            "env=tictactoe endpoint=http://127.0.0.1:8000/v1 model=NAME",
        ),
    ),
    "play": Page(
        "Play against a model in this terminal, or watch it.",
        ("play", "env", "model"),
        ("env=tictactoe", "env=tictactoe_versus play.seat=o model=runs/tictactoe-train/model"),
    ),
    "serve": Page(
        "Answer OpenAI-compatible HTTP requests with a model, until Ctrl-C.",
        ("serve", "model", "engine"),
        (
            "model=runs/tictactoe-train/model",
            "model=runs/NAME/model serve.host=0.0.0.0 serve.api_key_env=RAYRL_KEY",
        ),
    ),
    "report": Page(
        "Write RUN/report.html from what a run has on the disk.", (), ("runs/tictactoe-train",)
    ),
    "replay": Page(
        "Play stored episodes again by their recorded replies: does today's code play and score "
        "them as it did?",
        ("replay",),
        (
            "runs/tictactoe-synth/episodes.jsonl",
            "FILE synth-3/0",
            "FILE env.rewards.win=2 replay.out=new.jsonl",
        ),
    ),
    "plan": Page(
        "Print the settings that differ from the defaults (with --all every setting), what follows "
        "from them on this machine, and what will not fit. Starts nothing.",
        (),
        ("experiment=tictactoe", "env.name=addition.py train.steps=50", "--all"),
    ),
    "env": Page(
        "check: play an environment with scripted players; is it deterministic, scored, ready to "
        "train on? list: what is installed. new: write a package with an environment that passes "
        "its tests, to begin with.",
        ("env",),
        ("check tictactoe", "check addition.py", "list", "new word-chain"),
    ),
    "model": Page(
        "Fetch a small pretrained model into models/NAME.", ("fetch",), ("fetch smollm2-135m",)
    ),
}


def usage(verbs: Mapping[str, tuple[str, str]]) -> str:
    """The help page of all verbs, given the module and a line about each."""
    return USAGE.format(verbs="\n".join(f"  {verb:8}{what}" for verb, (_, what) in verbs.items()))


def verb_page(verb: str) -> str:
    """What a verb does, its settings with default and meaning, examples."""
    from rayrl.config import Config, settings

    page = PAGES[verb]
    words = {
        "report": "RUN",
        "replay": "FILE [EPISODE_ID]",
        "env": "check [NAME] | list | new NAME [FOLDER]",
        "model": "fetch NAME [FOLDER]",
    }
    parts = [
        f"usage: rayrl {verb} {words[verb] + ' ' if verb in words else ''}[key=value ...]",
        textwrap.fill(page.about, WIDTH),
        "examples:\n" + "\n".join(f"  rayrl {verb} {words}" for words in page.examples),
    ]
    defaults = Config()
    for section in page.sections:
        lines = [
            _line(key, getattr(getattr(defaults, section), key.split(".")[1]), setting)
            for key, setting in settings().items()
            if key.startswith(f"{section}.")
        ]
        parts.append(f"{section}:\n" + "\n".join(lines))
    parts.append("rayrl plan --all shows all settings; rayrl --help how they are written.")
    return "\n\n".join(parts)


def _line(key: str, default: Any, setting: Setting) -> str:
    text = f"  {key}={json.dumps(default, ensure_ascii=False)}"
    start = f"{text:40}" if len(text) <= 38 else f"{text}\n{'':40}"
    names = [*map(str, setting.choices), *(["module:function"] if setting.open else [])]
    choices = f" ({' | '.join(names)})" if names else ""
    lines = textwrap.wrap(setting.meaning + choices, WIDTH - 40, break_long_words=False)
    return start + f"\n{'':40}".join(lines)


BASH = """\
# rayrl: eval "$(rayrl --completion bash)"
_rayrl() {{
  local typed="${{COMP_LINE:0:COMP_POINT}}" words="{words}"
  typed="${{typed##* }}"
  [ "$COMP_CWORD" -eq 1 ] && words="{verbs}"
  COMPREPLY=($(compgen -W "$words" -- "$typed"))
  # bash begins a new word behind each =
  case "$typed" in *=*) COMPREPLY=("${{COMPREPLY[@]#"${{typed%=*}}="}}") ;; esac
}}
complete -o nospace -o bashdefault -o default -F _rayrl rayrl
"""
ZSH = """\
# rayrl: eval "$(rayrl --completion zsh)", after compinit
_rayrl() {{
  if (( CURRENT == 2 )); then compadd -- {verbs}; else compadd -S '' -- {words}; _files; fi
}}
compdef _rayrl rayrl
"""
FISH = """\
# rayrl: rayrl --completion fish | source
complete -c rayrl -f -n __fish_use_subcommand -a "{verbs}"
complete -c rayrl -n "not __fish_use_subcommand" -a "{words}"
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def completion(shell: str, verbs: Sequence[str]) -> str:
    """A script that completes verbs, settings and the files of conf/.

    Raises:
        ConfigError: for no such shell.
    """
    from rayrl.config import leaves

    if shell not in SHELLS:
        near = did_you_mean(shell, SHELLS)
        raise ConfigError(f"--completion {shell}: choose one of {', '.join(SHELLS)}.{near}")
    folder = conf_dir()
    groups = sorted(path.name for path in folder.iterdir() if path.is_dir())
    chosen = [f"{group}={name}" for group in groups for name in options(group, [folder])]
    settings = [f"{key}=" for key, _ in leaves() if key != "recipe"]
    found = [*chosen, *settings, "--all", "--help", "--config-dir"]
    first = [*verbs, "--help", "--version"]
    return SHELLS[shell].format(verbs=" ".join(first), words=" ".join(found))
