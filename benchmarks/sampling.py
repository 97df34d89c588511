"""Episodes until the main job reaches a score, with refill, difficulty-aware sampling, and both.

    python benchmarks/sampling.py [--seeds 0 1 2] [--variants uniform refill difficulty both]
        [--phases rl1 rl2] [--metric eval/optimal/win] [--score 0.49] [--every 5] [SETTING ...]

For each seed, run the stages of `experiment=tictactoe` before the first of `--phases` once, then
the phases with each variant, from the same model and the same random numbers. The new weights are
evaluated every `--every` steps, and the score is reached at the first of two evaluations in a row
that have it. Every run is a `rayrl recipe`, so the same command resumes where it was stopped, and
with another `--score` it only prints. Prints per run the episodes played, replaced groups included,
up to that evaluation, and their ratio to those of `uniform` with the same seed. A smaller job:
`train.groups=16 learner.world_size=1 cluster.replicas=1`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lags import part, row  # in this folder

from rayrl.commands import recipe
from rayrl.run.files import read_jsonl
from rayrl.run.stage import MODEL

STAGES = ("synth", "sft", "rl1", "rl2")
VARIANTS: dict[str, tuple[str, ...]] = {  # settings of each phase
    "uniform": ("train.refill=1",),
    "refill": ("train.refill=3",),
    "difficulty": ("train.refill=1", "train.task_sampling=difficulty"),
    "both": ("train.refill=3", "train.task_sampling=difficulty"),
}
IN_A_ROW = 2  # evaluations that must have the score


def steps_of(folder: Path, phases: Sequence[str]) -> list[Mapping[str, Any]]:
    """The metrics of every step of the phases that were run, one after the other."""
    files = [folder / phase / "metrics.jsonl" for phase in phases]
    return [step for file in files for step in read_jsonl(file)]


def episodes_until(steps: Sequence[Mapping[str, Any]], metric: str, score: float) -> float:
    """Episodes up to the first of two evaluations in a row that reach the score; else infinite."""
    played, evaluated = 0.0, []
    for step in steps:
        played += step["episodes"]
        if metric in step:
            evaluated.append((played, step[metric] >= score))
    for k in range(len(evaluated) - IN_A_ROW + 1):
        if all(reached for _, reached in evaluated[k : k + IN_A_ROW]):
            return evaluated[k][0]
    return math.inf


def compare(arguments: argparse.Namespace, seed: int, settings: Sequence[str]) -> dict[str, float]:
    """Run every variant from the seed's start; returns the episodes each of them took."""
    own = [f"run.seed={seed}", *settings]
    before = STAGES[: STAGES.index(arguments.phases[0])]
    start = arguments.out / f"seed{seed}"
    recipe.run(part([*own, f"run.name=start-{seed}"], before, start))
    metric, score = arguments.metric, arguments.score
    evaluated = [
        f"run.name=phases-{seed}",  # fixes the random numbers, so all variants have the same
        *(f"recipe.{phase}.eval.every={arguments.every}" for phase in arguments.phases),
        *(f"recipe.{phase}.eval.episodes=400" for phase in arguments.phases),
    ]
    found = {}
    for variant in arguments.variants:
        folder = arguments.out / f"{variant}-seed{seed}"
        varied = [
            f"recipe.{phase}.{setting}"
            for phase in arguments.phases
            for setting in VARIANTS[variant]
        ]
        ours = [*own, *evaluated, *varied]
        recipe.run(part(ours, arguments.phases, folder, str(start / before[-1] / MODEL)))
        steps = steps_of(folder, arguments.phases)
        found[variant] = episodes_until(steps, metric, score)
        best = max(step[metric] for step in steps if metric in step)
        without_spread = statistics.fmean(step["groups/zero_variance_share"] for step in steps)
        ratio = found[variant] / found.get("uniform", math.nan)
        cells = [f"{found[variant]:.0f}", f"{ratio:.2f}", f"{best:.3f}", f"{without_spread:.2f}"]
        print(row(f"{variant}, {seed}", cells), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--phases", nargs="+", choices=("rl1", "rl2"), default=["rl1", "rl2"])
    parser.add_argument("--metric", default="eval/optimal/win")
    parser.add_argument("--score", type=float, default=0.49)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/sampling"))
    arguments, settings = parser.parse_known_args()
    print(row("variant, seed", ["episodes", "of uniform", "best", "groups without spread"]))
    print(row("---", ["---:"] * 4))
    found = [compare(arguments, seed, settings) for seed in arguments.seeds]
    for variant in arguments.variants:
        ratios = [one[variant] / one.get("uniform", math.nan) for one in found]
        known = all(0 < ratio < math.inf for ratio in ratios)  # else a run did not reach the score
        mean = f"{statistics.geometric_mean(ratios):.2f} (geometric mean)" if known else "–"
        print(row(f"**{variant}**", ["", mean, "", ""]))


if __name__ == "__main__":
    main()
