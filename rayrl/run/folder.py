"""The folder of a run: its settings, metrics, episodes and checkpoints.

    RUN/config.yaml              every setting, so that a resumed run is the same run
    RUN/metrics.jsonl            one line per `log` call: {"step": 3, "reward": 0.4, …}
    RUN/tensorboard/             the same metrics
    RUN/episodes/step_000010.jsonl
    RUN/checkpoints/step_000010/ what the learner saved, and run.json: the state of the loop, and
                                 checksums of all files
    RUN/result.json              the result of a finished run

Verbs add their own files: model/ (sft, train), the files of `monitor` (train), episodes.jsonl and
played.jsonl (synth), eval.json (eval), report.html (report). A recipe adds recipe.json, table.md,
table.json, and one folder per stage.

Writes are atomic: files are written under another name, flushed to the disk and renamed, so that a
process killed at any moment leaves the old file or the new one. On resume the metrics are truncated
to the length they had at the checkpoint, so that an interrupted run's file equals an uninterrupted
one's, except for wall times.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from rayrl.config import Config, differences, from_dict, to_dict
from rayrl.config.load import interpolation
from rayrl.errors import ConfigError, DataError, RunFailed
from rayrl.run.checkpoints import Checkpoint, Checkpoints, removed_on_error, step_name
from rayrl.run.files import (
    checksum_of,
    explain_full_disk,
    file_checksums,
    find_damage,
    fsync,
    parse,
    read_jsonl,
    verify_checksum,
    with_checksum,
    write_atomic,
    write_weight_checksums,
)
from rayrl.run.loggers import LogFunction, Logger, make_loggers
from rayrl.types import Group

__all__ = ["Checkpoint", "RunDir", "read_config", "refuse_changes"]

_MAY_CHANGE = (
    "run.dir",
    "run.keep_checkpoints",
    "run.checkpoint_every",
    "run.episodes_every",
    "run.loggers",
    "run.wandb_project",
    "alarms.",
    "cluster.",
    "endpoint.url",  # the same model may answer elsewhere now
    "endpoint.api_key_env",
    "endpoint.concurrency",
    "endpoint.requests_per_minute",
    "endpoint.tokens_per_minute",
    "endpoint.max_tokens_total",
    "endpoint.timeout_s",
    "endpoint.retries",
    "endpoint.price_",
    "play.",
    "replay.",
    "synth.show",
    "recipe",  # the stages are runs of their own, with folders and settings of their own
)
"""Settings (or sections) that may change when a run is resumed; `*.steps` may also be raised."""

RAY_COPIES = "runtime_resources"  # folder in which Ray unpacks a job's working_dir
_SUM = "# checksum of the lines above: "
_FILES = "files"  # key of the files' checksums in result.json
_REMEDY = "Resume it with its old settings, or start a new run under another run.name (or run.dir)."


class RunDir:
    """A run's folder, created or resumed. One process at a time may write to it.

    A folder with nothing but the settings of a failed start holds no run and is reused.

    Args:
        path: the folder; usually `config.run.dir`.
        config: settings of the run; stored, and compared with stored ones.
        begin: write at once. False: only `begin` writes, so that a failed start leaves nothing.
        loggers: in addition to `run.loggers`; see `make_loggers`.
        verb: what makes the run; the folder of another verb's run is refused.

    Attributes:
        resumed: whether the folder already held a run.

    Raises:
        ConfigError: the folder's run had other settings (the message lists them), or Ray would
            delete the folder.
        DataError: a file is damaged and there is no older checkpoint.
        RunFailed: another process is writing to the folder.
    """

    def __init__(
        self,
        path: str | Path,
        config: Config,
        *,
        begin: bool = True,
        loggers: Sequence[str | Logger | LogFunction] = (),
        verb: str = "",
    ) -> None:
        self.path = Path(path)
        self._config = config
        if RAY_COPIES in self.path.resolve().parts:
            raise ConfigError(
                f"run.dir={path}: {self.path.resolve()} is in a copy of the job's code, which Ray "
                "deletes. Give an absolute path on storage that all nodes share; or submit with "
                "jobs/submit and RAYRL_WORKDIR."
            )
        self._loggers = make_loggers(config, loggers)
        self._open_loggers: list[Logger] = []
        self._unlock: Callable[[], object] | None = None
        self._more = self._begun = False
        self._verb = verb
        self.resumed = _holds_run(self.path)
        try:
            if self.resumed:
                self._lock()
                _refuse_verb(self.path, verb)
                self._more = refuse_changes(self.path, config, _REMEDY, more_steps=True)
                for partial in self.path.glob(".partial-*"):  # an earlier process was killed
                    shutil.rmtree(partial)
            self._checkpoints = Checkpoints(self.path, config.run.keep_checkpoints)
            if begin:
                self.begin()
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Write the settings and truncate the metrics to the newest checkpoint, once.

        Call it when everything the run needs has started.

        Raises:
            RunFailed: another process is writing to the folder.
        """
        if self._begun:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self._more:
            (self.path / "result.json").unlink(missing_ok=True)
        write_atomic(self.path / "config.yaml", _as_yaml(self._config, self._verb).encode())
        self._begun = True
        first_step = self._truncate_metrics()
        for logger in self._loggers:
            logger.open(self.path, self._config, first_step)
            self._open_loggers.append(logger)

    # --- metrics, episodes, results ---------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        """Append one line of metrics, visible to `tail -f` when this returns.

        Args:
            step: the step of the metrics.
            metrics: value by name; NaN and infinities are written as null.
        """
        row = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        }
        for logger in self._loggers:
            logger.log(step, numbers)

    def metrics(self) -> list[dict[str, Any]]:
        """Read all lines logged so far."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        return read_jsonl(file)

    def write_episodes(self, step: int, groups: Sequence[Group]) -> Path:
        """Write the episodes of `groups` to `episodes/step_….jsonl`, for people and the report."""
        from rayrl.rollout.episode_io import episode_to_line

        lines = [episode_to_line(episode) for group in groups for episode in group.episodes]
        file = self.episodes_file(step)
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, "".join(lines).encode())
        return file

    def episodes_file(self, step: int) -> Path:
        """Path of the episodes of a step, or of a cell of an evaluation."""
        return self.path / "episodes" / f"{step_name(step)}.jsonl"

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write `data` with its checksum to RUN/name atomically."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(with_checksum(data), indent=2, ensure_ascii=False) + "\n"
        write_atomic(file, text.encode())
        return file

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read what `write_json` wrote; None if there is no such file.

        Raises:
            DataError: the file is damaged.
        """
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return verify_checksum(parse(file.read_bytes()))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {error.lineno}: {error.msg}; remove the file."
            ) from error
        except ValueError as error:
            raise DataError(f"{file}: {error}; remove the file.") from error

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished and write its result."""
        self._more = False
        self.write_json("result.json", {**result, _FILES: file_checksums(self.path, "*.jsonl")})

    def reopen(self) -> None:
        """Take the run for unfinished from now on: it has more steps to make."""
        self._more = True

    @property
    def finished(self) -> dict[str, Any] | None:
        """The result given to `finish`; None while the run is unfinished."""
        result = None if self._more else self.read_json("result.json")
        if result is None:
            return None
        return {key: value for key, value in result.items() if key != _FILES}

    def rewind(self) -> None:
        """Drop the metrics of steps after the newest checkpoint, which will run again."""
        self._truncate_metrics()

    # --- checkpoints ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def checkpoint(self, step: int, state: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """Yield a folder that becomes the newest checkpoint when the block ends.

        The checkpoint appears atomically, and only then are older ones deleted
        (`run.keep_checkpoints`). Saving the same step again replaces it. Log the metrics of the
        finished steps first: resuming truncates lines logged later.

        Args:
            step: number of finished steps; a resumed loop starts with this step.
            state: plain data the loop needs to resume (sampler position, weights version, …).

        Raises:
            RunFailed: the disk is full; the previous checkpoint is intact.
        """
        with self._checkpoints.save(step, state or {}) as path:
            yield path

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """Yield a folder that becomes RUN/name when the block ends.

        Raises:
            RunFailed: the disk is full.
        """
        final, partial = self.path / name, self.path / f".partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        with explain_full_disk(self.path, f"{name}/", "it resumes from its last checkpoint"):
            partial.mkdir()
            with removed_on_error(partial):
                yield partial
                write_weight_checksums(partial)
                for path in partial.rglob("*"):
                    fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        fsync(self.path)

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, oldest first, without partial ones."""
        return self._checkpoints.paths()

    def latest_checkpoint(self) -> Checkpoint | None:
        """Return the newest intact checkpoint; None if there is none at all.

        Checksums are verified once per process. Newer damaged checkpoints are renamed with a
        warning; the next checkpoint deletes them.

        Raises:
            DataError: all checkpoints are damaged.
        """
        return self._checkpoints.newest()

    @property
    def went_back(self) -> bool:
        """Whether newer checkpoints were damaged, until the next one is written.

        Episodes played after the checkpoint in use are then of weights that are lost.
        """
        return self._checkpoints.went_back

    def close(self) -> None:
        """Close the loggers and unlock the folder."""
        try:
            while self._open_loggers:
                self._open_loggers.pop().close()
        finally:
            if self._unlock is not None:
                self._unlock()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- internals --------------------------------------------------------------------------------

    def _lock(self) -> None:
        if self._unlock is not None:
            return
        handle = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 32, 0).decode() or "unknown"
            os.close(handle)
            raise RunFailed(
                f"{self.path}: process {owner} is writing to this folder. Wait until it ends, or "
                "choose another run.name."
            ) from error
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._unlock = weakref.finalize(self, os.close, handle)

    def _truncate_metrics(self) -> int:
        """Truncate metrics.jsonl to the checkpoint; return the first step that has no line left."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return 0
        if self.finished is None:
            checkpoint = self.latest_checkpoint()
            size = checkpoint.metrics_bytes if checkpoint else 0
            if checkpoint and checkpoint.metrics_sum:
                text = file.read_bytes()[:size]
                if checksum_of(text) != checkpoint.metrics_sum:
                    read_jsonl(file, text)  # its error may name the line
                    raise DataError(
                        f"{file}: its first {size:,} bytes are not those that were written before "
                        f"the checkpoint of step {checkpoint.step}. Restore the file from a copy; "
                        "or remove it, and the run resumes without the metrics of earlier steps."
                    )
            os.truncate(file, min(size, file.stat().st_size))
        return max((int(row["step"]) for row in self.metrics()), default=-1) + 1


def _holds_run(folder: Path) -> bool:
    """Tell whether `folder` holds settings and anything that a run made, besides its loggers."""
    if not (folder / "config.yaml").is_file():
        return False
    begun = ("config.yaml", ".lock", "tensorboard", "wandb")
    made = (path for entry in folder.iterdir() if entry.name not in begun
            for path in (entry, *entry.rglob("*")))  # fmt: skip
    return any(path.is_file() and path.stat().st_size for path in made)


def check_finished(run: Path) -> None:
    """Compare the JSONL files of a finished run with their checksums in result.json.

    Raises:
        DataError: a JSONL file or result.json is damaged.
    """
    file = run / "result.json"
    if not file.is_file():
        return
    try:
        sums = verify_checksum(parse(file.read_bytes())).get(_FILES, {})
    except ValueError as error:
        raise DataError(f"{file}: {error}; remove the file.") from error
    if damage := find_damage(run, sums):
        raise DataError(
            f"{damage}. Restore it from a copy; if you changed it on purpose, remove the keys "
            f"{_FILES!r} and 'checksum' from {file}."
        )


def read_config(run: Path) -> Config:
    """Read the configuration of the run in a folder.

    Raises:
        DataError: the folder holds no run, or its config.yaml is damaged.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise DataError(f"{run}: there is no run here (no config.yaml).")
    try:
        return from_dict(_read_yaml(file))
    except ConfigError as error:
        raise DataError(f"{file}: {error}") from error


