"""Logits of packed rows, and the log-probabilities and entropies that they give.

A trie of rows is exact because attention can be told which tokens a token sees. A convolution or a
recurrence along the sequence cannot: it would mix the end of one row into the beginning of the
next. Nor does the trie's attention know chunks or biases by distance, or windows unless on a GPU.
Such models (LFM2, Mamba and hybrids of both, Llama 4, Mistral beyond its window on a CPU) compute
each row by itself, with their own attention, padded on the right, where nothing that counts can see
the padding. Prefixes are not shared then. `probe.py` finds out which model is which.

Log-probabilities are computed without a second tensor as large as the logits. At a vocabulary of
49,152 and 2,000 positions the logits are 400 MB in fp32, and autograd's way (logsumexp, selection,
softmax, each with its saved tensors) moves them some twenty times: a quarter of a whole training
step of SmolLM2 on a CPU. Here a block of rows at a time is worked on while it is in the cache, in
fp32 whatever the model's dtype, once forward and once backward.

With x the logits over the temperature, p = softmax(x) and H its entropy:

    d logp(t) / dx = onehot(t) - p            d H / dx = -p (log p + H)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrl.learner.attention import IMPLEMENTATION, plan
from rayrl.learner.packing import Packed

__all__ = ["chosen_logprobs", "logits_before", "padded_logits", "shares_prefixes"]

BLOCK = {"cpu": 1 << 18, "cuda": 1 << 26}  # logits worked on at a time: a core's cache, a whole GPU


def shares_prefixes(model: Any) -> bool:
    """Whether `model`, bare or wrapped, computes a trie of rows; else it computes whole rows."""
    attention: str = getattr(model, "module", model).config._attn_implementation
    return attention == IMPLEMENTATION


def logits_before(model: Any, packed: Packed) -> tuple[Tensor, Tensor]:
    """Logits before the loss tokens, from the trie or from whole rows.

    Returns:
        (S, V), and the row of it that predicts each loss token, (N,).
    """
    if not shares_prefixes(model):
        return padded_logits(model, packed)
    device = model.device
    config = getattr(model, "module", model).config.get_text_config()
    width, window = (getattr(config, name, None) for name in ("hidden_size", "sliding_window"))
    work = plan(packed, device, model.dtype, width or 0, window)
    padding = (0, work.tokens - len(packed.ids))
    logits = model(
        input_ids=torch.from_numpy(np.pad(packed.ids, padding)).to(device)[None],
        position_ids=torch.from_numpy(np.pad(packed.positions, padding)).to(device)[None],
        logits_to_keep=torch.from_numpy(packed.sources).to(device),
        use_cache=False,
        plan=work,
    ).logits[0]  # (S, V)
    return logits, torch.from_numpy(packed.slot).to(device)


def padded_logits(model: Any, packed: Packed) -> tuple[Tensor, Tensor]:
    """Logits before each loss token, from whole rows.

    Returns:
        (N, V), and the row of it that predicts each loss token: 0, 1, ... N - 1.
    """
    device = model.device
    inside = np.arange(packed.path.shape[1]) < packed.lengths[:, None]  # (B, L)
    source = packed.position - 1
    kept = np.unique(source)
    logits = model(
        input_ids=torch.from_numpy(packed.ids[packed.path]).to(device),
        attention_mask=torch.from_numpy(inside.astype(np.int64)).to(device),
        logits_to_keep=torch.from_numpy(kept).to(device),
        use_cache=False,
    ).logits  # (B, K, V)
    row = torch.from_numpy(packed.row).to(device)
    place = torch.from_numpy(np.searchsorted(kept, source)).to(device)
    return logits[row, place], torch.arange(len(row), device=device)


def chosen_logprobs(
    logits: Tensor,
    slot: Tensor,
    target: Tensor,
    temperature: float,
    *,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each loss token, and the entropy of the distribution it is from.

    Args:
        logits: (S, V) of the distinct positions, of any floating dtype.
        slot: (N,) row of `logits` that predicts each loss token.
        target: (N,) id of each loss token.
        temperature: logits are divided by it.
        entropy_gradient: let the entropy be differentiated as well.

    Returns:
        (N,) and (N,), in fp32; entropies in nats.
    """
    found: tuple[Tensor, Tensor] = _Chosen.apply(  # type: ignore[no-untyped-call]
        logits, slot, target, temperature, entropy_gradient
    )
    return found


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        slot: Tensor,
        target: Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        normalizer = logits.new_empty(len(logits), dtype=torch.float32)  # (S,)
        entropies = torch.empty_like(normalizer)
        for rows in _blocks(logits):
            x = _scaled(logits[rows], temperature)
            normalizer[rows] = x.logsumexp(-1)
            p = (x - normalizer[rows, None]).exp_()
            entropies[rows] = normalizer[rows] - p.mul_(x).sum(-1)
        # Flat 1-D selection adds up in a fixed order on the CPU, and quickly.
        x = logits.reshape(-1).index_select(0, slot * logits.shape[-1] + target)
        chosen = _scaled(x, temperature) - normalizer.index_select(0, slot)
        ctx.save_for_backward(logits, slot, target, normalizer, entropies)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        entropy = entropies.index_select(0, slot)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(
        ctx: Any, of_chosen: Tensor, of_entropy: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits, slot, target, normalizer, entropies = ctx.saved_tensors
        width = logits.shape[-1]
        per_row = torch.zeros_like(normalizer).index_add_(0, slot, -of_chosen)  # (S,)
        weight = torch.zeros_like(normalizer)
        if ctx.entropy_gradient:
            weight.index_add_(0, slot, of_entropy)
        on_cpu = logits.device.type == "cpu"
        if on_cpu:
            order = slot.argsort(stable=True)
            ends = slot.bincount(minlength=len(logits)).cumsum(0).tolist()
        gradient = torch.empty_like(logits)
        for rows in _blocks(logits):
            x = _scaled(logits[rows], ctx.temperature)
            d = x - normalizer[rows, None]  # log p
            if ctx.entropy_gradient:
                scale = d.add(entropies[rows, None]).mul_(-weight[rows, None])
                d = d.exp_().mul_(scale.add_(per_row[rows, None]))
            else:
                d = d.exp_().mul_(per_row[rows, None])
            if on_cpu:
                first = ends[rows.start - 1] if rows.start else 0
                mine = order[first : ends[rows.stop - 1]]
                place = (slot[mine] - rows.start) * width + target[mine]
                # summed apart and then added, as autograd would: the same bits, token for token
                d += torch.zeros_like(d).view(-1).index_add_(0, place, of_chosen[mine]).view_as(d)
            else:
                _add_in_place(d, slot - rows.start, target, of_chosen)
            gradient[rows] = d.div_(ctx.temperature) if ctx.temperature != 1 else d
        return gradient, None, None, None, None


def _add_in_place(d: Tensor, row: Tensor, target: Tensor, of_chosen: Tensor) -> None:
    """Add (N,) gradients at `row` and `target` to the block `d`, where they are inside of it.

    All N are added, as zeros if outside: a GPU would have to stop to say which are not.
    """
    inside = (row >= 0) & (row < len(d))
    place = (row * d.shape[1] + target) % d.numel()
    d.view(-1).index_add_(0, place, of_chosen.where(inside, 0))


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK.get(logits.device.type, 1 << 26) // logits.shape[-1])
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    x = logits.float()
    return x / temperature if temperature != 1 else x
