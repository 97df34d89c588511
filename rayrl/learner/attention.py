"""Attention over a packed trie, as an attention function of transformers.

There are three ways. In fp32 on a CPU with a C++ compiler, `rayrl.native` takes each token's keys
from where they are (in bf16 torch's products, which have units of their own, are faster). For GPUs
and long shared prefixes there is FlexAttention: a token sees another exactly if it is in that one's
subtree (`Packed.ends`), and whole blocks of keys are skipped. Else each row's keys are gathered
into rectangles (`Bucket`).

The model runs on flat ids (1, U). Only attention knows the rows: each row's owned queries attend
to the keys on the row's whole path. Everything else (embeddings, norms, linear layers) computes
every distinct token once and no padding. transformers builds no mask for an attention
implementation without a registered mask function, as intended here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from rayrl.errors import ConfigError
from rayrl.learner.packing import Bucket, IntArray, Packed, buckets
from rayrl.native import Contexts, attend_trie, missing

__all__ = ["FLEX", "IMPLEMENTATION", "BeyondWindow", "Plan", "block_mask", "flex_pays", "plan"]

IMPLEMENTATION = "rayrl_trie"
FLEX = {"cuda"}  # kinds of device whose kernels can be compiled
FLEX_WORK = 4096 * 512  # tokens * width from which a kernel earns its compilation
FLEX_KEYS = 4  # keys gathered per token from which it is faster; below, as fast, on an H100
FLEX_BLOCK = 128
FLEX_SIZES = 4  # sizes a kernel is compiled for, per doubling of the tokens
FLEX_HEAD = 16  # least width of a head that there are kernels for
# Kernels: for each size, with and without gradients, of more models than one. Beyond torch's own
# limit of 8 it would compute all scores, without a kernel.
FLEX_KERNELS = 256
SHORT = 512  # keys up to which two batched products beat torch's bf16 kernel on the CPU


class BeyondWindow(ConfigError):
    """A row is longer than the model's sliding window."""


