"""Log-probabilities and entropies by blocks against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rayrl.learner import logits as module
from rayrl.learner.logits import _add_in_place, chosen_logprobs

SLOT = torch.tensor([4, 0, 4, 2, 6, 4])  # repeated, in no order; rows 1, 3 and 5 predict nothing
TARGET = torch.tensor([0, 10, 3, 3, 7, 0])
WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.25, -0.75, 1.5])


def reference(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = (logits / temperature).log_softmax(-1)[SLOT]  # (N, V)
    chosen = logprobs.gather(1, TARGET[:, None])[:, 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)  # p = 1/4, 3/4
    one = torch.tensor([0])
    chosen, entropy = chosen_logprobs(logits, one, torch.tensor([1]), 1.0, entropy_gradient=True)
    assert chosen.item() == pytest.approx(math.log(0.75))
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy.item() == pytest.approx(h)
    (of_chosen,) = torch.autograd.grad(chosen.sum(), logits, retain_graph=True)
    assert of_chosen.tolist() == [pytest.approx([-0.25, 0.25])]
    (of_entropy,) = torch.autograd.grad(entropy.sum(), logits)
    slope = -0.25 * (math.log(0.25) + h)
    assert of_entropy.tolist() == [pytest.approx([slope, -slope])]


@pytest.mark.parametrize("block", [1, 22, 33, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(
    block: int,
    temperature: float,
    entropy_coef: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(module.BLOCK, "cpu", block)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 11, generator=generator)).to(dtype).requires_grad_()
    before = logits.detach().clone()
    exact = logits.detach().double().requires_grad_()
    bonus = entropy_coef > 0
    chosen, entropy = chosen_logprobs(logits, SLOT, TARGET, temperature, entropy_gradient=bonus)
    assert chosen.dtype == entropy.dtype == torch.float32
    assert entropy.requires_grad == bonus
    wanted, wanted_entropy = reference(exact, temperature)
    torch.testing.assert_close(chosen.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), wanted_entropy, rtol=1e-5, atol=1e-5)
    (chosen @ WEIGHTS + entropy_coef * (entropy @ WEIGHTS.flip(0))).backward()
    (
        wanted @ WEIGHTS.double() + entropy_coef * (wanted_entropy @ WEIGHTS.flip(0).double())
    ).backward()
    assert logits.grad is not None
    assert exact.grad is not None
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5  # of the gradient as it is stored
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=1e-5)
    assert torch.equal(logits.detach(), before)  # nothing was worked on in place
    assert not logits.grad[[1, 3, 5]].any()


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 6), slice(6, 7)])
def test_the_way_of_gpus_adds_each_gradient_in_its_block(rows: slice) -> None:
    added = torch.zeros(7, 11)
    for slot, target, weight in zip(SLOT, TARGET, WEIGHTS, strict=True):
        added[slot, target] += weight
    assert added[4, 0] == 2.0  # 0.5 and 1.5 meet
    block = torch.full((rows.stop - rows.start, 11), 0.25)
    _add_in_place(block, SLOT - rows.start, TARGET, WEIGHTS)
    assert torch.equal(block, added[rows] + 0.25)
