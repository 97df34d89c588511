"""A recipe with processes killed at random, against the same recipe left alone.

    python benchmarks/chaos.py [--kills 20] [--seed 0] [--every 0.5 5] [--max-lag 0] [SETTING ...]

Runs `rayrl recipe experiment=tictactoe` at small scale twice: undisturbed, and with processes of
every kind killed (SIGKILL) at random moments of its training stages, each after at least one more
update: env workers, replicas, learner ranks, the weights store, the recorder, Serve's controller,
and the driver, which is started again with the same command. Prints as JSON what was killed, what
each run came to (updates, weights, table), and what was lost.

With --max-lag 0 the weights must be equal bit for bit. With more, what is played with which weights
is a matter of time, killed or not: then the number of updates must be the same, every group that is
trained on must be trained on once and be accounted for, and the tables are there to be compared.

What is lost is counted where it is made: an answer of an engine to the same request (seed, prompt,
weights) that was given before was thrown away. It is held against the first kill
after that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from rayrl.run.files import read_lines

KINDS = {
    "env worker": "ray::EnvWorker",
    "replica": "ray::ServeReplica",
    "learner rank": "ray::LearnerRank",
    "weights store": "ray::WeightStore",
    "recorder": "ray::Recorder",
    "Serve controller": "ray::ServeController",
    "driver": "",
}
SETTINGS = [
    "experiment=tictactoe",
    "train.groups=8",
    "train.group_size=8",
    "run.episodes_every=1",
    "run.checkpoint_every=5",
    "eval.episodes=100",
    "cluster.env_workers=2",
]


def command(folder: Path, settings: list[str]) -> list[str]:
    words = [*SETTINGS, f"run.dir={folder}", "run.name=chaos", *settings]
    return [sys.executable, "-m", "rayrl", "recipe", *words]


def counting(folder: Path) -> dict[str, str]:
    """The environment of a run whose answers are counted in FOLDER.answers."""
    path = [str(Path(__file__).parent / "counting"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "COUNT_ANSWERS": str(folder.with_suffix(".answers").resolve()),
        "PYTHONHASHSEED": "0",
    }


def answers(folder: Path) -> list[dict[str, Any]]:
    """All answers, those that were thrown away included."""
    lines = folder.with_suffix(".answers").read_text().splitlines()
    return [json.loads(line) for line in lines]


def twice(folder: Path, kills: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Answers that had been given before, and their tokens, by the kind killed in between."""
    found: dict[str, Counter[str]] = {}
    given: dict[str, float] = {}
    for one in sorted(answers(folder), key=lambda one: one["at"]):
        if one["key"] in given:
            between = (k["kind"] for k in kills if given[one["key"]] <= k["at"] < one["at"])
            found.setdefault(next(between, "nobody"), Counter()).update(
                answers=1, tokens=one["tokens"]
            )
        given[one["key"]] = one["at"]
    return {kind: dict(count) for kind, count in found.items()}


def unaccounted(folder: Path, config: dict[str, int]) -> list[str]:
    """What is wrong with the groups that were trained on, as their episodes' files have them."""
    wrong = []
    for stage in ("rl1", "rl2"):
        trained = Counter(
            row["id"]
            for file in sorted((folder / stage / "episodes").glob("*.jsonl"))
            for row in read_lines(file)
        )
        wrong += [f"{stage}: {name} trained on {n} times" for name, n in trained.items() if n > 1]
        plans = Counter(name.split("/")[0].split("~")[0] for name in trained)
        for step in range(config["steps"]):
            for k in range(config["groups"]):
                if plans[f"{step}-{k}"] != config["group_size"]:
                    wrong.append(f"{stage}: {step}-{k} has {plans[f'{step}-{k}']} episodes")
    return wrong


def steps(folder: Path) -> int:
    """Updates so far, of both phases."""
    files = [folder / stage / "metrics.jsonl" for stage in ("rl1", "rl2")]
    return sum(file.read_text().count("\n") for file in files if file.is_file())


def training(folder: Path) -> bool:
    """Whether a training stage goes on."""
    return any(
        (folder / stage / "metrics.jsonl").is_file()
        and not (folder / stage / "result.json").is_file()
        for stage in ("rl1", "rl2")
    )


