"""A member of a broadcast group in a process of its own: `python -m tests.bucket_member ...`.

`learner RANK PORT FOLDER`: one of two ZeRO-3 ranks; rank 0 streams to two receivers.
`receiver RANK FOLDER`: what an engine's worker does.
"""

import json
import os
import sys
import time
from dataclasses import astuple
from pathlib import Path

import torch

from rayrl.weights.broadcast import BroadcastGroup, Rendezvous, open_rendezvous, receive, send
from rayrl.weights.flat import buckets
from tests.learner_rank import config

LIMIT = 136 << 10  # bytes of a bucket
PUSHES = 2


def learner(rank: int, port: int, folder: Path) -> None:
    from rayrl.learner import base
    from rayrl.learner.base import RankInfo
    from rayrl.learner.deepspeed import DeepSpeedLearner
    from rayrl.learner.lora import lazy_weights

    base.BUCKET_BYTES = LIMIT  # of what is gathered at once
    one = DeepSpeedLearner(
        config(3, 2), folder / "model", info=RankInfo(rank, 2, "127.0.0.1", port)
    )
    plan = buckets(((p.name, p.dtype, p.shape) for p in lazy_weights(one.module)), LIMIT)
    whole_at_once = 0

    def watched():  # type: ignore[no-untyped-def]
        nonlocal whole_at_once
        for pair in one.named_weights():
            held = sum(p.numel() * p.element_size() for p in one.module.parameters())
            whole_at_once = max(whole_at_once, held)
            yield pair

    group = None
    if rank == 0:
        rendezvous, store = open_rendezvous("gloo", "127.0.0.1", 3, 60.0)
        (folder / "rendezvous.tmp").write_text(json.dumps([list(astuple(rendezvous)), len(plan)]))
        torch.save(plan, folder / "plan.pt")
        (folder / "rendezvous.tmp").rename(folder / "rendezvous.json")
        group = BroadcastGroup(rendezvous, 0, store)
    digests = []
    for _ in range(PUSHES):
        if group is not None:
            digests.append(send(watched(), plan, group))
        else:
            for _pair in watched():
                pass
    flat, manifest = one.flat_weights()
    if rank == 0:
        torch.save((torch.from_numpy(flat), manifest), folder / "whole.pt")
    result = {"digests": digests, "whole_at_once": whole_at_once, "model": manifest.nbytes}
    (folder / f"learner{rank}.json").write_text(json.dumps(result))


def receiver(rank: int, folder: Path) -> None:
    while not (folder / "rendezvous.json").exists():
        time.sleep(0.05)
    fields, _ = json.loads((folder / "rendezvous.json").read_text())
    plan = torch.load(folder / "plan.pt", weights_only=False)
    group = BroadcastGroup(Rendezvous(*fields), rank)
    digests = []
    for _ in range(PUSHES):
        got: dict[str, torch.Tensor] = {}
        digests.append(receive(plan, group, got.update))
    torch.save(got, folder / f"got{rank}.pt")
    (folder / f"receiver{rank}.json").write_text(json.dumps({"digests": digests}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    role, rank, *rest = sys.argv[1:]
    if role == "learner":
        learner(int(rank), int(rest[0]), Path(rest[1]))
    else:
        receiver(int(rank), Path(rest[0]))
    sys.stdout.flush()
    os._exit(0)  # as in learner_rank.py
