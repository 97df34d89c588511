"""Weights streamed in buckets between real processes over gloo: what NCCL does between GPUs."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayrl.errors import DataError, InfraError
from rayrl.weights.broadcast import BroadcastGroup, Rendezvous, open_rendezvous, receive, send
from rayrl.weights.flat import Manifest, buckets, unflatten
from tests.apart import free_port
from tests.bucket_member import LIMIT
from tests.runs import ROOT


def tensors(n: int = 12) -> list[tuple[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.bfloat16)
    return [
        (f"t{k}", torch.randn(3, 50 + 17 * k, generator=rng).to(kinds[k % 2])) for k in range(n)
    ]


def plan_of(pairs: list[tuple[str, torch.Tensor]], limit: int) -> tuple[Manifest, ...]:
    return buckets([(n, t.dtype, tuple(t.shape)) for n, t in pairs], limit)


def connected_pair(timeout_s: float = 30.0) -> tuple[BroadcastGroup, BroadcastGroup]:
    """Sender and receiver of a broadcast group in this process."""
    rendezvous, store = open_rendezvous("gloo", "127.0.0.1", 2, timeout_s)
    ends: list[Any] = [None, None]
    other = threading.Thread(target=lambda: ends.__setitem__(1, BroadcastGroup(rendezvous, 1)))
    other.start()
    ends[0] = BroadcastGroup(rendezvous, 0, store)
    other.join()
    return ends[0], ends[1]


@pytest.mark.parametrize("limit", [1, 1000, 10**9])
def test_weights_arrive_bit_for_bit(limit: int) -> None:
    pairs = tensors()
    plan = plan_of(pairs, limit)
    sender, receiver = connected_pair()
    got: dict[str, torch.Tensor] = {}
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(receive(plan, receiver, got.update)))
    thread.start()
    digest = send(pairs, plan, sender)
    thread.join()
    assert found == [digest]
    assert list(got) == [name for name, _ in pairs]
    assert all(torch.equal(got[name], tensor) for name, tensor in pairs)
    changed = [(n, t.clone()) for n, t in pairs]
    changed[7][1].view(-1)[3] += 1
    thread = threading.Thread(target=lambda: found.append(receive(plan, receiver, got.update)))
    thread.start()
    assert send(changed, plan, sender) != digest
    thread.join()


def test_weights_that_do_not_match_the_plan_are_refused_before_they_are_sent() -> None:
    pairs = tensors(3)
    plan = plan_of(pairs, 10**9)
    sender, _ = connected_pair()
    for wrong, message in (
        (pairs[:2], r"the plan has t2 .* sent nothing"),
        ([pairs[1], pairs[0], pairs[2]], r"t0 \(3, 50\) float32, but .* t1 \(3, 67\) bfloat16"),
    ):
        with pytest.raises(DataError, match=message):
            send(wrong, plan, sender)


def _vanish(fields: list[Any], plan: Any) -> None:
    BroadcastGroup(Rendezvous(*fields), 1).broadcast(torch.empty(plan[0].nbytes, dtype=torch.uint8))
    # the process exits before the second bucket


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_member_fails_the_push_within_its_deadline(how: str) -> None:
    pairs = tensors()
    plan = plan_of(pairs, 1)
    if how == "hangs":
        sender, receiver = connected_pair(timeout_s=1.0)
        with pytest.raises(InfraError, match="weight broadcast failed"):
            receive(plan, receiver, lambda _: None)  # nothing is sent
        return
    rendezvous, store = open_rendezvous("gloo", "127.0.0.1", 2, 600.0)
    other = multiprocessing.get_context("spawn").Process(
        target=_vanish, args=(list(astuple(rendezvous)), plan)
    )
    other.start()
    sender = BroadcastGroup(rendezvous, 0, store)

    def send_on() -> None:
        for _ in range(100):  # the first sends may only fill the socket's buffer
            send(pairs, plan, sender)

    with pytest.raises(InfraError, match="weight broadcast failed"):
        send_on()
    other.join()


def test_joining_times_out_without_the_other_members() -> None:
    rendezvous, store = open_rendezvous("gloo", "127.0.0.1", 2, 1.0)
    with pytest.raises(InfraError, match=r"rank 0 of 2 could not join .* within 1 s"):
        BroadcastGroup(rendezvous, 0, store)


@pytest.mark.slow
def test_two_zero3_ranks_stream_to_two_receivers_and_no_rank_holds_the_model(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
    settings = LlamaConfig(vocab_size=512, num_hidden_layers=6, **shape)  # 1.8 MB in fp32
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "model")
    port = free_port()
    commands = [
        ["learner", "0", str(port), str(tmp_path)],
        ["learner", "1", str(port), str(tmp_path)],
        ["receiver", "1", str(tmp_path)],
        ["receiver", "2", str(tmp_path)],
    ]
    members = [
        subprocess.Popen([sys.executable, "-m", "tests.bucket_member", *arguments], cwd=ROOT)
        for arguments in commands
    ]
    try:
        assert [member.wait(timeout=600) for member in members] == [0] * 4
    finally:
        for member in members:
            member.kill()
    ranks = [json.loads((tmp_path / f"learner{k}.json").read_text()) for k in (0, 1)]
    first, second = ranks[0]["digests"]
    assert first == second, "equal weights have equal checksums"
    plan = torch.load(tmp_path / "plan.pt", weights_only=False)
    assert len(plan) > 10
    assert max(manifest.nbytes for manifest in plan) <= LIMIT
    for rank in ranks:  # at most LIMIT bytes are gathered at once
        assert 0 < rank["whole_at_once"] <= LIMIT < rank["model"] / 10
    flat, manifest = torch.load(tmp_path / "whole.pt", weights_only=False)
    wanted = unflatten(flat.numpy(), manifest)
    for k in (1, 2):
        found = json.loads((tmp_path / f"receiver{k}.json").read_text())
        assert found["digests"] == [first, second]
        got = torch.load(tmp_path / f"got{k}.pt")
        assert list(got) == list(wanted)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