def _refuse_verb(run: Path, verb: str) -> None:
    """Raise ConfigError if another verb than this one has made the run."""
    with (run / "config.yaml").open("rb") as file:
        made_by = re.fullmatch(rb"# rayrl (\w+)\n", file.readline())
    if verb and made_by and made_by[1].decode() != verb:
        raise ConfigError(
            f"{run} holds a run of `rayrl {made_by[1].decode()}`; give this {verb} another "
            "run.name (or run.dir)."
        )


def _as_yaml(config: Config, verb: str) -> str:
    text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
    text = f"# rayrl {verb}\n{text}" if verb else text
    return f"{text}{_SUM}{checksum_of(text.encode())}\n"


def _read_yaml(file: Path) -> dict[str, Any]:
    """Read what `_as_yaml` wrote, without resolving interpolations.

    Raises:
        DataError: the file is damaged.
    """
    remedy = "Restore the file from a copy; the command that started the run has its settings"
    text = file.read_bytes()
    body, marker, stored = text.rpartition(_SUM.encode())
    if marker and stored.strip().decode("latin-1") != checksum_of(body):
        raise DataError(
            f"{file} is not what was written: its checksum differs. {remedy}. If you changed it "
            "on purpose, remove its last line."
        )
    try:
        data = OmegaConf.to_container(OmegaConf.create(text.decode()), resolve=False)
    except Exception as error:  # PyYAML's and OmegaConf's errors have no common base
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DataError(f"{file}{line}: not YAML ({why}). {remedy}.") from error
    if not isinstance(data, dict) or not data:
        raise DataError(f"{file} holds no settings. {remedy}.")
    if found := interpolation(data):  # of environment variables, say: the file may be anyone's
        raise DataError(f"{file}: {found!r} is not resolved in a stored run. {remedy}.")
    return cast("dict[str, Any]", data)


def refuse_changes(path: Path, config: Config, remedy: str, *, more_steps: bool = False) -> bool:
    """Refuse settings that differ from those of the run at `path` and change its results.

    Args:
        config: the new settings.
        remedy: what to do about a change, the last sentence of the error.
        more_steps: allow more steps than before.

    Returns:
        Whether there are more steps.

    Raises:
        ConfigError: a setting changed; the message lists all that did.
    """
    changed = []
    more = False
    for key, (before, now) in differences(config, read_config(path)).items():
        if more_steps and key.endswith(".steps") and now > before:
            more = True
        elif not key.startswith(_MAY_CHANGE):
            changed.append(f"  {key}: {before!r} there, {now!r} now")
    if changed:
        raise ConfigError(
            f"{path} holds a run with other settings (config.yaml):\n"
            + "\n".join(changed)
            + f"\n{remedy}"
        )
    return more


def _plain(value: object) -> float | int | str | None:
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars as well
    return number if math.isfinite(number) else None
