"""A recipe with processes killed at random, against the same recipe undisturbed.

    python benchmarks/chaos.py [--kills 20] [--seed 0] [--every 0.5 5] [--max-lag 0] [SETTING ...]

Runs `rayrl recipe experiment=tictactoe` at small scale twice: undisturbed, and with processes of
every kind killed (SIGKILL) at random moments of its training stages, each after at least one more
update: env workers, replicas, learner ranks, the weights store, the recorder, Serve's controller,
and the driver, which is restarted with the same command. Prints as JSON the kills, the results of
each run (updates, weights, table), and the lost work.

With --max-lag 0 the weights must be equal bit for bit. With more, timing decides which weights play
which episodes in any run: then the number of updates must be equal, every group must be trained on
exactly once, and the tables are printed for comparison.

Lost work is counted at the engine: when it answers the same request (seed, prompt, weights) twice,
the first answer was lost. It is attributed to the first kill after that answer.
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

from rayrl.run.files import read_jsonl

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
    """Environment variables of a run that logs its answers to FOLDER.answers."""
    path = [str(Path(__file__).parent / "counting"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "COUNT_ANSWERS": str(folder.with_suffix(".answers").resolve()),
        "PYTHONHASHSEED": "0",
    }


def answers(folder: Path) -> list[dict[str, Any]]:
    """Read all answers, lost ones included."""
    return read_jsonl(folder.with_suffix(".answers"))


def repeated_answers(folder: Path, kills: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Count repeated answers and their tokens by the kind of process killed in between."""
    counts: dict[str, Counter[str]] = {}
    answered: dict[str, float] = {}
    for answer in sorted(answers(folder), key=lambda answer: answer["at"]):
        key, at = answer["key"], answer["at"]
        if key in answered:
            between = (kill["kind"] for kill in kills if answered[key] <= kill["at"] < at)
            counts.setdefault(next(between, "none"), Counter()).update(
                answers=1, tokens=answer["tokens"]
            )
        answered[key] = at
    return {kind: dict(count) for kind, count in counts.items()}


def unaccounted(folder: Path, config: dict[str, int]) -> list[str]:
    """List groups that were not trained on exactly once, according to the episodes' files."""
    wrong = []
    for stage in ("rl1", "rl2"):
        trained = Counter(
            row["id"]
            for file in sorted((folder / stage / "episodes").glob("*.jsonl"))
            for row in read_jsonl(file)
        )
        wrong += [f"{stage}: {name} trained on {n} times" for name, n in trained.items() if n > 1]
        plans = Counter(name.split("/")[0].split("~")[0] for name in trained)
        for step in range(config["steps"]):
            for k in range(config["groups"]):
                if plans[f"{step}-{k}"] != config["group_size"]:
                    wrong.append(f"{stage}: {step}-{k} has {plans[f'{step}-{k}']} episodes")
    return wrong


def steps(folder: Path) -> int:
    """Count the updates of both phases so far."""
    files = [folder / stage / "metrics.jsonl" for stage in ("rl1", "rl2")]
    return sum(file.read_text().count("\n") for file in files if file.is_file())


def training(folder: Path) -> bool:
    """Tell whether a training stage is running."""
    return any(
        (folder / stage / "metrics.jsonl").is_file()
        and not (folder / stage / "result.json").is_file()
        for stage in ("rl1", "rl2")
    )


def processes(driver: int) -> dict[str, list[psutil.Process]]:
    """Return the run's processes by kind."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
    try:
        run = psutil.Process(driver)
        found["driver"].append(run)
        for process in run.children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            for kind, prefix in KINDS.items():
                if prefix and title.startswith(prefix):
                    found[kind].append(process)
    except psutil.NoSuchProcess:
        pass
    return found


def wait_for_an_update(run: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until the run has logged another update, also after a rollback, or has ended."""
    least = steps(folder)
    while run.poll() is None and steps(folder) <= least:
        least = min(least, steps(folder))
        time.sleep(0.1)


def run_with_kills(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run the recipe, kill processes, and return the kills."""
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
        candidates = processes(run.pid)[kind]
        if not candidates:
            continue
        victim = rng.choice(candidates)
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
    """Summarize a finished run."""
    model = folder / "rl2" / "model" / "model.safetensors"
    rows = [row for stage in ("rl1", "rl2") for row in read_jsonl(folder / stage / "metrics.jsonl")]
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
        "stale groups": sum(row["stale/groups"] for row in rows),
        "turns_replayed": sum(row["turns/replayed"] for row in rows),
        "turns_replay_mismatches": sum(row["turns/replay_mismatches"] for row in rows),
        "answers": len(answers(folder)),
        "minutes": round(
            sum(json.loads((folder / "recipe.json").read_text())["seconds"].values()) / 60, 1
        ),
    }


def main() -> None:
    """Run both and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, nargs=2, default=(0.5, 5.0))
    parser.add_argument("--max-lag", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="per phase")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    scale = {"groups": 8, "group_size": 8, "steps": args.steps}
    args.settings += [f"train.max_lag={args.max_lag}"]
    args.settings += [f"recipe.{phase}.train.steps={args.steps}" for phase in ("rl1", "rl2")]
    args.settings += ["recipe.rl2.train.stop_when=''", "recipe.rl2.eval.every=0"]
    args.folder.mkdir(parents=True, exist_ok=True)
    calm, killed = args.folder / "calm", args.folder / "killed"
    with (args.folder / "calm.log").open("a") as log:
        line, env = command(calm, args.settings), counting(calm)
        subprocess.run(line, stdout=log, stderr=log, env=env, check=True)
    kills = run_with_kills(args, killed)
    disturbed, undisturbed = summary(killed), summary(calm)
    print(
        json.dumps(
            {
                "kills": len(kills),
                "by_kind": dict(Counter(kill["kind"] for kill in kills)),
                "same_updates": disturbed["updates"] == undisturbed["updates"],
                "same_weights": disturbed["weights"] == undisturbed["weights"],
                "same_table": disturbed["table"] == undisturbed["table"],
                "unaccounted": unaccounted(killed, scale),
                "repeated_answers_by_kill": repeated_answers(killed, kills),
                "repeated_answers_undisturbed": repeated_answers(calm, []),
                "disturbed": disturbed,
                "undisturbed": undisturbed,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
