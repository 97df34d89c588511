"""Training runs on a model of noise as a user starts them, and what they leave."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrl.run.files import read_jsonl

__all__ = [
    "ENVS",
    "PROGRAMS",
    "RANKS",
    "ROOT",
    "STEPS",
    "Going",
    "command",
    "episodes",
    "figures",
    "rows",
    "scraps",
    "train",
    "until",
    "weights",
]

ROOT = Path(__file__).parent.parent
ENVS = ROOT / "tests" / "cluster_envs.py"
PROGRAMS = ROOT / "tests" / "program_envs.py"
STEPS = 18  # enough that a run still goes on when a test has seen that it does
RANKS = ["learner.kind=deepspeed", "learner.world_size=2"]


def command(tiny: Path, folder: Path, *more: str) -> list[str]:
    settings = {
        "run.dir": folder,
        "run.checkpoint_every": 2,
        "run.episodes_every": 1,
        "env.name": f"{ENVS}:talk",
        "model.path": tiny,
        "engine.max_len": 256,
        "sampling.max_tokens": 24,
        "train.steps": STEPS,
        "train.groups": 4,
        "train.group_size": 4,
        "learner.kind": "reference",
        "learner.lr": 0.01,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "rayrl", "train", *words, *more]


def train(
    tiny: Path, folder: Path, *more: str, env: dict[str, str] | None = None, code: Path = ROOT
) -> None:
    """To the end; `code` is the folder with the rayrl that runs."""
    done = subprocess.run(
        command(tiny, folder, *more), cwd=code, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def figures(folder: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(folder / "metrics.jsonl")
    chance = ("time/", "workers/", "turns/replayed")
    return [{k: v for k, v in row.items() if not k.startswith(chance)} for row in rows]


def episodes(folder: Path) -> dict[str, list[Any]]:
    chance = ("began", "seconds", "replayed", "checksum")

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k not in chance}

    files = sorted((folder / "episodes").glob("*.jsonl"))
    # str.splitlines would cut a line at U+2028 and the like, which an untrained model may write
    return {f.name: [plain(row) for row in read_jsonl(f)] for f in files}


def rows(folder: Path) -> int:
    """Steps that were logged."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def until(fact: Callable[[], bool], process: subprocess.Popen[Any], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def scraps(folder: Path) -> list[str]:
    """What a run leaves half done in its folder; it should be nothing."""
    found = [path for path in folder.rglob(".*") if path.name != ".lock"]
    newest = max((path.name for path in folder.glob("checkpoints/step_*")), default="")
    found += [log for log in folder.glob("groups/step_*.log") if log.stem < newest]
    return [str(path.relative_to(folder)) for path in found]


class Going:
    """A program that goes on while something is done to it; leaving the block kills it.

    Attributes:
        said: both its streams, so far.
    """

    def __init__(self, line: Sequence[Any], env: Mapping[str, str] | None = None) -> None:
        self.said = ""
        self.process = subprocess.Popen(
            line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
        self.process.wait()  # so that it is gone for all, as soon as it has ended

    def until(self, fact: Callable[[], bool], seconds: float = 900) -> None:
        end = time.monotonic() + seconds
        while not fact():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, f"waited in vain\n{self.said}"
            time.sleep(0.02)

    def wait(self, seconds: float = 900) -> int:
        """Its exit status."""
        status = self.process.wait(seconds)
        self._reader.join(600)
        return status

    def __enter__(self) -> Going:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(600)
        assert self.process.stdout is not None
        self.process.stdout.close()
