"""Whole rows for models that are not attention alone.

A trie of rows is exact because attention can be told which tokens a token sees. A convolution or a
recurrence along the sequence cannot: it would mix the end of one row into the beginning of the
next. Such models (LFM2, Mamba and hybrids of both) compute each row by itself, padded on the right,
where nothing that counts can see the padding. Prefixes are not shared then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrl.learner.attention import IMPLEMENTATION, plan
from rayrl.packing import Packed, pack

__all__ = ["mixes_by_attention_only", "padded_logits", "shares_prefixes"]

PROBE = ((3, 7, 2, 5, 9, 4, 8), (3, 7, 2, 6, 1, 8, 5), (3, 9, 9, 2))
TOLERANCE = 0.05  # of the logits' spread: above rounding to bf16, below another row's tokens


def shares_prefixes(model: Any) -> bool:
    """Whether `model`, bare or wrapped, computes a trie of rows; else it computes whole rows."""
    attention: str = getattr(model, "module", model).config._attn_implementation
    return attention == IMPLEMENTATION


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


def mixes_by_attention_only(model: Any) -> bool:
    """Whether the model gives a trie of rows the logits that it gives each row alone.

    Its attention must be the trie's; an error of that attention is passed on.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    rows = [np.array(row) % vocabulary for row in PROBE]
    packed = pack(rows, [np.arange(len(row)) > 0 for row in rows])
    device = model.device
    with torch.no_grad():
        together = model(
            input_ids=torch.from_numpy(packed.ids).to(device)[None],
            position_ids=torch.from_numpy(packed.positions).to(device)[None],
            use_cache=False,
            plan=plan(packed, device, model.dtype),
        ).logits[0]
        gaps, spread = [], []
        for index, row in enumerate(packed.order):
            alone = pack([rows[row]], [np.arange(len(rows[row])) > 0])
            wanted = model(
                input_ids=torch.from_numpy(alone.ids).to(device)[None],
                position_ids=torch.from_numpy(alone.positions).to(device)[None],
                use_cache=False,
                plan=plan(alone, device, model.dtype),
            ).logits[0]
            path = torch.from_numpy(packed.path[index, : len(rows[row])]).to(device)
            gaps.append((together[path] - wanted).float().abs().mean())
            spread.append(wanted.float().std())
    return bool(max(gaps) <= TOLERANCE * max(spread))