@dataclass(frozen=True, slots=True, eq=False)
class _BucketTensors:
    """One `Bucket` as tensors; `mask` is (b, 1, s, k), or None where plain causal does."""

    shape: tuple[int, int, int]  # b, s, k
    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None
    valid: torch.Tensor
    owned: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The attention work of a `Packed`, as tensors; passed to the model as `plan=`.

    Attributes:
        longest: ids of the longest row.
        tokens: ids that the model is to be given: those of the trie, padded.
        buckets: the work as rectangles, or none, where one of the others is chosen:
        contexts: for C++.
        masks: for FlexAttention, by sliding window (None: without).
    """

    longest: int
    tokens: int
    buckets: tuple[_BucketTensors, ...] = ()
    contexts: Contexts | None = None
    masks: Mapping[int | None, BlockMask] = field(default_factory=dict)


def plan(
    packed: Packed,
    device: torch.device | str,
    dtype: torch.dtype,
    width: int,
    window: int | None = None,
) -> Plan:
    """The attention work of `packed` as tensors on `device`.

    Args:
        dtype: that of the queries.
        width: the model's hidden size.
        window: the sliding window of some of its layers. FlexAttention alone knows one.
    """
    device, tokens = torch.device(device), len(packed.ids)
    longest = int(packed.lengths.max())
    outgrown = window is not None and window < longest
    if not (flex_pays(packed, device.type, width) or (outgrown and device.type in FLEX)):
        if device.type == "cpu" and dtype == torch.float32 and missing() is None:
            owner = np.repeat(np.arange(len(packed.starts)), packed.lengths - packed.starts)
            return Plan(longest, tokens, contexts=Contexts.of(packed.path, owner, packed.positions))
        return Plan(longest, tokens, tuple(_to_tensors(b, device, dtype) for b in buckets(packed)))
    step = max(FLEX_BLOCK, (1 << (tokens.bit_length() - 1)) // FLEX_SIZES)
    padded = -(-tokens // step) * step
    ends = np.concatenate([packed.ends, np.arange(tokens, padded) + 1])
    masks: dict[int | None, BlockMask] = {None: block_mask(ends, device)}
    if window is not None and outgrown:
        positions = np.pad(packed.positions, (0, padded - tokens))
        masks[window] = block_mask(ends, device, positions, window)
    return Plan(longest, padded, masks=masks)


def flex_pays(packed: Packed, device: str, width: int) -> bool:
    """Whether FlexAttention is the faster way."""
    tokens = len(packed.ids)
    if device not in FLEX or tokens * width < FLEX_WORK:
        return False
    return sum(bucket.keys.size for bucket in buckets(packed)) >= FLEX_KEYS * tokens


def block_mask(
    ends: IntArray,
    device: torch.device | str,
    positions: IntArray | None = None,
    window: int | None = None,
) -> BlockMask:
    """FlexAttention's mask in which query j sees key i if i <= j < ends[i].

    Args:
        ends: (n,), n a multiple of `FLEX_BLOCK`, of a forest in preorder.
        positions: (n,) depths, for a window.
        window: the query sees that many keys of its path, itself included.
    """
    blocks = ends.reshape(-1, FLEX_BLOCK)
    first = np.arange(len(blocks)) * FLEX_BLOCK  # query of each block
    before = first[:, None] > first  # (query blocks, key blocks)
    seen = before & (blocks.max(1) > first[:, None])
    whole = before & (blocks.min(1) >= first[:, None] + FLEX_BLOCK)
    end = torch.from_numpy(ends).to(device)

    def on_path(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < end[key])

    visible = on_path
    if positions is not None and window is not None:
        least, most = (f(positions.reshape(-1, FLEX_BLOCK), axis=1) for f in (np.min, np.max))
        seen &= least[:, None] - most < window
        whole &= most[:, None] - least < window
        depth = torch.from_numpy(positions).to(device)

        def near(b: Any, h: Any, query: Any, key: Any) -> Any:
            seen = (key <= query) & (query < end[key])
            return seen & (depth[query] - depth[key] < window)

        visible = near

    def listed(chosen: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks each query block has, and which, in front."""
        found = chosen.sum(1), np.argsort(~chosen, axis=1, kind="stable")
        count, order = (torch.from_numpy(a.astype(np.int32)[None, None]).to(device) for a in found)
        return count, order

    partial = listed((seen & ~whole) | np.eye(len(blocks), dtype=bool))
    return BlockMask.from_kv_blocks(
        *partial, *listed(whole), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible
    )


