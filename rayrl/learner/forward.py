"""One forward pass over packed rows, its loss, and the metrics of a step.

Shared by every learner, so that they can only differ in how gradients become an update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rayrl.config import LearnerConfig
from rayrl.errors import ConfigError
from rayrl.learner.batch import Totals, Trajectory, micro_batches
from rayrl.learner.logits import chosen_logprobs, logits_before, shares_prefixes
from rayrl.learner.loss import LossInputs, Objective, objective_loss
from rayrl.learner.packing import Packed, pack
from rayrl.learner.probe import choose_attention, longest_row
from rayrl.weights.loading import load_causal_lm
from rayrl.weights.model_dir import model_dir

__all__ = [
    "Tally",
    "checkpoint_layers",
    "filler_row",
    "idle_loss",
    "load_model",
    "loss_of",
    "row_logprobs",
    "scheduled_lr",
    "token_logprobs",
    "with_logprobs",
]


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_len: int = 0,
) -> Any:
    """The causal LM in the Hugging Face directory `path`, in evaluation mode, after `probe.py`.

    It has the trie's attention where that is exact; models that mix tokens by other means as well
    (convolutions, recurrences, windows that a row can outgrow) keep their own attention, and
    `token_logprobs` gives them whole rows, padded.

    Training mode would turn on dropout, router noise and skipped layers, wherever an architecture
    has them, and make the learner another policy than the one that was sampled from. Gradients
    need no training mode.

    Args:
        max_len: ids that a row can have; 0: what the model has positions for.
    """
    model = load_causal_lm(model_dir(str(path)), dtype=dtype)
    model.eval().to(device)
    choose_attention(model, longest_row(model, max_len))
    return model


def checkpoint_layers(model: Any) -> None:
    """Let every layer of `model` compute its activations again in the backward pass, not keep them.

    transformers' own switch for that works in training mode only; see `load_model`.

    Raises:
        ConfigError: the model has no layers that can be computed again.
    """
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"learner.gradient_checkpointing=true: {type(model).__name__} does not support it; set "
            "it to false and lower learner.micro_batch_tokens"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def scheduled_lr(cfg: LearnerConfig, step: int, total: int) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    Rises linearly over `warmup_steps`, then stays, or falls to `min_lr_ratio` of `lr` at the last
    step along a line or half a cosine. `cfg.lr` is a number here: `Learner` says which.
    """
    assert cfg.lr is not None
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    if cfg.schedule == "constant":
        return cfg.lr
    done = min(1.0, (step - cfg.warmup_steps) / max(1, total - 1 - cfg.warmup_steps))
    if cfg.schedule == "linear":
        left = 1 - done
    elif cfg.schedule == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
    else:
        raise ConfigError(
            f"learner.schedule={cfg.schedule!r} is not one of constant, linear, cosine"
        )
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left)


