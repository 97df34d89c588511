"""Check a model before training: are a row's logits deterministic and independent of other rows?

The checks compute a few short rows and do not go by the model's name: whether two passes are equal,
whether a row's logits depend on the rows beside it, and whether the trie (`logits.py`) gives what
the model's own attention gives each row alone. They include rows longer than the windows and chunks
that the config names, and the last positions that the run can reach.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrl.errors import ConfigError
from rayrl.learner.attention import IMPLEMENTATION, BeyondWindow
from rayrl.learner.logits import logits_before
from rayrl.learner.packing import Packed, pack

__all__ = ["choose_attention", "longest_row"]

ROWS = ((3, 7, 2, 5, 9, 4, 8), (3, 7, 2, 6, 1, 8, 5), (3, 9, 9, 2))
SHORT = len(ROWS[0])
BEYOND = 16  # ids of a long row that come after the limit it is there for
UNBOUNDED = 1 << 20  # ids of a row, where the model's config does not say
# of the logits' spread: above rounding, below the influence of another row's tokens
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.05}

_LIMIT = re.compile(r"window|chunk_size|floor_scale")
_RANDOM = re.compile(r"drop|jitter|noise")
_log = logging.getLogger(__name__)


def longest_row(model: Any, max_len: int) -> int:
    """Ids that a row can have: `engine.max_len`, or where that is 0 the model's positions.

    Rotary positions can be turned beyond those that the config names, a table of them has an end.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or UNBOUNDED
    if getattr(config, "rope_parameters", None):
        return max_len or positions
    return min(max_len or positions, positions)


@torch.no_grad()
def choose_attention(model: Any, longest: int) -> None:
    """Set the trie's attention on `model` where that is exact, else its own.

    Args:
        longest: ids that a row can have.

    Raises:
        ConfigError: the model's logits are random or depend on the other rows of a batch, or its
            attention is of a kind that the trie's refuses.
    """
    probes = {limit: _probe(model, limit, longest) for limit in (0, *_limits(model, longest))}
    _set_attention(model, IMPLEMENTATION)
    tried = model._supports_attention_backend
    shared = {limit: _in_one_pass(model, probes[limit]) if tried else None for limit in probes}
    _set_attention(model, "sdpa" if model._supports_sdpa else "eager")
    # Long rows are not computed where a window has already ruled the trie out.
    wanted = [limit for limit in probes if not limit or not tried or shared[limit] is not None]
    alone = {limit: _row_by_row(model, probes[limit]) for limit in wanted}
    _refuse_noise(model, alone[0], _row_by_row(model, probes[0]))
    _refuse_dependence_on_the_longest(model, longest)
    off = [
        limit
        for limit in probes
        if limit not in alone or not _equal_up_to_rounding(model, shared[limit], alone[limit])
    ]
    if not off:
        _set_attention(model, IMPLEMENTATION)
        return
    if not all(
        _equal_up_to_rounding(model, _in_one_pass(model, probes[limit]), alone[limit])
        for limit in alone
    ):
        raise ConfigError(
            f"model.path: {type(model).__name__} gives a row other logits beside other rows than "
            "alone, so that the learner would train another model; choose another one"
        )
    if off[0]:
        _log.warning(
            "%s: rows do not share prefixes, because a conversation can be longer than a limit of "
            "its attention (%d ids). With engine.max_len=%d they would, and learning be faster.",
            type(model).__name__,
            off[0],
            off[0],
        )


def _set_attention(model: Any, attention: str) -> None:
    model.config._attn_implementation = attention  # of all its parts, as they compute


def _limits(model: Any, longest: int) -> list[int]:
    """Lengths below `longest` from which a token no longer sees all before it, by the config."""
    config = model.config.get_text_config().to_dict()
    found = {size for key, size in config.items() if _LIMIT.search(key) and type(size) is int}
    return sorted(size for size in found if SHORT <= size < longest)


