"""The folder of a run: what it was, what it measured, and what it can be resumed from.

    RUN/config.yaml              every setting, so that a resumed run is the same run
    RUN/metrics.jsonl            one line a `log` call: {"step": 3, "reward": 0.4, …}
    RUN/tensorboard/             the same numbers
    RUN/episodes/step_000010.jsonl
    RUN/checkpoints/step_000010/ what the learner saved, and run.json: the state of the loop, and
                                 checksums of all files
    RUN/result.json              what the run came to, once it is finished

Programs add what they make: model/ (sft, train), what `monitor` names (train), episodes.jsonl and
played.jsonl (synth), eval.json (eval), report.html; and a recipe, whose stages are folders within,
recipe.json, table.md and table.json.

A process killed at any moment leaves either the old file or the new one, never half of one: files
are written beside their place, flushed to the disk and renamed. On resume the metrics are cut back
to what they were when the checkpoint was made, so that an interrupted run's file equals an unbroken
one's (but for the figures that are wall times).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
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
    damage,
    explain_full_disk,
    opened,
    parse,
    read_lines,
    seal_weights,
    sealed,
    sums_of,
    sync,
    text_sum,
    write_atomic,
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
"""Settings (or sections) that may differ when a run is resumed; `*.steps` may also be raised."""

RAY_COPIES = "runtime_resources"  # where Ray unpacks a job's working_dir, in a node's folder
_SUM = "# checksum of the lines above: "
_FILES = "files"  # key of their checksums in result.json
_REMEDY = "Use the old ones to resume it, or another run.name (or run.dir) to start a new run."


class RunDir:
    """A run's folder: made when it is not there, resumed when it is. One process at a time.

    A folder in which a start left its settings and nothing else holds no run: it is used anew.

    Args:
        path: the folder; usually `config.run.dir`.
        config: what the run runs with; stored, and compared with what is stored.
        begin: write at once. False: not before `begin`, so that a start which fails leaves nothing.
        loggers: besides those of `run.loggers`; see `make_loggers`.

    Attributes:
        resumed: whether the folder holds a run already.

    Raises:
        ConfigError: the folder's run had other settings; the message lists them. Or the folder
            would not last.
        DataError: something in the folder is damaged, and there is no older checkpoint.
        RunFailed: another process is writing there.
    """

    def __init__(
        self,
        path: str | Path,
        config: Config,
        *,
        begin: bool = True,
        loggers: Sequence[str | Logger | LogFunction] = (),
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
        self._next_step = 0
        self.resumed = _holds_run(self.path)
        try:
            if self.resumed:
                self._lock()
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
        """Write the settings, and cut the metrics back to the newest checkpoint; once.

        To be called when all that the run needs has started.

        Raises:
            RunFailed: another process is writing there.
        """
        if self._begun:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self._more:
            (self.path / "result.json").unlink(missing_ok=True)
        write_atomic(self.path / "config.yaml", _as_yaml(self._config).encode())
        self._next_step = self._cut_metrics()
        self._begun = True

    # --- what the run measured -------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        """Append one line of figures; on the disk for `tail -f` when this returns.

        Args:
            step: the step they belong to.
            metrics: name -> figure; a NaN or an infinity is written as null.
        """
        row = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        }
        for logger in self._loggers[len(self._open_loggers) :]:
            logger.open(self.path, self._config, self._next_step)
            self._open_loggers.append(logger)
        for logger in self._loggers:
            logger.log(step, numbers)

    def metrics(self) -> list[dict[str, Any]]:
        """Every line logged so far."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        return read_lines(file)

    def write_episodes(self, step: int, groups: Sequence[Group]) -> Path:
        """Write the episodes of `groups` to `episodes/step_….jsonl`, for people and the report."""
        from rayrl.rollout.episode_io import episode_to_line

        lines = [episode_to_line(episode) for group in groups for episode in group.episodes]
        file = self.episodes_file(step)
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, "".join(lines).encode())
        return file

    def episodes_file(self, step: int) -> Path:
        """Where the episodes of a step (in an evaluation: of a cell) are."""
        return self.path / "episodes" / f"{step_name(step)}.jsonl"

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write `data` as RUN/name, readable and whole, with a checksum of its own."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(sealed(data), indent=2, ensure_ascii=False) + "\n"
        write_atomic(file, text.encode())
        return file

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote, or None if it never did.

        Raises:
            DataError: it is damaged.
        """
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return opened(parse(file.read_bytes()))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {error.lineno}: {error.msg}; remove the file."
            ) from error
        except ValueError as error:
            raise DataError(f"{file}: {error}; remove the file.") from error

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished, with what it came to; opened again, it has nothing to do."""
        self._more = False
        self.write_json("result.json", {**result, _FILES: sums_of(self.path, "*.jsonl")})

    @property
    def finished(self) -> dict[str, Any] | None:
        """What `finish` was given, or None while there is something left to do."""
        result = None if self._more else self.read_json("result.json")
        if result is None:
            return None
        return {key: value for key, value in result.items() if key != _FILES}

    def rewind(self) -> None:
        """Forget the figures of the steps after the newest checkpoint: they will be made again."""
        self._cut_metrics()

    # --- what it can be resumed from -------------------------------------------------------------

    @contextlib.contextmanager
    def checkpoint(self, step: int, state: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """A folder to save into; when the block ends it is this run's newest checkpoint.

        It appears whole or not at all, and only then are older ones deleted
        (`run.keep_checkpoints`). Saving the same step again replaces it. Log what belongs to the
        finished steps before it: lines logged later are cut off on resume, to be made again.

        Args:
            step: finished steps: the resumed loop starts with this one.
            state: plain data the loop needs to go on (sampler position, weights version, …).

        Raises:
            RunFailed: the disk is full. The previous checkpoint is intact.
        """
        with self._checkpoints.save(step, state or {}) as path:
            yield path

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """A folder to write into; when the block ends it is RUN/name, and not before.

        Raises:
            RunFailed: the disk is full.
        """
        final, partial = self.path / name, self.path / f".partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        with explain_full_disk(self.path, f"{name}/", "it goes on from its last checkpoint"):
            partial.mkdir()
            with removed_on_error(partial):
                yield partial
                seal_weights(partial)
                for path in partial.rglob("*"):
                    sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync(self.path)

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, oldest first; partial ones do not count."""
        return self._checkpoints.paths()

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole.

        Its files are compared with their checksums when this process first asks for it. Damaged
        ones that are newer are put aside with a warning; the next checkpoint deletes them.

        Raises:
            DataError: there are checkpoints, but all are damaged.
        """
        return self._checkpoints.newest()

    @property
    def went_back(self) -> bool:
        """Whether newer checkpoints were damaged, until there is another one.

        What was played since then is of weights that are gone.
        """
        return self._checkpoints.went_back

    def close(self) -> None:
        """Flush, and let another process write here."""
        while self._open_loggers:
            self._open_loggers.pop().close()
        if self._unlock is not None:
            self._unlock()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- within ----------------------------------------------------------------------------------

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
                f"{self.path}: process {owner} is writing there. Wait for it, or choose another "
                "run.name."
            ) from error
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._unlock = weakref.finalize(self, os.close, handle)

    def _cut_metrics(self) -> int:
        """Cut metrics.jsonl back to the checkpoint; returns the first step with no line left."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return 0
        if self.finished is None:
            checkpoint = self.latest_checkpoint()
            size = checkpoint.metrics_bytes if checkpoint else 0
            if checkpoint and checkpoint.metrics_sum:
                text = file.read_bytes()[:size]
                if text_sum(text) != checkpoint.metrics_sum:
                    read_lines(file, text)  # names the line, if it can
                    raise DataError(
                        f"{file}: its first {size:,} bytes are not those that were written before "
                        f"the checkpoint of step {checkpoint.step}. Bring the file back from a "
                        "copy; or remove it, and the run goes on without the figures of the steps "
                        "before."
                    )
            os.truncate(file, min(size, file.stat().st_size))
        return max((int(row["step"]) for row in self.metrics()), default=-1) + 1


def _holds_run(folder: Path) -> bool:
    """Whether there is a run in `folder`: its settings, and anything that it made."""
    if not (folder / "config.yaml").is_file():
        return False
    files = (file for file in folder.rglob("*") if file.name not in ("config.yaml", ".lock"))
    return any(file.is_file() and file.stat().st_size for file in files)


def check_finished(run: Path) -> None:
    """Compare the JSONL files of a finished run with what they were when it ended.

    Raises:
        DataError: one is damaged, or result.json is.
    """
    file = run / "result.json"
    if not file.is_file():
        return
    try:
        sums = opened(parse(file.read_bytes())).get(_FILES, {})
    except ValueError as error:
        raise DataError(f"{file}: {error}; remove the file.") from error
    if what := damage(run, sums):
        raise DataError(
            f"{what}. Bring it back from a copy; if you changed it on purpose, remove the keys "
            f"{_FILES!r} and 'checksum' from {file}."
        )


def read_config(run: Path) -> Config:
    """The configuration a run folder was made with.

    Raises:
        DataError: there is no run in that folder, or its config.yaml cannot be read.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise DataError(f"{run}: there is no run here (no config.yaml).")
    try:
        data = _yaml_of(file)
        return from_dict(data)
    except ConfigError as error:
        raise DataError(f"{file}: {error}") from error


