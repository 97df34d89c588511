"""Train a model on an environment that is defined right here: in a script, or in a notebook cell.

    python examples/own_environment.py          # a minute on two CPU cores

Lines with `# %%` begin a cell in editors that know them (VS Code, PyCharm, jupytext).
"""

# %% An environment is a coroutine: it plays one task with an agent and returns scores.
import random
from collections.abc import Sequence
from dataclasses import dataclass

import rayrl


@dataclass(frozen=True, kw_only=True)
class Letter(rayrl.Task):
    """Write this letter, and nothing else."""

    letter: str


def letters(seed: int, u: float) -> Letter:
    """One of four letters; `u` in [0, 1) covers them evenly."""
    return Letter(seed=seed, letter="abcd"[int(4 * u)])


@rayrl.env(tasks=letters, rewards={"right": 1.0})
async def repeat(task: Letter, agent: rayrl.Agent) -> rayrl.Scores:
    """Score the share of the reply's characters that are the letter."""
    reply = await agent(f"Say {task.letter}")
    return {"right": reply.count(task.letter) / max(len(reply), 6)}


@repeat.player("perfect")
def perfect(messages: Sequence[rayrl.Message], rng: random.Random) -> str:
    """A scripted player, to compare with."""
    return messages[-1].content[-1] * 6


# %% Train on it. The environment travels to Ray's workers by value.
STEPS = 30
run = rayrl.train(
    env=repeat,
    model="embedded",  # the small model that ships with rayrl
    steps=STEPS,
    name="example-environment",
    settings={
        "train.groups": 4,
        "train.group_size": 32,
        "sampling.max_tokens": 12,
        "learner.kind": "reference",
        "learner.lr": 1e-3,
    },
    loggers=[lambda step, metrics: print(f"step {step}: reward {metrics['reward']:.2f}")],
)

# %% Look at what it did.
print(f"reward {run.metrics[0]['reward']:.2f} to {run.metrics[-1]['reward']:.2f}")
print("the best step was", run.best("reward")["step"], "and the model is in", run.model_path)
for step in (0, STEPS - 1):
    print(f"step {step}:", [episode.turns[0].text for episode in run.episodes(step)][::32])

# %% Evaluate it beside the scripted player, on tasks of other seeds.
for player in ("perfect", "model"):
    print(
        rayrl.evaluate(
            env=repeat,
            player=player,
            model=run.model_path,
            episodes=20,
            name=f"example-environment-{player}",
            settings={"sampling.max_tokens": 12},
        )
    )
