"""Quality with rollouts during learning: the main job's phases at several lags and seeds.

    python benchmarks/lags.py [--lags 0 1 4] [--seeds 0 1 2] [--out runs/lags] [SETTING ...]

For each seed, run the teacher's games and the warm start of `experiment=tictactoe` once, then both
phases of reinforcement learning and the last evaluation with each `train.max_lag`. Every run is a
`rayrl recipe`, so the same command resumes where it was stopped. Prints a row per run, and per lag
the mean over the seeds with the 95% interval of Student's t, which is wide for three seeds. Seconds
include the effect of other load on the machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rayrl.cli import compose
from rayrl.commands import recipe
from rayrl.commands.evaluate import FILE
from rayrl.config import Config
from rayrl.report.table import Result
from rayrl.run.files import read_jsonl
from rayrl.run.stage import MODEL

# Student's t, two-sided 95%, by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
PHASES = ("rl1", "rl2", "eval_rl2")
ALL_STEPS = ("recipe.rl2.train.stop_when=''", "recipe.rl2.eval.every=0")  # however well it plays
STATISTICS = ("win", "draw", "loss", "drawn", "losing", "lag", "stale groups", "seconds")


def part(settings: Sequence[str], stages: Sequence[str], folder: Path, model: str = "") -> Config:
    """Configure the main job with only `stages`, in `folder`, starting from `model`.

    It makes all its steps.
    """
    whole = compose(
        ["experiment=tictactoe", f"run.dir={folder}", *ALL_STEPS, *settings], verb="recipe"
    )
    kept = [stage for stage in whole.recipe if stage.name in stages]
    config = replace(whole, recipe=kept)
    return replace(config, model=replace(config.model, path=model)) if model else config


def statistics_of(folder: Path) -> dict[str, float]:
    """Return a run's results: shares in percent, losing lines, lag and seconds."""
    result = Result.load(folder / PHASES[-1] / FILE)
    shares = {
        name: result.cells[name].statistics["win/draw/loss"] for name in ("random", "optimal")
    }
    values = {name: share.to_dict()["shares"] for name, share in shares.items()}
    steps = [row for phase in PHASES[:2] for row in read_jsonl(folder / phase / "metrics.jsonl")]
    return {
        **{name: 100 * values["random"][name]["value"] for name in ("win", "draw", "loss")},
        "drawn": 100 * values["optimal"]["draw"]["value"],
        "losing": result.checks["unbeatable"]["losing"],
        "lag": statistics.mean(step["lag/mean"] for step in steps),
        "stale groups": sum(step["stale/groups"] for step in steps),
        "seconds": sum(step["time/total"] for step in steps),
    }


def row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def interval(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/lags"))
    arguments, settings = parser.parse_known_args()
    for seed in arguments.seeds:
        own = [f"run.seed={seed}", *settings]
        start = arguments.out / f"seed{seed}"
        recipe.run(part([*own, f"run.name=lags-{seed}"], ("synth", "sft"), start))
        for lag in arguments.lags:
            lagged = [*own, f"run.name=lag{lag}-{seed}", f"train.max_lag={lag}"]
            folder = arguments.out / f"lag{lag}-seed{seed}"
            recipe.run(part(lagged, PHASES, folder, str(start / "sft" / MODEL)))
    print(row("lag, seed", STATISTICS))
    print(row("---", ["---:"] * len(STATISTICS)))
    for lag in arguments.lags:
        runs = [statistics_of(arguments.out / f"lag{lag}-seed{seed}") for seed in arguments.seeds]
        for seed, values in zip(arguments.seeds, runs, strict=True):
            print(row(f"{lag}, {seed}", [f"{values[name]:.1f}" for name in STATISTICS]))
        whole = [interval([values[name] for values in runs]) for name in STATISTICS]
        print(row(f"**{lag}**", whole))


if __name__ == "__main__":
    main()
