"""One rank of the two-rank tests: `python -m tests.learner_rank RANK PORT FOLDER`."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rayrl.config import AlgoConfig, Config, LearnerConfig
from rayrl.learner.batch import Batch, batch_of, shard
from tests.learner_rows import UPDATES, make_rows

SEVERAL = {"epochs": 2, "minibatches": 2}


def config(stage: int, world_size: int, **algo: object) -> Config:
    learner = LearnerConfig(zero_stage=stage, world_size=world_size, micro_batch_tokens=96)
    return Config(learner=learner, algo=replace(AlgoConfig(), **algo))


def main(rank: int, port: int, folder: Path) -> None:
    from rayrl.learner.base import RankInfo
    from rayrl.learner.deepspeed import DeepSpeedLearner

    def learner(stage: int, **algo: object) -> DeepSpeedLearner:
        cfg = config(stage, 2, **algo)
        return DeepSpeedLearner(cfg, folder / "model", info=RankInfo(rank, 2, "127.0.0.1", port))

    for stage in range(4):
        one = learner(stage)
        for seed in range(UPDATES):
            mine = shard(batch_of(make_rows(seed)), rank, 2)
            metrics = one.step(mine.rows, mine.totals)
        assert one.steps == UPDATES
        flat, _ = one.flat_weights()

        # A non-finite loss on one rank alone must stop both, and nothing may change.
        bad = batch_of(make_rows(9))
        poisoned = [replace(r, advantages=r.advantages * np.nan) for r in bad.rows[:1]]
        rows = poisoned if rank == 1 else list(bad.rows[1:])
        skipped = one.step(rows, bad.totals)
        assert (skipped["skipped"], skipped["updates"]) == (1, 0), skipped
        assert (one.flat_weights()[0] == flat).all()

        # One rank without a row, and a batch without any.
        everything = bad.rows if rank == 0 else ()
        assert one.step(everything, bad.totals)["updates"] == 1
        before = one.flat_weights()[0]
        assert one.step((), bad.totals)["updates"] == 0
        assert (one.flat_weights()[0] == before).all()
        assert len(one.logprobs(everything)) == len(everything)

        # Saved and loaded, it goes on exactly.
        one.save(folder / f"save{stage}")
        mine = shard(batch_of(make_rows(3)), rank, 2)
        one.step(mine.rows, mine.totals)
        unbroken = one.flat_weights()[0]
        two = learner(stage)
        two.load(folder / f"save{stage}")
        two.step(mine.rows, mine.totals)
        assert (two.flat_weights()[0] == unbroken).all()
        two.export(folder / f"export{stage}")
        if rank == 0:
            np.save(folder / f"stage{stage}.npy", flat)
            np.save(folder / f"norm{stage}.npy", metrics["grad_norm"])

    # The minibatches are those of one rank.
    one = learner(1, **SEVERAL)
    for seed in range(UPDATES):
        mine = shard(batch_of(make_rows(seed)), rank, 2, SEVERAL["minibatches"])
        assert one.step(mine.rows, mine.totals)["updates"] == 4
    flat, _ = one.flat_weights()
    if rank == 0:
        np.save(folder / "minibatches.npy", flat)

    # Several updates a step: proximal log-probabilities are a collective under ZeRO 3.
    many = learner(3, **SEVERAL)
    uneven: Batch = batch_of(make_rows(0))
    rows = uneven.rows if rank == 0 else ()
    assert many.step(rows, uneven.totals)["updates"] == 4
    many.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # Everything is checked by now. An orderly exit aborts now and then (torch 2.13, gloo): a thread
    # of C++ is still there when what it belongs to is torn down.
    sys.stdout.flush()
    os._exit(0)
