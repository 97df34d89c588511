"""Peak memory of a run by process, beside what `rayrl plan` estimates at most.

    python benchmarks/memory.py recipe experiment=tictactoe
    python benchmarks/memory.py train experiment=reverse_text_smollm2 train.steps=3

Runs `rayrl VERB` with these settings in a temporary folder. Memory is the proportional set size,
which counts once what processes share, at the moment of the largest sum; sampled every second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from accounts import role_of  # in this folder

from rayrl.cli import compose
from rayrl.cluster.memory import Share, shares
from rayrl.report.memory import memory_of
from rayrl.run.start_check import LEARNING, has_replicas, stages_of

GIB = 2**30


def sample(driver: psutil.Process) -> Counter[str]:
    """GiB by role of the process and its descendants."""
    found: Counter[str] = Counter()
    workers: set[int] = set()
    try:
        processes = [driver, *driver.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            role = role_of(process, driver.pid, workers)
            found[role] += memory_of(process) / GIB
        except psutil.Error:
            continue
        if role in ("env worker", "programs"):
            workers.add(process.pid)
    return found


def estimate(verb: str, settings: list[str]) -> list[Share]:
    """Of the largest stage."""
    config = compose(settings)
    stages = stages_of(config) if verb == "recipe" else [("", verb, config)]
    found = [
        shares(stage, learns=verb in LEARNING, plays=has_replicas(stage, verb))
        for _, verb, stage in stages
    ]
    return max(found, key=lambda one: sum(share.gb for share in one))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=["recipe", "train", "sft", "eval", "synth"])
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    for share in (shown := estimate(options.verb, options.settings)):
        print(f"estimated {share.name:<20} {share.gb:>6.2f} GiB")
    print(f"estimated {'in all':<20} {sum(share.gb for share in shown):>6.2f} GiB")
    peak: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rayrl", options.verb, *options.settings]
        run = subprocess.Popen([*command, f"run.dir={Path(folder) / 'run'}"], stdout=sys.stderr)
        driver = psutil.Process(run.pid)
        while run.poll() is None:
            found = sample(driver)
            if found.total() > peak.total():
                peak = found
            time.sleep(1)
    for role, gib in peak.most_common():
        print(f"measured  {role:<20} {gib:>6.2f} GiB")
    print(f"measured  {'in all':<20} {peak.total():>6.2f} GiB")
    raise SystemExit(run.returncode)


if __name__ == "__main__":
    main()