def _probe(model: Any, limit: int, longest: int) -> Packed:
    """`ROWS`, and beside them, where there is a limit, a row that goes beyond it."""
    vocabulary = model.get_input_embeddings().num_embeddings
    rows = [np.array(row) % vocabulary for row in ROWS]
    wanted = [np.arange(len(row)) > 0 for row in rows]
    if limit:
        length = min(limit + BEYOND, longest)
        row = np.random.default_rng(0).integers(1, 10, length)
        # it shares nothing, so the trie needs no mask as large as its square
        row[0] = ROWS[0][0] + 1
        rows.append(row % vocabulary)
        wanted.append(np.arange(length) >= limit)
    return pack(rows, wanted)


def _in_one_pass(model: Any, probe: Packed) -> Tensor | None:
    """(N, V) before the wanted ids, from one pass; None where a row is beyond the window."""
    try:
        logits, slot = logits_before(model, probe)
    except BeyondWindow:
        return None
    return logits[slot]


def _row_by_row(model: Any, probe: Packed) -> Tensor:
    """The same, from a pass for each row."""
    parts = []
    for index, length in enumerate(probe.lengths):
        wanted = np.isin(np.arange(length), probe.position[probe.row == index])
        row = pack([probe.ids[probe.path[index, :length]]], [wanted])
        logits, slot = logits_before(model, row)
        parts.append(logits[slot])
    return torch.cat(parts)


def _equal_up_to_rounding(model: Any, found: Tensor | None, wanted: Tensor) -> bool:
    """Whether two (N, V) are the same up to rounding.

    The mean decides: in bf16 rounding may send a token to another expert.
    """
    if found is None:
        return False
    gap = (found - wanted).float().abs().mean()
    return bool(gap <= TOLERANCE[model.dtype] * wanted.float().std())


def _refuse_noise(model: Any, first: Tensor, second: Tensor) -> None:
    """Refuse a model whose two passes over the same rows differ in a bit."""
    if torch.equal(first, second):
        return
    named = [*_random_settings(model.config.to_dict())]
    for module in model.modules():
        named += [f"{type(module).__name__}.{one}" for one in _random_settings(vars(module))]
    what = ", ".join(dict.fromkeys(named)) or "its config names nothing of the kind"
    raise ConfigError(
        f"model.path: {type(model).__name__} gives other logits each time, so something random is "
        f"on that evaluation mode does not turn off ({what}); set that to 0 in config.json, or "
        "choose another model"
    )


def _random_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings above 0 whose name speaks of dropout, jitter or noise."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _random_settings(value)
        elif type(value) in (int, float) and value > 0 and _RANDOM.search(str(key)):
            yield f"{key}={value:g}"


def _refuse_dependence_on_the_longest(model: Any, longest: int) -> None:
    """Refuse a model whose rotary embedding of all positions depends on the longest row.

    Only if the run reaches such lengths. No engine computes the same: its keys of early positions
    are kept when a conversation grows.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return
    if not _depends_on_other_rows(model, longest):
        return
    least, most = SHORT, longest  # logits are independent at the first length, not at the other
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if _depends_on_other_rows(model, middle) else (middle, most)
    raise ConfigError(
        f"model.path: {type(model).__name__} gives a row of up to {least} ids other logits beside "
        f"a longer one (its rotary embedding goes by the longest); keep all conversations on one "
        f"side with engine.max_len={least}"
    )


def _depends_on_other_rows(model: Any, length: int) -> bool:
    """Whether a short row's logits change beside a row at the last positions of `length` ids."""
    near = torch.arange(SHORT, device=model.device)
    ids = torch.tensor(ROWS[0], device=model.device) % model.get_input_embeddings().num_embeddings
    positions = torch.stack([near, near + max(0, length - SHORT)])
    together = model(input_ids=ids.expand(2, -1), position_ids=positions, use_cache=False).logits[0]
    alone = model(input_ids=ids[None], position_ids=near[None], use_cache=False).logits[0]
    return not _equal_up_to_rounding(model, together, alone)
