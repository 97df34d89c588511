"""Checkpoints of a run: RUN/checkpoints/step_000010/, written atomically.

A checkpoint holds what the learner saved, and run.json: the state of the loop and the checksum of
every file. Checksums are verified before anything is loaded; if the newest checkpoint is damaged,
the run falls back to the one before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayrl.errors import DataError
from rayrl.run.files import (
    checksum_of,
    explain_full_disk,
    file_checksums,
    find_damage,
    folder_size,
    fsync,
    parse,
    verify_checksum,
    with_checksum,
)

__all__ = ["Checkpoint", "Checkpoints", "removed_on_error", "step_name"]

RECORD = "run.json"
METRICS = "metrics.jsonl"
_LEGACY_KEYS = ("step", "metrics_bytes", "state")  # of run.json written before checksums existed
_NAME = re.compile(r"step_(\d+)")
_DAMAGED = ".damaged-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: number of finished steps; a resumed loop starts at this step.
        path: folder of the checkpoint.
        state: the `state` given to `RunDir.checkpoint`.
        metrics_bytes: size of metrics.jsonl when the checkpoint was written.
        metrics_sum: checksum of metrics.jsonl; empty in checkpoints of older versions of rayrl.
    """

    step: int
    path: Path
    state: Mapping[str, Any] = field(default_factory=dict)
    metrics_bytes: int = 0
    metrics_sum: str = ""


class Checkpoints:
    """Checkpoints of a run.

    Args:
        run: the run's folder.
        keep: number of checkpoints to keep; older ones are deleted.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self._metrics, self._keep = run / "checkpoints", run / METRICS, keep
        self._verified: dict[Path, Checkpoint] = {}
        self._remove_partial()

    @contextlib.contextmanager
    def save(self, step: int, state: Mapping[str, Any]) -> Iterator[Path]:
        """See `RunDir.checkpoint`."""
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / f".partial-{step_name(step)}-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        last = next(reversed(self.paths()), None)
        kept = f"the one of step {_step_of(last)} is intact" if last else "there is none before it"
        then, needed = f"it resumes ({kept})", folder_size(last) if last else 0
        with explain_full_disk(self.folder, f"the checkpoint of step {step}", then, needed):
            partial.mkdir()
            with removed_on_error(partial):
                yield partial
                self._write_record(partial, step, state)
        final = self.folder / step_name(step)
        if final.exists():  # the same step again, after a resume: never be without a checkpoint
            os.replace(final, self.folder / f".old-{step_name(step)}")
        os.replace(partial, final)
        fsync(self.folder)
        self._verified.pop(final, None)
        self._prune(final)

    def paths(self) -> list[Path]:
        """Folders of the checkpoints, oldest first, without partial ones."""
        found = [path for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def newest(self) -> Checkpoint | None:
        """See `RunDir.latest_checkpoint`."""
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.paths()):
            if path not in self._verified:
                try:
                    self._verified[path] = _verify(path)
                except ValueError as error:
                    damaged.append((path, str(error)))
                    continue
            self._set_aside(damaged, path)
            return self._verified[path]
        if damaged:
            raise DataError(
                f"{damaged[0][1]}. No older checkpoint is intact, so the run cannot resume: "
                f"restore the file from a copy, or remove {self.folder} to restart from step 0."
            )
        return None

    @property
    def went_back(self) -> bool:
        """See `RunDir.went_back`."""
        return any(self.folder.glob(f"{_DAMAGED}*"))

    def _write_record(self, partial: Path, step: int, state: Mapping[str, Any]) -> None:
        text = b""
        if self._metrics.is_file():
            fsync(self._metrics)
            text = self._metrics.read_bytes()
        record = {
            "step": step,
            "metrics_bytes": len(text),
            "metrics_sum": checksum_of(text),
            "state": dict(state),
            "files": file_checksums(partial),
        }
        text = json.dumps(with_checksum(record), indent=2).encode()
        (partial / RECORD).write_bytes(text)
        for path in sorted(partial.rglob("*")):
            fsync(path)
        fsync(partial)

    def _set_aside(self, damaged: Sequence[tuple[Path, str]], intact: Path) -> None:
        for path, damage in damaged:
            print(
                f"WARNING: {damage}. The checkpoint of step {_step_of(path)} is skipped: the run "
                f"resumes from that of step {_step_of(intact)}.",
                file=sys.stderr,
            )
            renamed = path.with_name(f"{_DAMAGED}{path.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            os.replace(path, renamed)

    def _prune(self, newest: Path) -> None:
        for pattern in (".old-*", f"{_DAMAGED}*"):
            for old in self.folder.glob(pattern):
                shutil.rmtree(old)
        for path in self.paths()[: -self._keep]:
            if path != newest:
                shutil.rmtree(path)

    def _remove_partial(self) -> None:
        """Remove what a killed process left unfinished."""
        for partial in self.folder.glob(".partial-*"):
            shutil.rmtree(partial)
        for old in self.folder.glob(".old-*"):
            final = old.with_name(old.name.removeprefix(".old-"))
            if final.exists():
                shutil.rmtree(old)
            else:  # killed between the two renames
                os.replace(old, final)


@contextlib.contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove `folder` if the block raises."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def step_name(step: int) -> str:
    """Name of a step's files: `step_000010`."""
    return f"step_{step:06d}"


def _verify(path: Path) -> Checkpoint:
    """Load a checkpoint's record; raise ValueError, which names the file, if it is damaged."""
    try:
        record = verify_checksum(parse((path / RECORD).read_bytes()), _LEGACY_KEYS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / RECORD}: {error}") from None
    if damage := find_damage(path, record.pop("files", {})):
        raise ValueError(damage)
    return Checkpoint(path=path, **record)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1
