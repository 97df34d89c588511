"""Logits of packed rows: as a trie, or whole rows for models that a trie would change.

A trie of rows is exact because attention can be told which tokens a token sees. A convolution or a
recurrence along the sequence cannot: it would mix the end of one row into the beginning of the
next. Nor does the trie's attention know chunks or biases by distance, or windows unless on a GPU.
Such models (LFM2, Mamba and hybrids of both, Llama 4, Mistral beyond its window on a CPU) compute
each row by itself, with their own attention, padded on the right, where nothing that counts can see
the padding. Prefixes are not shared then. `probe.py` finds out which model is which.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrl.learner.attention import IMPLEMENTATION, plan
from rayrl.learner.packing import Packed

__all__ = ["logits_before", "padded_logits", "shares_prefixes"]


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
