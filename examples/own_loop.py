"""A training loop of your own, with your own advantage and your own loss.

    python examples/own_loop.py                 # half a minute on two CPU cores

rayrl plays, packs batches, updates the model and sends new weights to the replicas; what is
compared with what, what is minimised, and when, is up to you.
"""

# %%
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import rayrl
from rayrl import Group, LossInputs, LossOutputs


@dataclass(frozen=True, kw_only=True)
class Letter(rayrl.Task):
    """Write this letter, and nothing else."""

    letter: str


def letters(seed: int, u: float) -> Letter:
    """One of four letters."""
    return Letter(seed=seed, letter="abcd"[int(4 * u)])


@rayrl.env(tasks=letters, rewards={"right": 1.0})
async def repeat(task: Letter, agent: rayrl.Agent) -> rayrl.Scores:
    """Score the share of the reply's characters that are the letter."""
    reply = await agent(f"Say {task.letter}")
    return {"right": reply.count(task.letter) / max(len(reply), 6)}


# %% One number per episode: how much better than its siblings it was, by rank.
def by_rank(groups: Sequence[Group]) -> list[list[float]]:
    """Ranks from -1 to 1; equal rewards share the mean of their ranks."""
    found = []
    for group in groups:
        rewards = [episode.rewards["agent"] for episode in group.episodes]
        ranks = [sum((r > q) - (r < q) for q in rewards) for r in rewards]
        found.append([rank / max(len(rewards) - 1, 1) for rank in ranks])
    return found


# %% REINFORCE with the ratio as a weight; what it returns besides is logged as loss/NAME.
def weighted_reinforce(inputs: LossInputs) -> LossOutputs:
    """-min(ratio, 2) * advantage * logprob, per token: tensors of shape (N,)."""
    ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp().clamp(max=2.0)
    return LossOutputs(-ratio * inputs.advantages * inputs.logprobs, {"weight": ratio})


# %%
async def main() -> list[float]:
    """Train, and return the mean reward of every step."""
    rewards = []
    settings = {
        "train.groups": 4,
        "train.group_size": 32,
        "sampling.max_tokens": 12,
        "learner.kind": "reference",
        "learner.lr": 1e-3,
    }
    async with rayrl.open_training(
        env=repeat, model="embedded", steps=20, name="example-loop", settings=settings
    ) as t:
        for step in range(t.start, t.steps):
            groups = await t.collect(step)
            batch = rayrl.make_batch(groups, by_rank(groups))
            learned = await t.learner.step(batch, loss=weighted_reinforce)
            await t.push(step + 1)
            await t.end_step(step, batch, learned)  # logs it, and makes checkpoints
            episodes = [episode for group in groups for episode in group.episodes]
            rewards.append(statistics.fmean(episode.rewards["agent"] for episode in episodes))
        await t.finish()  # writes runs/example-loop/model
    return rewards


# %% In a notebook: rewards = await main()
if __name__ == "__main__":
    rewards = asyncio.run(main())
    print("reward:", " ".join(f"{reward:.2f}" for reward in rewards))