def victims(driver: int) -> dict[str, list[psutil.Process]]:
    """The run's processes by kind."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
    try:
        run = psutil.Process(driver)
        found["driver"].append(run)
        for process in run.children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            for kind, begins in KINDS.items():
                if begins and title.startswith(begins):
                    found[kind].append(process)
    except psutil.NoSuchProcess:
        pass
    return found


def wait_for_an_update(run: subprocess.Popen[bytes], folder: Path) -> None:
    """Until the run has logged one more than now, or than it goes back to, or has ended."""
    least = steps(folder)
    while run.poll() is None and steps(folder) <= least:
        least = min(least, steps(folder))
        time.sleep(0.1)


def disturbed(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The recipe under fire; returns what was killed."""
    rng = random.Random(args.seed)
    log = (folder.parent / "chaos.log").open("a")
    kills: list[dict[str, Any]] = []
    kinds = list(KINDS)
    line, env = command(folder, args.settings), counting(folder)
    run = subprocess.Popen(line, stdout=log, stderr=log, env=env)
    began = time.monotonic()
    while True:
        wait_for_an_update(run, folder)
        end = time.monotonic() + rng.uniform(*args.every)
        while run.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        if run.poll() is not None:
            if run.returncode == 0:
                return kills
            if not kills or kills[-1]["kind"] != "driver":
                raise SystemExit(f"the run ended with {run.returncode}; see {log.name}")
            run = subprocess.Popen(line, stdout=log, stderr=log, env=env)
            continue
        if len(kills) >= args.kills or not training(folder):
            continue
        kind = kinds[len(kills) % len(kinds)] if len(kills) < len(kinds) else rng.choice(kinds)
        there = victims(run.pid)[kind]
        if not there:
            continue
        victim = rng.choice(there)
        kills.append(
            {
                "kind": kind,
                "after_s": round(time.monotonic() - began, 1),
                "steps": steps(folder),
                "at": time.time(),
            }
        )
        print(json.dumps(kills[-1]), file=sys.stderr)
        if kind == "driver":
            orphans = victim.children(recursive=True)
            run.send_signal(signal.SIGKILL)
            run.wait()
            psutil.wait_procs(orphans, timeout=30)
        else:
            os.kill(victim.pid, signal.SIGKILL)


def summary(folder: Path) -> dict[str, Any]:
    """What a run came to."""
    model = folder / "rl2" / "model" / "model.safetensors"
    rows = [
        json.loads(line)
        for stage in ("rl1", "rl2")
        for line in (folder / stage / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        "updates": len(rows),
        "weights": hashlib.blake2b(model.read_bytes(), digest_size=8).hexdigest(),
        "table": [
            {key: value for key, value in row.items() if key != "settings"}  # the model's folder
            for row in json.loads((folder / "table.json").read_text())
        ],
        "failures": {
            name: sum(row[f"failures/{name}"] for row in rows) for name in ("env", "infra", "stale")
        },
        "stopped": sum(row["stopped/groups"] for row in rows),
        "turns_replayed": sum(row["turns/replayed"] for row in rows),
        "turns_diverged": sum(row["turns/diverged"] for row in rows),
        "answers": len(answers(folder)),
        "minutes": round(
            sum(json.loads((folder / "recipe.json").read_text())["seconds"].values()) / 60, 1
        ),
    }


def main() -> None:
    """Both runs and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, nargs=2, default=(0.5, 5.0))
    parser.add_argument("--max-lag", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="of each of the two phases")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    scale = {"groups": 8, "group_size": 8, "steps": args.steps}
    args.settings += [f"train.max_lag={args.max_lag}"]
    args.settings += [f"recipe.{one}.train.steps={args.steps}" for one in ("rl1", "rl2")]
    args.folder.mkdir(parents=True, exist_ok=True)
    calm, fire = args.folder / "calm", args.folder / "fire"
    with (args.folder / "calm.log").open("a") as log:
        line, env = command(calm, args.settings), counting(calm)
        subprocess.run(line, stdout=log, stderr=log, env=env, check=True)
    kills = disturbed(args, fire)
    ours, theirs = summary(fire), summary(calm)
    print(
        json.dumps(
            {
                "kills": len(kills),
                "by_kind": dict(Counter(one["kind"] for one in kills)),
                "same_updates": ours["updates"] == theirs["updates"],
                "same_weights": ours["weights"] == theirs["weights"],
                "same_table": ours["table"] == theirs["table"],
                "unaccounted": unaccounted(fire, scale),
                "answered_twice_after": twice(fire, kills),
                "answered_twice_in_calm": twice(calm, []),
                "disturbed": ours,
                "calm": theirs,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
