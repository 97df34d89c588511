"""`jobs/submit VERB key=value ...`: a verb as a job of a Ray cluster, with the code it needs.

The command line is checked here, so that a misspelt setting does not cost a start there. Then
`ray job submit` sends the code (`code_bundle.py`), streams the log and exits as the job does.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import rayrl.cluster  # noqa: F401  # finds the token, if there is one
from rayrl import cli
from rayrl.cluster import code_bundle
from rayrl.commands.job_start import FOLDER
from rayrl.config import validate
from rayrl.errors import ConfigError, RayrlError

__all__ = ["command", "main", "options"]

ADDRESS = "http://127.0.0.1:8265"
RAY = (sys.executable, "-m", "ray.scripts.scripts")  # this Python's, whatever PATH finds first
WRITING = ("recipe", "synth", "sft", "train", "eval")  # verbs with a run folder
READING = ("report", "replay")  # of a run folder, which is on the cluster


def main(argv: Sequence[str] | None = None) -> int:
    """Submit, and wait; the job's exit status, or 2 for a command that is wrong."""
    arguments = options().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="rayrl-code-") as folder:
            line = command(arguments, Path(folder))
            return subprocess.run(line, check=False, env=environment(os.environ)).returncode
    except RayrlError as error:
        print(f"jobs/submit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nThe job goes on; `ray job stop` ends it.", file=sys.stderr)
        return 130


def options() -> argparse.ArgumentParser:
    """What it takes."""
    parser = argparse.ArgumentParser(
        prog="jobs/submit",
        description=f"Run a verb of rayrl on the Ray cluster at RAY_ADDRESS (default {ADDRESS}).",
        epilog=f"{FOLDER} names the folder, on storage that all nodes share, that the job runs in: "
        "relative paths are meant from there.",
    )
    parser.add_argument(
        "--pip",
        action="append",
        default=[],
        metavar="REQUIREMENT",
        help="install this for the job on every node, as an environment may need it",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set this variable for the job; readable by everybody who sees the dashboard",
    )
    parser.add_argument("--no-wait", action="store_true", help="do not wait for the end")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="VERB key=value ...")
    return parser


def command(given: argparse.Namespace, folder: Path) -> list[str]:
    """The `ray job submit` that runs `given.words`; its code is put into `folder`.

    Raises:
        ConfigError: the words are wrong, or a run folder would be lost.
    """
    words = list(given.words)
    if not words:
        raise ConfigError("which verb? As jobs/submit recipe experiment=tictactoe; see --help.")
    arguments = cli.parse(words)
    if arguments.verb == "play":
        raise ConfigError("play: a job has no terminal; play without jobs/submit.")
    named: list[str] = []
    functions: dict[str, str] = {}
    if arguments.verb not in READING:
        config = cli.configuration(arguments)
        validate(config, arguments.verb)
        named = code_bundle.env_names(config)
        functions = code_bundle.function_references(config)
        if arguments.verb in WRITING:
            _check_folder(config.run.dir)
    code_bundle.write_bundle(folder, named, arguments.config_dir, functions)
    runtime: dict[str, Any] = {
        "env_vars": {**code_bundle.forwarded_variables(os.environ), **_values(given.env)}
    }
    if given.pip:
        runtime["pip"] = list(given.pip)
    line = [*RAY, "job", "submit", "--address", os.environ.get("RAY_ADDRESS") or ADDRESS]
    line += ["--working-dir", str(folder)]
    line += ["--runtime-env-json", json.dumps(runtime)]
    line += ["--no-wait"] if given.no_wait else []
    return [*line, "--", "python", code_bundle.START, *_plain(words)]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables `ray job submit` runs with: no proxy for a numeric address or localhost.

    A cluster that has a name may be one that only the proxy reaches.
    """
    excepted = environ.get("no_proxy") or environ.get("NO_PROXY", "")
    host = urlsplit(environ.get("RAY_ADDRESS") or ADDRESS).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost":
            return dict(environ)
    return {**environ, "no_proxy": ",".join(filter(None, [excepted, host]))}


def _check_folder(run_dir: str) -> None:
    """Raise ConfigError if the run folder would be made in the job's copy of the code."""
    root = os.environ.get(FOLDER, "")
    if root and not Path(root).is_absolute():
        raise ConfigError(f"{FOLDER}={root}: give an absolute path, as the nodes see it.")
    if not root and not Path(run_dir).is_absolute():
        raise ConfigError(
            f"run.dir={run_dir}: relative to what, on the cluster? Give an absolute path on "
            f"storage that all nodes share, or name a folder there with {FOLDER}."
        )


def _values(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as it is, NAME with its value here."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: that variable is not set here.")
        found[name] = value if equals else os.environ[name]
    return found


def _plain(words: Sequence[str]) -> list[str]:
    """Without --config-dir: the folder travels, and `jobstart` names the copy."""
    kept, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "--config-dir":
            rest.pop(0)
        elif not word.startswith("--config-dir="):
            kept.append(word)
    return kept


if __name__ == "__main__":
    sys.exit(main())
