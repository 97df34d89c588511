"""The Python API on Ray, and the examples as a user runs them."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import rayrl
from rayrl import Agent, Group, LossInputs, LossOutputs, Scores, Task
from rayrl.learner.advantage import AdvantageInputs

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ("own_environment", r"reward 0\.\d\d to 0\.\d\d\n.*\| perfect \| 1\.000"),
        ("endpoint", r"10 of 100, held out.*'What is \d \+ \d\? .*'calculator|server calls"),
        ("own_loop", r"reward: "),
    ],
)
def test_an_example_runs(example: str, says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{example}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout, re.DOTALL), done.stdout
    if example == "own_loop":  # and it learns
        first, *_, last = map(float, done.stdout.rpartition("reward: ")[2].split())
        assert last > first + 0.3


@dataclass(frozen=True, kw_only=True)
class Letter(Task):
    letter: str = "a"


async def test_a_run_from_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a running event loop: environment, loss, advantage, logger and callback by value."""
    monkeypatch.chdir(tmp_path)
    bound = 5.0
    eval_tasks = [Letter(seed=7, letter="z")]

    @rayrl.env(tasks=[Letter(letter=c) for c in "abcd"], eval_tasks=eval_tasks, rewards={"n": 1.0})
    async def count(task: Letter, agent: Agent) -> Scores:
        reply = await agent(f"Say {task.letter}")
        return {"n": reply.count(task.letter) / max(len(reply), 6)}

    def truncated(inputs: LossInputs) -> LossOutputs:
        ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp().clamp(max=bound)
        return LossOutputs(-ratio * inputs.advantages * inputs.logprobs, {"ratio": ratio})

    def centred(inputs: AdvantageInputs) -> Sequence[Sequence[float]]:
        return [
            [value] * len(turns) for value, turns in zip(inputs.centred, inputs.turns, strict=True)
        ]

    steps, loops = list[int](), set[int]()

    async def on_step(control: rayrl.StepControl) -> None:
        control.evaluate = control.step == 0
        control.stop = control.step == 1
        if control.step == 1:
            assert control.evaluations.keys() == {0}
        loops.add(id(asyncio.get_running_loop()))

    def log(step: int, metrics: Mapping[str, float]) -> None:
        assert metrics["loss/ratio"] == pytest.approx(1.0, abs=0.1)
        steps.append(step)

    settings = {
        "train.groups": 2,
        "train.group_size": 4,
        "sampling.max_tokens": 8,
        "learner.kind": "reference",
        "eval.episodes": 2,
    }
    run = rayrl.train(
        env=count,
        steps=9,
        name="cell",
        settings=settings,
        loss=truncated,
        advantage=centred,
        loggers=[log],
        on_step=on_step,
    )
    assert steps == [0, 1] == [row["step"] for row in run.metrics]
    assert 0 <= run.metrics[0]["eval/reward"] == run.metrics[0]["eval/n"] <= 1
    assert "eval/reward" not in run.metrics[1]
    assert loops.isdisjoint({id(asyncio.get_running_loop())}), "the caller's own loop only waits"
    assert run.path == Path("runs/cell")
    again = rayrl.train(env=count, steps=9, name="cell", settings=settings, loss=truncated,
                        advantage=centred)  # fmt: skip
    assert len(again.metrics) == 2, "it was stopped, and that is its end"
    assert (run.model_path / "model.safetensors").is_file()
    played = {episode.task.letter for episode in run.episodes()}  # type: ignore[attr-defined]
    assert played <= set("abcd")

    found = await rayrl.evaluate_async(
        env=count,
        model=run.model_path,
        episodes=2,
        name="found",
        settings={"sampling.max_tokens": 8},
    )
    assert {episode.task for episode in found.episodes()} == {*eval_tasks}
    assert "Tasks: the environment's eval_tasks." in str(found)
    assert 0 <= found.statistics["n"].value <= 1  # type: ignore[union-attr]

    groups: list[Group] = []
    async with rayrl.open_training(env=count, steps=2, name="own", settings=settings) as training:
        assert (training.start, training.steps) == (0, 2)
        groups += await training.collect(0)
        batch = rayrl.make_batch(groups, rayrl.advantages(groups, training.config.algo))
        learned = await training.learner.step(batch, loss="grpo")
        await training.push(1)
        await training.end_step(0, batch, learned)
        await training.checkpoint(1)
    assert len(groups) == 2
    async with rayrl.open_training(env=count, steps=2, name="own", settings=settings) as training:
        assert training.start == 1, "it resumes from its checkpoint"
        await training.finish()  # early
    run = rayrl.train(env=count, steps=2, name="own", settings=settings)
    assert [row["step"] for row in run.metrics] == [0, 1], "the rest"