def _flex(
    query: torch.Tensor,  # (1, H, U, D)
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scaling: float | None,
) -> torch.Tensor:
    """FlexAttention, compiled but on the CPU; (1, U, H, D)."""
    attend = flex_attention
    if query.device.type != "cpu":
        attend = _compiled()
        # A thread has its own settings, and checkpointed layers are computed again in another.
        if torch._dynamo.config.recompile_limit < FLEX_KERNELS:
            torch._dynamo.config.recompile_limit = FLEX_KERNELS
    scaling, width = scaling or query.shape[3] ** -0.5, value.shape[3]
    # zeros in a head change neither its scores nor what is kept of it
    query, key, value = (
        F.pad(x, (0, FLEX_HEAD - x.shape[3])) if x.shape[3] < FLEX_HEAD else x
        for x in (query, key, value)
    )
    grouped = key.shape[1] != query.shape[1]
    out: Any = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    kept: torch.Tensor = out[..., :width].transpose(1, 2)
    return kept


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _to_tensors(bucket: Bucket, device: torch.device, dtype: torch.dtype) -> _BucketTensors:
    b, s = bucket.queries.shape
    k = bucket.keys.shape[1]
    mask = None
    if bucket.starts.any() or s != k:
        starts = torch.from_numpy(bucket.starts).to(device)
        last = starts[:, None] + torch.arange(s, device=device)  # (b, s) last visible key
        hidden = torch.arange(k, device=device) > last[:, :, None]
        mask = torch.zeros(b, 1, s, k, device=device, dtype=dtype)
        mask.masked_fill_(hidden[:, None], float("-inf"))

    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(array.reshape(-1)).to(device)

    return _BucketTensors(
        (b, s, k),
        tensor(bucket.queries),
        tensor(bucket.keys),
        mask,
        tensor(bucket.valid),
        tensor(bucket.owned),
    )


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, H, U, D)
    key: torch.Tensor,  # (1, Hkv, U, D)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: Plan | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: (1, U, H, D), the shape transformers expects."""
    if plan is None:
        raise ConfigError(
            f"model.path: the attention of {type(module).__name__} does not pass keywords on, so "
            "the learner cannot use it; choose a model that supports attention backends"
        )
    softcap = kwargs.get("softcap")
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise ConfigError(
            f"model.path: {type(module).__name__} uses soft-capping or attention sinks, which the "
            "learner's attention does not know; choose another model"
        )
    window = None
    if sliding_window is not None and sliding_window < plan.longest:
        window = sliding_window
    if window is not None and window not in plan.masks:
        raise BeyondWindow(
            f"model.path: a row of {plan.longest} ids is longer than the sliding window "
            f"({sliding_window}), and than engine.max_len; raise that, or use shorter episodes"
        )
    if plan.masks:
        return _flex(query, key, value, plan.masks[window], scaling), None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (U, H, D)
    if plan.contexts is not None:
        scale = scaling or query.shape[2] ** -0.5
        return attend_trie(plan.contexts, query, key, value, scale)[None], None
    flat_out = query.new_empty(query.shape[0], query.shape[1] * value.shape[2])
    pieces, owners = [], []
    for r in plan.buckets:
        b, s, k = r.shape
        parts = (
            _gather(query, r.queries, b, s),
            _gather(key, r.keys, b, k),
            _gather(value, r.keys, b, k),
        )
        if query.dtype == torch.bfloat16 and query.device.type == "cpu" and k <= SHORT:
            out = _products(*parts, r.mask, scaling or query.shape[2] ** -0.5)
        else:
            out = F.scaled_dot_product_attention(
                *parts,
                attn_mask=r.mask,
                dropout_p=dropout,
                is_causal=r.mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )  # (b, H, s, D)
        pieces.append(out.transpose(1, 2).reshape(b * s, -1).index_select(0, r.valid))
        owners.append(r.owned)
    flat_out = flat_out.index_copy(0, torch.cat(owners), torch.cat(pieces))
    return flat_out.view(1, *query.shape[:2], value.shape[2]), None


def _products(
    query: torch.Tensor,  # (b, H, s, D)
    key: torch.Tensor,  # (b, Hkv, k, D)
    value: torch.Tensor,
    mask: torch.Tensor | None,  # (b, 1, s, k)
    scaling: float,
) -> torch.Tensor:
    """Attention as two batched products around an fp32 softmax; (b, H, s, D)."""
    b, heads, s, width = query.shape
    groups, k = key.shape[1:3]
    query = query.reshape(b * groups, -1, width)
    scores = torch.bmm(query, key.reshape(b * groups, k, width).transpose(1, 2)).float() * scaling
    scores = scores.view(b, heads, s, k)
    if mask is None:
        scores = scores + torch.full((s, k), float("-inf"), device=scores.device).triu(1)
    else:
        scores = scores + mask
    weights = scores.softmax(-1).to(value.dtype).view(b * groups, -1, k)
    out = torch.bmm(weights, value.reshape(b * groups, k, -1))
    return out.view(b, heads, s, -1)


def _gather(x: torch.Tensor, index: torch.Tensor, b: int, n: int) -> torch.Tensor:
    """(U, H, D) at `index` (b·n,) as (b, H, n, D)."""
    rows = x.reshape(x.shape[0], -1).index_select(0, index)
    return rows.view(b, n, *x.shape[1:]).transpose(1, 2)


AttentionInterface.register(IMPLEMENTATION, _attend)
