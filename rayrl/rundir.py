"""The folder of a run: what it was, what it measured, and what it can be resumed from.

    RUN/config.yaml              every setting, so that a resumed run is the same run
    RUN/metrics.jsonl            one line a `log` call: {"step": 3, "reward": 0.4, …}
    RUN/tensorboard/             the same numbers
    RUN/episodes/step_000010.jsonl
    RUN/checkpoints/step_000010/ what the learner saved, and run.json: the state of the loop
    RUN/result.json              what the run came to, once it is finished

Programs add what they make: model/ (sft, train), what `watch.py` names (train), episodes.jsonl and
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
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rayrl.boards import TensorBoard, Wandb
from rayrl.config import Config, differences, from_dict, to_dict
from rayrl.errors import ConfigError, DataError, RunFailed
from rayrl.files import size_of, sync, told_if_full, write_atomic
from rayrl.types import Group

__all__ = ["Checkpoint", "RunDir", "read_config", "refuse_changes"]

_MAY_CHANGE = (
    "run.dir",
    "run.keep_checkpoints",
    "run.checkpoint_every",
    "run.episodes_every",
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
_REMEDY = "Use the old ones to resume it, or another run.name (or run.dir) to start a new run."
_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: finished steps when it was made; a resumed loop starts at this step.
        path: its folder.
        state: what was given to `RunDir.checkpoint`.
        metrics_bytes: length of metrics.jsonl when it was made.
    """

    step: int
    path: Path
    state: Mapping[str, Any] = field(default_factory=dict)
    metrics_bytes: int = 0


