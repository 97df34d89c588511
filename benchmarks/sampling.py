"""Episodes until the main job's second phase reaches a goal, by how its tasks are drawn.

    python benchmarks/sampling.py [--seeds 0 1 2] [--variants uniform refill difficulty replay both]
        [--until 'eval/unbeatable/losing <= 0'] [--every 4] [SETTING ...]

For each seed, run the stages of `experiment=tictactoe` up to the first phase once, then the second
with each variant, from the same model and the same random numbers. The new weights are evaluated
every `--every` steps, and the phase ends with the first evaluation that meets `--until`, which is
written as `train.stop_when`, or after all its steps. Every run is a `rayrl recipe`, so the same
command resumes where it was stopped. Prints per run the episodes played, replaced groups included,
and their ratio to those of `uniform` with the same seed; where a run did not reach the goal, they
are a lower bound (>) of what it takes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from lags import part, row  # in this folder

from rayrl.commands import recipe
from rayrl.config.stop_rule import StopRule, parse_stop_rule
from rayrl.run.files import read_jsonl
from rayrl.run.stage import MODEL

STARTS = ("synth", "sft", "rl1")
PHASE = "rl2"
REPLAY = "train.task_sampling=replay", "train.uniform_share=0.5"
VARIANTS: dict[str, tuple[str, ...]] = {
    "uniform": ("train.refill=1", "train.task_sampling=uniform"),
    "refill": ("train.refill=2", "train.task_sampling=uniform"),
    "difficulty": ("train.refill=1", "train.task_sampling=difficulty"),
    "replay": ("train.refill=1", *REPLAY),
    "both": ("train.refill=2", *REPLAY),  # as in the experiment
}


def compare(
    arguments: argparse.Namespace, rule: StopRule, seed: int, settings: Sequence[str]
) -> dict[str, float]:
    """Run every variant from the seed's start; returns each one's ratio to uniform, if known."""
    own = [f"run.seed={seed}", f"run.name=tictactoe-seed{seed}", *settings]
    start = arguments.out / f"seed{seed}"
    recipe.run(part(own, STARTS, start))
    evaluated = f"train.stop_when='{arguments.until}'", f"eval.every={arguments.every}"
    played: dict[str, float] = {}
    ratios = {}
    for variant in arguments.variants:
        folder = arguments.out / f"{variant}-seed{seed}"
        ours = [f"recipe.{PHASE}.{one}" for one in (*evaluated, *VARIANTS[variant])]
        recipe.run(part([*own, *ours], (PHASE,), folder, str(start / STARTS[-1] / MODEL)))
        steps = list(read_jsonl(folder / PHASE / "metrics.jsonl"))
        values = [step[rule.metric] for step in steps if rule.metric in step]
        played[variant] = sum(step["episodes"] for step in steps)
        reached = rule.is_met(values)
        if reached and "uniform" in played:
            ratios[variant] = played[variant] / played["uniform"]
        cells = [
            str(len(steps)),
            f"{'' if reached else '> '}{played[variant]:.0f}",
            f"{ratios[variant]:.2f}" if variant in ratios else "",
            " ".join(f"{value:g}" for value in values),
            f"{statistics.fmean(step['groups/zero_variance_share'] for step in steps):.2f}",
        ]
        print(row(f"{variant}, {seed}", cells), flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--until", default="eval/unbeatable/losing <= 0")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/sampling"))
    arguments, settings = parser.parse_known_args()
    rule = parse_stop_rule("--until", arguments.until)
    if not isinstance(rule, StopRule):
        parser.error(f"--until {arguments.until!r}: write METRIC >= NUMBER or METRIC <= NUMBER")
    heads = ["steps", "episodes", "of uniform", "evaluations", "groups without spread"]
    print(row("variant, seed", heads))
    print(row("---", ["---:"] * len(heads)))
    found = [compare(arguments, rule, seed, settings) for seed in arguments.seeds]
    for variant in arguments.variants:
        if all(variant in ratios for ratios in found):  # else a run did not reach the goal
            mean = statistics.geometric_mean([ratios[variant] for ratios in found])
            print(row(f"**{variant}**", ["", "", f"{mean:.2f} (geometric mean)", "", ""]))


if __name__ == "__main__":
    main()
