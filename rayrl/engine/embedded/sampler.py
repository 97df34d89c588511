"""Sample next ids, vectorized over rows; each row's sample depends on that row alone.

The only randomness is one number in [0, 1) per sample, hashed from the request's seed and the
position in its completion (splitmix64; Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators"), so neither the rest of the batch nor a request's time of arrival matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrl.errors import NumericsError
from rayrl.types import Alternatives

__all__ = ["SamplingBatch", "raw_logprobs", "sample", "uniform"]

BLOCK = 64  # ids
IN_CACHE = 1 << 18  # logits worked on at a time on a CPU
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Hash each seed and position to a number in [0, 1), (n,); multiples of 2**-52.

    52 bits and not 53, so that u * total < total for every float64 total after rounding.
    """
    count = positions.astype(np.uint64) + np.uint64(1)
    bits = _mix(_mix(seeds + _GOLDEN) + count * _GOLDEN)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of n rows, all (n,). Temperature 0: greedy; top_k 0, top_p 1: off."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    seeds: NDArray[np.uint64]
    positions: NDArray[np.int64]


def sample(
    logits: Tensor, batch: SamplingBatch, at: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Sample each row's next id; also return its logprob under the distribution sampled from.

    top-k keeps the k most probable ids (ties: the smaller id); then top-p keeps the smallest set of
    most probable ids whose total probability is at least top_p.

    Args:
        logits: (m, vocabulary) fp32, on any device.
        at: (n,) index of each row's logits. Rows that share theirs and have the same parameters
            share one distribution too.

    Returns:
        ids (n,), and natural-log probabilities (n,), 0 for greedy rows.

    Raises:
        NumericsError: a row's largest logit is NaN or infinite.
    """
    block = max(1, IN_CACHE // logits.shape[1])
    if logits.device.type == "cpu" and len(logits) > block:
        ids, logprobs = np.empty(len(at), np.int64), np.empty(len(at), np.float32)
        for start in range(0, len(logits), block):
            mine = np.flatnonzero((start <= at) & (at < start + block))
            if len(mine):
                rows = SamplingBatch(*(getattr(batch, f)[mine] for f in SamplingBatch.__slots__))
                drawn = sample(logits[start : start + block], rows, at[mine] - start)
                ids[mine], logprobs[mine] = drawn
        return ids, logprobs
    if not bool(logits.amax(-1).isfinite().all()):
        raise NumericsError("the model's logits are not finite; its weights have diverged")
    greedy = batch.temperature == 0
    if greedy.all():
        return logits.argmax(-1).cpu().numpy()[at], np.zeros(len(at), dtype=np.float32)
    device = logits.device

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    parameters = (batch.temperature, batch.top_k, batch.top_p)
    if all((values == values[0]).all() for values in parameters):
        temperature, top_k, top_p = (values[:1].repeat(len(logits)) for values in parameters)
    else:
        temperature, top_k, top_p = parameters
        logits = logits[tensor(at)]
        at = np.arange(len(at))
    is_greedy = temperature == 0
    logits = logits / tensor(np.where(is_greedy, np.float32(1), temperature))[:, None]
    u = uniform(batch.seeds, batch.positions)
    truncated = (~is_greedy & ((top_k > 0) | (top_p < 1)))[at]
    ids = np.empty(len(at), dtype=np.int64)
    logprobs = np.empty(len(at), dtype=np.float32)
    if not truncated.all():
        full = np.flatnonzero(~truncated)
        of, which = np.unique(at[full], return_inverse=True)
        own = logits if len(of) == len(logits) else logits[tensor(of)]
        ids[full], logprobs[full] = _draw(own.log_softmax(-1), which, u[full])
    if truncated.any():
        part = np.flatnonzero(truncated)
        of, which = np.unique(at[part], return_inverse=True)
        ordered, order = _truncate(logits[tensor(of)], tensor(top_k[of]), tensor(top_p[of]))
        ranks, logprobs[part] = _draw(ordered, which, u[part])
        ids[part] = order.cpu().numpy()[which, ranks]
    if greedy.any():
        ids = np.where(greedy, logits.argmax(-1).cpu().numpy()[at], ids)
        logprobs[greedy] = 0.0
    return ids, logprobs


def raw_logprobs(
    logits: Tensor, at: NDArray[np.int64], ids: NDArray[np.int64], top: NDArray[np.int64]
) -> tuple[NDArray[np.float32], list[Alternatives]]:
    """Return the model's own logprobs: before temperature, top-k and top-p.

    Args:
        logits: (m, vocabulary) fp32.
        at: (n,) index of each row's logits.
        ids: (n,) sampled ids.
        top: (n,) number of most probable ids to return per row.

    Returns:
        (n,) logprobs of the sampled ids, and the most probable ids of each row.
    """
    norm = logits.logsumexp(-1)  # (m,)
    at_ = torch.from_numpy(at).to(logits.device)
    sampled = logits[at_, torch.from_numpy(ids).to(logits.device)] - norm[at_]
    alternatives: list[Alternatives] = [()] * len(at)
    for row in np.flatnonzero(top):
        own = int(at[row])
        best, best_ids = logits[own].topk(min(int(top[row]), logits.shape[1]))
        pairs = zip(best_ids.tolist(), (best - norm[own]).tolist(), strict=True)
        alternatives[row] = tuple(pairs)
    return sampled.cpu().numpy(), alternatives


def _draw(
    logprobs: Tensor, at: NDArray[np.int64], u: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Invert cumulative distributions in float64: ids (n,) and their logprobs (n,).

    First over blocks of `BLOCK` ids, then inside one, since few ids of a large vocabulary matter.

    Args:
        logprobs: (m, vocabulary).
        at: (n,) which of them each row draws from; every one is drawn from.
        u: (n,) in [0, 1).
    """
    probs = logprobs.exp()
    count = logprobs.shape[1]
    whole = count - count % BLOCK
    sums = probs[:, :whole].view(len(probs), whole // BLOCK, BLOCK).sum(-1, dtype=torch.float64)
    if whole < count:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, True, dtype=torch.float64)], 1)
    device = logprobs.device
    row = torch.from_numpy(at).to(device)
    before = sums.cumsum(-1)[row]  # (n, blocks)
    value = torch.from_numpy(u).to(device)[:, None] * before[:, -1:]
    block = torch.searchsorted(before, value, right=True)
    value -= (before - sums[row]).gather(1, block)
    columns = block * BLOCK + torch.arange(BLOCK, device=device)
    inside = probs[row[:, None], columns.clamp_max(count - 1)].double()
    inside = inside.masked_fill_(columns >= count, 0.0).cumsum(-1)
    # rounding may leave it just outside of the block
    value = value.clamp_min(0.0).minimum(inside[:, -1:].nextafter(inside.new_zeros(())))
    ids = (block * BLOCK + torch.searchsorted(inside, value, right=True))[:, 0]
    return ids.cpu().numpy(), logprobs[row, ids].cpu().numpy()


def _truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return logprobs in descending order, -inf where truncated, and the ids in that order."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[1])
    ordered = ordered.masked_fill(rank >= limit[:, None], -torch.inf)
    probs = ordered.double().softmax(-1)
    before = probs.cumsum(-1) - probs
    beyond = (before >= top_p[:, None]) & (rank > 0)
    return ordered.masked_fill(beyond, -torch.inf).log_softmax(-1), order