class RunDir:
    """A run's folder: made when it is not there, resumed when it is. One process at a time.

    A folder in which a start left its settings and nothing else holds no run: it is used anew.

    Args:
        path: the folder; usually `config.run.dir`.
        config: what the run runs with; stored, and compared with what is stored.
        begin: write at once. False: not before `begin`, so that a start which fails leaves nothing.

    Attributes:
        resumed: whether the folder holds a run already.

    Raises:
        ConfigError: the folder's run had other settings; the message lists them. Or the folder
            would not last.
        RunFailed: another process is writing there.
    """

    def __init__(self, path: str | Path, config: Config, *, begin: bool = True) -> None:
        self.path = Path(path)
        self._config = config
        if RAY_COPIES in self.path.resolve().parts:
            raise ConfigError(
                f"run.dir={path}: {self.path.resolve()} is in a copy of the job's code, which Ray "
                "deletes. Give an absolute path on storage that all nodes share; or submit with "
                "jobs/submit and RAYRL_WORKDIR."
            )
        self._tensorboard: TensorBoard | None = None
        self._wandb: Wandb | None = None
        self._unlock: Callable[[], object] | None = None
        self._more = self._begun = False
        self._next_step = 0
        self.resumed = _holds_run(self.path)
        if self.resumed:
            self._lock()
            try:
                self._more = refuse_changes(self.path, config, _REMEDY, more_steps=True)
            except BaseException:
                self.close()
                raise
            self._clear_partial()
        if begin:
            self.begin()

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
        if self._tensorboard is None:
            self._tensorboard = TensorBoard(self.path / "tensorboard", self._next_step)
        self._tensorboard.add(step, numbers)
        if self._config.run.wandb_project:
            self._wandb = self._wandb or Wandb(self.path, self._config)
            self._wandb.add(step, numbers)

    def metrics(self) -> list[dict[str, Any]]:
        """Every line logged so far."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]

    def write_episodes(self, step: int, groups: Sequence[Group]) -> Path:
        """Write the episodes of `groups` to `episodes/step_….jsonl`, for people and the report."""
        from rayrl.episodes import episode_to_json

        lines = [
            json.dumps(episode_to_json(episode), ensure_ascii=False) + "\n"
            for group in groups
            for episode in group.episodes
        ]
        file = self.episodes_file(step)
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, "".join(lines).encode())
        return file

    def episodes_file(self, step: int) -> Path:
        """Where the episodes of a step (in an evaluation: of a cell) are."""
        return self.path / "episodes" / f"{_step_name(step)}.jsonl"

    def write_json(self, name: str, data: object) -> Path:
        """Write `data` as RUN/name, readable and whole."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
        return file

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote, or None if it never did."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {error.lineno}: {error.msg}; remove the file."
            ) from error

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished, with what it came to; opened again, it has nothing to do."""
        self._more = False
        self.write_json("result.json", dict(result))

    @property
    def finished(self) -> dict[str, Any] | None:
        """What `finish` was given, or None while there is something left to do."""
        result: dict[str, Any] | None = None if self._more else self.read_json("result.json")
        return result

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
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        partial = folder / f".partial-{_step_name(step)}-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        last = self.latest_checkpoint()
        kept = f"the one of step {last.step} is intact" if last else "there is none before it"
        needed = size_of(last.path) if last else 0
        with told_if_full(folder, f"the checkpoint of step {step}", f"it resumes ({kept})", needed):
            partial.mkdir()
            with _removed_on_error(partial):
                yield partial
                self._seal(partial, step, state or {})
        final = folder / _step_name(step)
        if final.exists():  # the same step again, after a resume: make way without a gap
            os.replace(final, folder / f".old-{_step_name(step)}")
        os.replace(partial, final)
        sync(folder)
        self._prune(keep=final)

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """A folder to write into; when the block ends it is RUN/name, and not before.

        Raises:
            RunFailed: the disk is full.
        """
        final, partial = self.path / name, self.path / f".partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        with told_if_full(self.path, f"{name}/", "it goes on from its last checkpoint"):
            partial.mkdir()
            with _removed_on_error(partial):
                yield partial
                for path in partial.rglob("*"):
                    sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync(self.path)

    def checkpoints(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first."""
        found = [
            path
            for path in (self.path / "checkpoints").glob("step_*")
            if _NAME.fullmatch(path.name) and (path / "run.json").is_file()
        ]
        return sorted(found, key=_step_of)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest complete checkpoint; partial ones do not count."""
        paths = self.checkpoints()
        if not paths:
            return None
        record = self.read_json(str(paths[-1].relative_to(self.path) / "run.json"))
        return Checkpoint(record["step"], paths[-1], record["state"], record["metrics_bytes"])

    def close(self) -> None:
        """Flush, and let another process write here."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()
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

    def _seal(self, partial: Path, step: int, state: Mapping[str, Any]) -> None:
        metrics = self.path / "metrics.jsonl"
        size = 0
        if metrics.is_file():
            sync(metrics)
            size = metrics.stat().st_size
        record = {"step": step, "metrics_bytes": size, "state": dict(state)}
        (partial / "run.json").write_text(json.dumps(record, indent=2), "utf-8")
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)

    def _prune(self, keep: Path) -> None:
        for old in (self.path / "checkpoints").glob(".old-*"):
            shutil.rmtree(old)
        for path in self.checkpoints()[: -self._config.run.keep_checkpoints]:
            if path != keep:
                shutil.rmtree(path)

    def _clear_partial(self) -> None:
        """Remove what an earlier process left half done."""
        for partial in (*self.path.glob("checkpoints/.partial-*"), *self.path.glob(".partial-*")):
            shutil.rmtree(partial)
        for old in self.path.glob("checkpoints/.old-*"):
            final = old.with_name(old.name.removeprefix(".old-"))
            if final.exists():
                shutil.rmtree(old)
            else:  # it was stopped between the two renames
                os.replace(old, final)

    def _cut_metrics(self) -> int:
        """Cut metrics.jsonl back to the checkpoint; returns the first step with no line left."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return 0
        if self.finished is None:
            checkpoint = self.latest_checkpoint()
            size = checkpoint.metrics_bytes if checkpoint else 0
            os.truncate(file, min(size, file.stat().st_size))
        return max((int(row["step"]) for row in self.metrics()), default=-1) + 1


def _holds_run(folder: Path) -> bool:
    """Whether there is a run in `folder`: its settings, and anything that it made."""
    if not (folder / "config.yaml").is_file():
        return False
    files = (file for file in folder.rglob("*") if file.name not in ("config.yaml", ".lock"))
    return any(file.is_file() and file.stat().st_size for file in files)


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def read_config(run: Path) -> Config:
    """The configuration a run folder was made with.

    Raises:
        DataError: there is no run in that folder, or its config.yaml cannot be read.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise DataError(f"{run}: there is no run here (no config.yaml).")
    try:
        data = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        return from_dict(data if isinstance(data, dict) else {})  # type: ignore[arg-type]
    except ConfigError as error:
        raise DataError(f"{file}: {error}") from error


def _as_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


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
            f"{path} holds a run with other settings:\n" + "\n".join(changed) + f"\n{remedy}"
        )
    return more


def _plain(value: object) -> float | int | str | None:
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars as well
    return number if math.isfinite(number) else None


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1