def token_logprobs(
    model: Any,
    packed: Packed,
    temperature: float | NDArray[np.float32],
    *,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the loss tokens under the *sampling* distribution, and its entropy.

    Logits are computed at the distinct source tokens only and divided by `temperature`, one for
    all or (N,), before the softmax, as the engine did. top-p and top-k are not applied: with them,
    the rollout's logprobs are those of a truncated distribution, which the mismatch metrics show.

    Returns:
        (N,) with gradient, in `packed`'s order, and (N,) entropies in nats, with gradient if
        `entropy_gradient`.
    """
    logits, slot = logits_before(model, packed)
    target = torch.from_numpy(packed.target).to(model.device)
    if not isinstance(temperature, np.ndarray):
        return chosen_logprobs(logits, slot, target, temperature, entropy_gradient=entropy_gradient)
    chosen = entropy = torch.zeros(len(target), device=model.device)
    for one in np.unique(temperature).tolist():  # each goes through all logits
        at = torch.from_numpy(np.flatnonzero(temperature == one)).to(model.device)
        found = chosen_logprobs(
            logits, slot[at], target[at], one, entropy_gradient=entropy_gradient
        )
        chosen, entropy = (
            whole.index_copy(0, at, part)
            for whole, part in zip((chosen, entropy), found, strict=True)
        )
    return chosen, entropy


def _pack(rows: Sequence[Trajectory]) -> Packed:
    return pack([row.ids for row in rows], [row.loss_mask for row in rows])


def _flat(rows: Sequence[Trajectory], packed: Packed, name: str, device: Any) -> Tensor:
    """Field `name` of the rows at the packed loss tokens, (N,)."""
    parts = [getattr(rows[i], name)[rows[i].loss_mask] for i in packed.order]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _temperatures(
    rows: Sequence[Trajectory], packed: Packed, usual: float
) -> float | NDArray[np.float32]:
    """At which the packed loss tokens were sampled: one for all, or (N,)."""
    if all(row.temperatures is None for row in rows):
        return usual
    parts = []
    for row in (rows[i] for i in packed.order):
        own = np.full(len(row.ids), np.nan) if row.temperatures is None else row.temperatures
        parts.append(own[row.loss_mask])
    whole = np.concatenate(parts)
    return np.where(np.isnan(whole), usual, whole).astype(np.float32)


def row_logprobs(
    model: Any,
    rows: Sequence[Trajectory],
    max_tokens: int,
    temperature: float,
    *,
    for_all: bool = False,
    passes: int = 0,
) -> dict[int, NDArray[np.float32]]:
    """(T,) log-probabilities of each row, 0 where `loss_mask` is False; keyed by `id(row)`.

    `temperature` is that of ids whose row does not say otherwise; with `for_all`, of all.

    Makes at least `passes` forward passes: where one is a collective, all ranks make as many.
    """
    out: dict[int, NDArray[np.float32]] = {}
    micros = micro_batches(rows, max_tokens, shared=shares_prefixes(model))
    for micro in micros + [[filler_row()]] * (passes - len(micros)):
        packed = _pack(micro)
        at = temperature if for_all else _temperatures(micro, packed, temperature)
        with torch.no_grad():
            values = token_logprobs(model, packed, at)[0].cpu().numpy()
        for b, i in enumerate(packed.order):
            line = np.zeros(len(micro[i].ids), np.float32)
            mine = packed.row == b
            line[packed.position[mine]] = values[mine]
            out[id(micro[i])] = line
    return out


def with_logprobs(
    rows: Iterable[Trajectory],
    field: Literal["proximal_logprobs", "reference_logprobs"],
    values: dict[int, NDArray[np.float32]],
) -> list[Trajectory]:
    """The rows with `field` filled in from `row_logprobs`."""
    if field == "proximal_logprobs":
        return [replace(row, proximal_logprobs=values[id(row)]) for row in rows]
    return [replace(row, reference_logprobs=values[id(row)]) for row in rows]


def filler_row() -> Trajectory:
    """The smallest row, with advantage 0: for passes of a rank that has fewer rows than others."""
    zero = np.zeros(2, np.float32)
    return Trajectory(np.zeros(2, np.int32), np.array([False, True]), zero, zero)


class Tally:
    """Metrics of a step as sums and maxima, which add up over micro-batches, updates and ranks.

    A mean is kept as a sum and the number of tokens it is over. What no token was measured for is
    no metric: its mean would be 0, which reads as a policy that is sure of every token.

    Attributes:
        sums: name -> sum: the loss, and counts.
        means: name -> sum over tokens, and how many.
        maxima: name -> largest value.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.means: dict[str, tuple[float, int]] = {}
        self.maxima: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a sum."""
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def mean(self, name: str, values: Tensor) -> None:
        """Add (N,) values to a mean over tokens."""
        self._add_to_mean(name, float(values.sum()), len(values))

    def most(self, name: str, values: Tensor) -> None:
        """Raise a maximum to the largest of (N,) values."""
        self.maxima[name] = max(self.maxima.get(name, 0.0), float(values.max()))

    def merge(self, other: Tally) -> None:
        """Add what another has measured."""
        for name, value in other.sums.items():
            self.add(name, value)
        for name, (value, n) in other.means.items():
            self._add_to_mean(name, value, n)
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, 0.0), value)

    def metrics(self) -> dict[str, float]:
        """What is logged: counts, and the loss, means and maxima if there was a token."""
        tokens = self.sums.get("tokens", 0.0)
        return {
            **({"loss": self.sums["loss"]} if tokens else {}),
            **{name: total / n for name, (total, n) in self.means.items() if n},
            **self.maxima,
            "computed_loss_tokens": tokens,
            "distinct_tokens": self.sums.get("distinct_tokens", 0.0),
            "row_tokens": self.sums.get("row_tokens", 0.0),
        }

    def _add_to_mean(self, name: str, value: float, n: int) -> None:
        total, tokens = self.means.get(name, (0.0, 0))
        self.means[name] = (total + value, tokens + n)


def idle_loss(model: Any) -> Tensor:
    """0 with a gradient of zeros, by one forward pass over the smallest row there is.

    For a rank without work, where a pass is a collective. No loss is called: one that divides by
    the spread of its advantages is not finite there.
    """
    return token_logprobs(model, _pack([filler_row()]), 1.0)[0].sum() * 0


def loss_of(
    model: Any,
    rows: Sequence[Trajectory],
    objective: Objective,
    totals: Totals,
    temperature: float,
    *,
    first: bool,
) -> tuple[Tensor, Tally]:
    """Forward one micro-batch: its part of the batch's loss (to differentiate), and its metrics.

    Args:
        temperature: of ids whose row does not say otherwise.
        first: these weights are the ones the step began with, so the difference between learner
            and rollout log-probabilities is the mismatch and not what the step has learned.
    """
    packed = _pack(rows)
    device = model.device
    algo = objective.algo
    bonus = algo.entropy_coef > 0
    at = _temperatures(rows, packed, temperature)
    logprobs, entropy = token_logprobs(model, packed, at, entropy_gradient=bonus)
    now = logprobs.detach()
    rollout = _flat(rows, packed, "rollout_logprobs", device)
    old = rollout
    if algo.tis_max > 0:  # a step of one update has no other policy than the current one
        several = rows[0].proximal_logprobs is not None
        old = _flat(rows, packed, "proximal_logprobs", device) if several else now
    referenced = rows[0].reference_logprobs is not None
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=_flat(rows, packed, "advantages", device),
        row=torch.from_numpy(packed.row).to(device),
        n_rows=len(rows),
        algo=algo,
        reference_logprobs=_flat(rows, packed, "reference_logprobs", device)
        if referenced
        else None,
        entropy=entropy,
    )
    loss, metrics = objective_loss(objective, inputs, totals)
    tally = Tally()
    tally.add("tokens", len(packed.row))
    tally.add("loss", loss.detach())
    tally.mean("entropy", entropy.detach())
    tally.add("distinct_tokens", len(packed.ids))
    tally.add("row_tokens", packed.lengths.sum())
    for name, values in metrics.items():
        tally.mean(name, values)
    if objective.supervised:
        return loss, tally
    tally.most("ratio_max", metrics["ratio_mean"])
    if first:
        d = now - rollout
        tally.mean("mismatch_mean", d.abs())
        tally.mean("mismatch_kl", d.exp() - 1 - d)
        tally.most("mismatch_max", d.abs())
    return loss, tally
