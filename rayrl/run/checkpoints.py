"""What a run can be resumed from: RUN/checkpoints/step_000010/, whole or not at all.

A folder holds what the learner saved, and run.json: the state of the loop, and the checksum of
every file. They are compared before anything is loaded; where the newest checkpoint is damaged, the
run goes back to the one before.
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
    damage,
    explain_full_disk,
    opened,
    parse,
    sealed,
    size_of,
    sums_of,
    sync,
    text_sum,
)

__all__ = ["Checkpoint", "Checkpoints", "removed_on_error", "step_name"]

RECORD = "run.json"
METRICS = "metrics.jsonl"
_BEFORE = ("step", "metrics_bytes", "state")  # keys of a record from when there were no checksums
_NAME = re.compile(r"step_(\d+)")
_ASIDE = ".damaged-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: finished steps when it was made; a resumed loop starts at this step.
        path: its folder.
        state: what was given to `RunDir.checkpoint`.
        metrics_bytes: length of metrics.jsonl when it was made.
        metrics_sum: its checksum; empty where an earlier version of rayrl made it.
    """

    step: int
    path: Path
    state: Mapping[str, Any] = field(default_factory=dict)
    metrics_bytes: int = 0
    metrics_sum: str = ""


class Checkpoints:
    """Those of a run.

    Args:
        run: its folder.
        keep: how many stay; older ones are deleted.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self._metrics, self._keep = run / "checkpoints", run / METRICS, keep
        self._whole: dict[Path, Checkpoint] = {}  # those that were compared with their checksums
        self._clear_partial()

    @contextlib.contextmanager
    def save(self, step: int, state: Mapping[str, Any]) -> Iterator[Path]:
        """See `RunDir.checkpoint`."""
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / f".partial-{step_name(step)}-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        last = next(reversed(self.paths()), None)
        kept = f"the one of step {_step_of(last)} is intact" if last else "there is none before it"
        then, needed = f"it resumes ({kept})", size_of(last) if last else 0
        with explain_full_disk(self.folder, f"the checkpoint of step {step}", then, needed):
            partial.mkdir()
            with removed_on_error(partial):
                yield partial
                self._seal(partial, step, state)
        final = self.folder / step_name(step)
        if final.exists():  # the same step again, after a resume: make way without a gap
            os.replace(final, self.folder / f".old-{step_name(step)}")
        os.replace(partial, final)
        sync(self.folder)
        self._whole.pop(final, None)
        self._prune(final)

    def paths(self) -> list[Path]:
        """Their folders, oldest first; partial ones do not count."""
        found = [path for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def newest(self) -> Checkpoint | None:
        """See `RunDir.latest_checkpoint`."""
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.paths()):
            if path not in self._whole:
                try:
                    self._whole[path] = _compared(path)
                except ValueError as error:
                    damaged.append((path, str(error)))
                    continue
            self._put_aside(damaged, path)
            return self._whole[path]
        if damaged:
            raise DataError(
                f"{damaged[0][1]}. No older checkpoint is whole, so the run cannot go on: bring "
                f"the file back from a copy, or remove {self.folder} to start again from step 0."
            )
        return None

    @property
    def went_back(self) -> bool:
        """See `RunDir.went_back`."""
        return any(self.folder.glob(f"{_ASIDE}*"))

    def _seal(self, partial: Path, step: int, state: Mapping[str, Any]) -> None:
        text = b""
        if self._metrics.is_file():
            sync(self._metrics)
            text = self._metrics.read_bytes()
        record = {
            "step": step,
            "metrics_bytes": len(text),
            "metrics_sum": text_sum(text),
            "state": dict(state),
            "files": sums_of(partial),
        }
        text = json.dumps(sealed(record), indent=2).encode()
        (partial / RECORD).write_bytes(text)
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)

    def _put_aside(self, damaged: Sequence[tuple[Path, str]], whole: Path) -> None:
        for path, what in damaged:
            print(
                f"WARNING: {what}. The checkpoint of step {_step_of(path)} is not used: the run "
                f"goes on from that of step {_step_of(whole)}.",
                file=sys.stderr,
            )
            aside = path.with_name(f"{_ASIDE}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)

    def _prune(self, newest: Path) -> None:
        for pattern in (".old-*", f"{_ASIDE}*"):
            for old in self.folder.glob(pattern):
                shutil.rmtree(old)
        for path in self.paths()[: -self._keep]:
            if path != newest:
                shutil.rmtree(path)

    def _clear_partial(self) -> None:
        """Remove what an earlier process left half done."""
        for partial in self.folder.glob(".partial-*"):
            shutil.rmtree(partial)
        for old in self.folder.glob(".old-*"):
            final = old.with_name(old.name.removeprefix(".old-"))
            if final.exists():
                shutil.rmtree(old)
            else:  # it was stopped between the two renames
                os.replace(old, final)


@contextlib.contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove a folder that is not finished."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def step_name(step: int) -> str:
    """The name of what belongs to a step."""
    return f"step_{step:06d}"


def _compared(path: Path) -> Checkpoint:
    """Raises ValueError, which names the file, if a checkpoint is damaged."""
    try:
        record = opened(parse((path / RECORD).read_bytes()), _BEFORE)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / RECORD}: {error}") from None
    if what := damage(path, record.pop("files", {})):
        raise ValueError(what)
    return Checkpoint(path=path, **record)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1
