"""Time of one reinforcement-learning step: seconds and share of each stage.

    python benchmarks/rl_step.py runs/tictactoe/rl1       from a run's metrics.jsonl
    python benchmarks/rl_step.py --steps 3 model.path=…   runs that many steps of the main job

The second form trains with the settings of `experiment=tictactoe`, stage rl1, in a temporary
folder; any `key=value` overrides them. The first step is a warm-up and is left out. It also prints
the CPU seconds per step of each process, which `--picture FILE.png` draws (needs matplotlib).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from accounts import Accounts  # in this folder

from rayrl.run.files import read_jsonl

PREFIX = "time/"
WARM_UP = 1
IDLE = "idle or others"


def read(run: Path) -> list[dict[str, float]]:
    """Read the rows of a run's metrics."""
    return read_jsonl(run / "metrics.jsonl")


def table(rows: Sequence[Mapping[str, float]]) -> str:
    """Format the median seconds and share of each stage, and the rates of a step."""
    stages = [key for key in rows[0] if key.startswith(PREFIX) and key != f"{PREFIX}total"]
    total = statistics.median(row[f"{PREFIX}total"] for row in rows)
    lines = [f"{'stage':<10} {'seconds':>8} {'share':>7}"]
    left = total
    for key in stages:
        seconds = statistics.median(row.get(key, 0.0) for row in rows)
        left -= seconds
        lines.append(f"{key.removeprefix(PREFIX):<10} {seconds:>8.2f} {seconds / total:>7.1%}")
    lines.append(f"{'rest':<10} {left:>8.2f} {left / total:>7.1%}")
    lines.append(f"{'step':<10} {total:>8.2f}  (median of {len(rows)} steps)")
    for key, per, name in (
        ("episodes", "time/collect", "episodes per second of rollouts"),
        ("tokens", "time/collect", "sampled tokens per second of rollouts"),
        ("row_tokens", "time/update", "row tokens per second of learning"),
        ("distinct_tokens", "time/update", "distinct tokens per second of learning"),
    ):
        if all(key in row and row.get(per, 0.0) > 0 for row in rows):
            rate = statistics.median(row[key] / row[per] for row in rows)
            lines.append(f"{rate:>10,.0f} {name}")
    return "\n".join(lines)


def train(
    steps: int, settings: Sequence[str], folder: Path
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Run `steps` steps of the main job's first phase.

    Returns:
        Their metrics, and CPU seconds per step by process, those of idle cores included.
    """
    from rayrl.cli import compose
    from rayrl.config import stage_config
    from rayrl.loop import train as run
    from rayrl.run.training import StepControl

    config = compose(["experiment=tictactoe", *settings])
    stage = next(stage for stage in config.recipe if stage.verb == "train")
    config = replace(stage_config(config, stage), recipe=[])
    config = replace(
        config,
        run=replace(config.run, dir=str(folder / "run"), name="rl_step", checkpoint_every=10**6),
        train=replace(config.train, steps=steps + WARM_UP),
    )
    spent: dict[str, float] = {}
    accounts, began = Accounts(), perf_counter()

    def on_step(control: StepControl) -> None:
        nonlocal accounts, began
        if control.step == WARM_UP - 1:
            accounts, began = Accounts(), perf_counter()
        elif control.step == config.train.steps - 1:
            wall, used = perf_counter() - began, accounts.spent()
            used |= {IDLE: wall * (os.cpu_count() or 1) - sum(used.values())}
            spent.update({role: seconds / steps for role, seconds in used.items() if seconds})

    asyncio.run(run(config, on_step=on_step))
    return read(folder / "run")[WARM_UP:], spent


def picture(path: Path, spent: Mapping[str, float]) -> None:
    """Draw CPU seconds per step by process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted(spent, key=lambda role: (role != IDLE, spent[role]))
    whole = sum(spent.values())
    figure, axes = pyplot.subplots(figsize=(7, 3))
    colors = ["lightgray" if name == IDLE else "tab:blue" for name in names]
    bars = axes.barh(names, [spent[name] for name in names], color=colors)
    axes.bar_label(bars, [f" {spent[name] / whole:.1%}" for name in names], fontsize=8)
    axes.set(
        xlabel=f"seconds of {os.cpu_count()} cores per step", xlim=(0, max(spent.values()) * 1.15)
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table of an existing run or of a new one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a training run")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="file to draw into")
    options, settings = parser.parse_known_args()
    if options.run is not None and "=" in str(options.run):
        settings, options.run = [str(options.run), *settings], None
    if options.run is not None:
        print(table(read(options.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, spent = train(options.steps, settings, Path(folder))
    print(table(rows))
    for role, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{role:<20} {seconds:>8.2f} CPU seconds per step")
    if options.picture is not None:
        picture(options.picture, spent)


if __name__ == "__main__":
    main()
