"""Read an export back: it must hold the learner's weights and compute the learner's logprobs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrl.errors import ConfigError
from rayrl.learner.batch import Trajectory, supervised_row
from rayrl.learner.forward import row_logprobs
from rayrl.weights.loading import load_causal_lm

__all__ = ["PROBE_TOKENS", "misfit", "probe_rows"]

LENGTHS = (8, 5, 7, 2)  # short: within any window, and the cost of an export's check
STEP = 7  # between ids; the second row begins like the first, as rows of a trie do
PROBE_TOKENS = sum(LENGTHS)
NAMED = 3  # weights that are named

# Mean difference of logprobs, as a share of their spread (at least 1 nat). The learner shares
# prefixes and computes adapters beside their weights; the export does neither. In fp32 that is
# rounding, at most 1e-5 where it was measured. In bf16 every activation has 8 bits, so logits of
# 30 are steps of 1/8 apart. One transposed layer of a trained model is more than half the spread.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def probe_rows(vocabulary: int) -> list[Trajectory]:
    """Rows of several lengths with ids below `vocabulary`, a logprob for each id but the first."""
    starts = (3, 3, 11, 5)
    return [
        supervised_row(
            [(start + STEP * place + place // 4 * row) % vocabulary for place in range(length)],
            [place > 0 for place in range(length)],
        )
        for row, (start, length) in enumerate(zip(starts, LENGTHS, strict=True))
    ]


def misfit(
    folder: Path,
    weights: Mapping[str, Tensor],
    rows: Sequence[Trajectory],
    learned: Mapping[int, NDArray[np.float32]],
    dtype: torch.dtype,
) -> str:
    """How the model in `folder` differs from the learner's; empty if it does not.

    It is loaded like any other model, with transformers' own attention.

    Args:
        weights: what it must hold, by the plain model's names.
        rows: what to compute logprobs of.
        learned: the learner's logprobs of `rows`, as `row_logprobs` gives them at temperature 1.
        dtype: the learner's.
    """
    try:
        model = load_causal_lm(folder, dtype=dtype)
    except ConfigError as error:
        return f"it cannot be loaded: {error}"
    held = model.state_dict()
    gaps = {
        name: gap for name, one in weights.items() if (gap := _gap(one, held.get(name))) is not None
    }
    if gaps:
        worst = sorted(gaps, key=gaps.__getitem__, reverse=True)[:NAMED]
        listed = ", ".join(f"{name} by {gaps[name]:.2g}" for name in worst)
        more = ", …" if len(gaps) > NAMED else ""
        return f"{len(gaps)} of {len(weights)} weights differ ({listed}{more})"
    found = row_logprobs(model, rows, PROBE_TOKENS, 1.0)
    wanted = np.concatenate([learned[id(row)] for row in rows])
    off = float(np.abs(np.concatenate([found[id(row)] for row in rows]) - wanted).mean())
    if off <= TOLERANCE[dtype] * max(1.0, float(wanted.std())):
        return ""
    return (
        f"it holds the learner's weights, but its logprobs are {off:.2g} nats per token off the "
        "learner's: transformers computes with the weights differently there, or merged adapters "
        "are not what the learner's adapters compute"
    )


def _gap(one: Tensor, other: Tensor | None) -> float | None:
    """Largest difference of two weights, infinite if the second is missing; None if equal."""
    if other is None or other.shape != one.shape:
        return math.inf
    if torch.equal(one, other):
        return None
    return float((one.float() - other.float()).abs().max())