def _as_yaml(config: Config) -> str:
    text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
    return f"{text}{_SUM}{text_sum(text.encode())}\n"


def _yaml_of(file: Path) -> dict[str, Any]:
    """What `_as_yaml` wrote; nothing in it is looked up or run.

    Raises:
        DataError: it is damaged.
    """
    remedy = "Bring the file back from a copy; the command that started the run has its settings"
    text = file.read_bytes()
    body, mark, own = text.rpartition(_SUM.encode())
    if mark and own.strip().decode("latin-1") != text_sum(body):
        raise DataError(
            f"{file} is not what was written: its checksum is another. {remedy}. If you changed it "
            "on purpose, remove its last line."
        )
    try:
        data = OmegaConf.to_container(OmegaConf.create(text.decode()), resolve=False)
    except Exception as error:  # of PyYAML or OmegaConf, which have no base in common
        at = getattr(error, "problem_mark", None)
        line = f", line {at.line + 1}" if at else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DataError(f"{file}{line}: not YAML ({why}). {remedy}.") from error
    if not isinstance(data, dict) or not data:
        raise DataError(f"{file} holds no settings. {remedy}.")
    if found := interpolation(data):  # of the environment's variables, say: it may be a stranger's
        raise DataError(f"{file}: {found!r} is not looked up in what a run has stored. {remedy}.")
    return cast("dict[str, Any]", data)


def refuse_changes(path: Path, config: Config, remedy: str, *, more_steps: bool = False) -> bool:
    """Refuse settings that make another run than the one at `path` was started with.

    Args:
        config: what is asked for now.
        remedy: what to do about a change, the last words of the error.
        more_steps: whether there may be more steps than before.

    Returns:
        Whether there are.

    Raises:
        ConfigError: there is a change; the message lists all.
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
            f"{path} holds a run with other settings (its config.yaml):\n"
            + "\n".join(changed)
            + f"\n{remedy}"
        )
    return more


def _plain(value: object) -> float | int | str | None:
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars as well
    return number if math.isfinite(number) else None
