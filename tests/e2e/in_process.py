"""Programs that open Ray themselves, several times; `test_api.py` runs each in its own process."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import rayrl
from rayrl import Agent, Group, LossInputs, LossOutputs, Message, Scores, Task
from rayrl.learner.advantage import AdvantageInputs


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

    @count.check("all letters")
    async def check(new_agent: Callable[[], Agent], args: Mapping[str, object]) -> dict[str, float]:
        agents = [new_agent() for _ in "abcd"]
        asked = zip(agents, "abcd", strict=True)
        replies = await asyncio.gather(*(agent(f"Say {letter}") for agent, letter in asked))
        again = await agents[0].fork()("Once more")
        return {"length": sum(map(len, replies)), "again": sum(map(ord, again))}

    def truncated(inputs: LossInputs) -> LossOutputs:
        ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp().clamp(max=bound)
        return LossOutputs(-ratio * inputs.advantages * inputs.logprobs, {"ratio": ratio})

    def centred(inputs: AdvantageInputs) -> Sequence[Sequence[float]]:
        return [
            [value] * len(turns) for value, turns in zip(inputs.centred, inputs.turns, strict=True)
        ]

    steps, loops = list[int](), set[int]()

    async def on_step(control: rayrl.StepControl) -> None:
        control.evaluate = True
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
    assert loops.isdisjoint({id(asyncio.get_running_loop())}), "the caller's own loop only waits"
    assert run.path == Path("runs/cell")
    (run.path / "result.json").unlink()  # killed before it could write it
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
    assert "Tasks: the environment's own evaluation tasks." in str(found)
    assert 0 <= found.statistics["n"].value <= 1  # type: ignore[union-attr]
    checked = {key: run.metrics[1][f"eval/all_letters/{key}"] for key in ("length", "again")}
    assert found.result.checks == {"all letters": checked}, "as in training: the same weights"

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


RIVALS = """
import functools

@functools.cache  # stays with its module, so that what travels is the module's name
def shouted(text):
    return text.upper()

def shouts(messages, rng):
    return shouted(messages[-1].content)

async def draws(messages, rng):
    return f"{messages[-1].content} {rng.random()}"
"""


async def test_players_from_outside_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By module, by file and by value; a run that broke resumes to what an unbroken one gives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "zz_rivals.py").write_text(RIVALS)
    ending = "!"

    @rayrl.env(tasks=[Letter(letter=c) for c in "abcd"], rewards={"n": 1.0})
    async def passed_on(
        task: Letter, agent: Agent, first: Agent, second: Agent, third: Agent
    ) -> Mapping[str, Scores]:
        said = await third(await second(await first(f"say {task.letter}")))
        reply = await agent(said)
        score = {"n": sum(map(str.isalpha, reply)) / max(len(reply), 6)}
        return dict.fromkeys(("agent", "first", "second", "third"), score)

    def ends(messages: Sequence[Message], rng: random.Random) -> str:
        return messages[-1].content + ending

    class Broken(Exception):
        pass

    def breaks(control: rayrl.StepControl) -> None:
        if control.step == 1:
            raise Broken

    seats = {"first": "zz_rivals:draws", "second": "zz_rivals.py:shouts", "third": ends}

    def train(folder: str, on_step: Callable[[rayrl.StepControl], None] | None = None) -> rayrl.Run:
        settings = {
            "run.dir": folder,  # not `name`, on which the seeds depend
            "train.groups": 2,
            "train.group_size": 4,
            "sampling.max_tokens": 8,
            "learner.kind": "reference",
            "run.checkpoint_every": 1,
            "run.episodes_every": 1,
        }
        return rayrl.train(env=passed_on, steps=2, seats=seats, settings=settings, on_step=on_step)

    whole = train("whole")
    with pytest.raises(Broken):
        train("broken", breaks)
    resumed = train("broken")
    assert [row["step"] for row in resumed.metrics] == [0, 1]
    assert all(row["grad_norm"] > 0 for row in resumed.metrics)
    one, other = (run.model_path / "model.safetensors" for run in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()
    heard = [episode.turns_of("agent")[0].prompt[-1].content for episode in resumed.episodes()]
    assert len(heard) == 16
    assert all(re.fullmatch(r"SAY [ABCD] 0\.\d+(E-\d+)?!", text) for text in heard)
    assert resumed.config.env.seats["third"] == "object:ends"

    settings = {"env.held_out": 0.5}
    found = rayrl.evaluate(env=passed_on, player=ends, seats=seats, episodes=2, settings=settings)
    assert "| ends |" in str(found)
    assert {episode.turns_of("agent")[0].text[-2:] for episode in found.episodes()} == {"!!"}
    made = rayrl.synth(env=passed_on, player=ends, seats=seats, episodes=2)
    assert {episode.turns_of("agent")[0].text[-2:] for episode in made.episodes()} == {"!!"}
