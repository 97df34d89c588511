"""What is minimised: pure functions over the flat (N,) loss tokens of any number of rows.

A loss is a function `(inputs: LossInputs) -> LossOutputs`: one number per loss token, and per-token
metrics. `objective_loss` puts around every loss what is the same for all: the TIS weight, the KL
and entropy terms, the aggregation.

Log-probabilities of a sampled token, by these names everywhere:

- `logprobs`: of the policy being differentiated;
- `proximal_logprobs`: of the policy at the start of the step, before its first optimizer update;
- `rollout_logprobs`: recorded by the engine when it sampled;
- `old_logprobs`: what ratios and clips compare `logprobs` with, one of the two above.

With truncated importance sampling on (`tis_max` > 0) the objective is the decoupled one (AReaL,
arXiv 2505.24298, eq. 5): `old_logprobs` are the proximal ones, and each token is weighted by
min(exp(proximal − rollout), tis_max), which corrects what the engine's numerics, or weights that
were a step old, did to the sample. A step of one optimizer update has proximal = logprobs, so
nothing extra is computed; a step of several computes the proximal ones once, before its first
update. With it off, `old_logprobs` are those of the rollout, as the papers write the ratio.

Deviations, numbered: (1) GSPO is its token form (eq. 17), equal in value and gradient where a row's
advantages are equal, and defined where they differ by turn. (2) A row is one conversation: its
prompts and tool results carry no loss and count in no denominator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayrl.config import AlgoConfig
from rayrl.config.registry import Registry, function_name
from rayrl.errors import ConfigError, did_you_mean
from rayrl.learner.batch import Totals

__all__ = [
    "LOSSES",
    "SFT",
    "Loss",
    "LossInputs",
    "LossOutputs",
    "Objective",
    "cispo",
    "clipped",
    "cross_entropy",
    "grpo",
    "gspo",
    "kl",
    "objective_loss",
    "resolve_loss",
    "tis_weights",
    "token_weights",
]


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """N loss tokens of `n_rows` whole rows, flat, on the learner's device.

    Attributes:
        logprobs: (N,) of the current policy at the sampled ids, with gradient.
        old_logprobs: (N,) what ratios compare with: of the policy before the step's first update if
            `algo.tis_max` > 0, else `rollout_logprobs`.
        rollout_logprobs: (N,) recorded by the engine when it sampled.
        advantages: (N,).
        row: (N,) int64, the row of each token, from 0.
        n_rows: rows; one without a loss token is possible.
        algo: settings, of which a loss reads what it needs.
        reference_logprobs: (N,) of the model the stage started from; None if `algo.kl_coef` is 0.
        entropy: (N,) of the current policy's distribution each id was drawn from, in nats; with
            gradient if `algo.entropy_coef` > 0.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    row: Tensor
    n_rows: int
    algo: AlgoConfig
    reference_logprobs: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LossOutputs:
    """What a loss returns.

    Attributes:
        loss: (N,) with gradient, the loss per token before any weight: `algo.aggregation` divides.
        metrics: name -> (N,) numbers or bools, whose mean over all loss tokens of the step is
            logged as `loss/NAME`; `clip_fraction` as it is, since all losses that clip share it.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


Loss = Callable[..., LossOutputs]
"""`(inputs: LossInputs, **algo.loss_args) -> LossOutputs`."""

LOSSES: Registry[Loss] = Registry("algo.loss")
AGGREGATIONS = ("token", "sequence", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """−min(r·A, clip(r, 1−low, 1+high)·A), and where the clip has cut the gradient.

    PPO (arXiv 1707.06347, eq. 7), used by GRPO (2402.03300, eq. 3); high > low is DAPO's
    clip-higher (2503.14476, eq. 10).
    """
    bounded = ratio.clamp(1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    cut = ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
    return loss, cut


@LOSSES.register("grpo")
def grpo(inputs: LossInputs) -> LossOutputs:
    """The clipped objective on each token's own ratio, exp(logprob − old)."""
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    algo = inputs.algo
    loss, cut = clipped(ratio, inputs.advantages, algo.clip_low, algo.clip_high)
    return LossOutputs(loss, {"clip_fraction": cut})


@LOSSES.register("cispo")
def cispo(inputs: LossInputs) -> LossOutputs:
    """−sg(min(r, cispo_max))·A·logprob, and where r was truncated (2506.13585, eq. 4–5).

    MiniMax-M1's. The *weight* is clipped, not the update: every token keeps a gradient. There is no
    lower bound, as in the paper's experiments.
    """
    upper = inputs.algo.cispo_max
    ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp()
    loss = -ratio.clamp(max=upper) * inputs.advantages * inputs.logprobs
    return LossOutputs(loss, {"clip_fraction": ratio > upper})


@LOSSES.register("gspo")
def gspo(inputs: LossInputs) -> LossOutputs:
    """The clipped objective on each row's sequence ratio (GSPO, arXiv 2507.18071, eq. 5, 7, 17).

    s = exp(mean over the row of logprobs − old), the geometric mean of its tokens' ratios. Every
    token has value s and, by the stop-gradient, gradient s·∇logprob.
    """
    row, logprobs, algo = inputs.row, inputs.logprobs, inputs.algo
    difference = logprobs - inputs.old_logprobs
    count = torch.bincount(row, minlength=inputs.n_rows).clamp(min=1)
    mean = difference.new_zeros(inputs.n_rows).index_add(0, row, difference.detach()) / count
    ratio = (mean[row] + logprobs - logprobs.detach()).exp()
    loss, cut = clipped(ratio, inputs.advantages, algo.clip_low, algo.clip_high)
    return LossOutputs(loss, {"clip_fraction": cut})


def cross_entropy(inputs: LossInputs) -> LossOutputs:
    """−logprob: supervised learning."""
    return LossOutputs(-inputs.logprobs)


def resolve_loss(loss: str | Loss, arguments: Mapping[str, Any] | None = None) -> Loss:
    """A loss that takes `LossInputs` alone.

    Args:
        loss: a name in `LOSSES`, `module:function`, `path/to/file.py:function`, or a function.
        arguments: its keyword arguments (`algo.loss_args`).

    Raises:
        ConfigError: there is no such function, or it does not take the arguments.
    """
    function, arguments = LOSSES.resolve(loss), arguments or {}
    signature = inspect.signature(function)
    try:
        signature.bind(None, **arguments)
    except TypeError as error:
        wrong = next((name for name in arguments if name not in signature.parameters), "")
        near = did_you_mean(wrong, list(signature.parameters)[1:])
        raise ConfigError(
            f"algo.loss_args={dict(arguments)}: {function_name(function)}{signature} is called "
            f"with LossInputs and these: {error}.{near}"
        ) from None
    return partial(function, **arguments) if arguments else function


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss, and the settings of what is put around it.

    Attributes:
        algo: of which `aggregation`, `tis_max`, `kl_coef`, `kl_estimator` and `entropy_coef` are
            used here, others by the loss.
        loss: takes `LossInputs` alone.
        constant: with aggregation "constant", tokens a row is divided by.
    """

    algo: AlgoConfig
    loss: Loss
    constant: float = 1.0

    @classmethod
    def of(cls, algo: AlgoConfig, constant: float = 1.0, loss: Loss | None = None) -> Objective:
        """The objective `algo` describes.

        Args:
            loss: what `algo.loss` names, where this process may not be able to import it.

        Raises:
            ConfigError: an unknown name, or arguments that the loss does not take.
        """
        for key, value, known in (
            ("aggregation", algo.aggregation, AGGREGATIONS),
            ("kl_estimator", algo.kl_estimator, KL_ESTIMATORS),
        ):
            if value not in known:
                raise ConfigError(
                    f"algo.{key}={value!r} is not one of {', '.join(known)}."
                    f"{did_you_mean(value, known)}"
                )
        return cls(algo, resolve_loss(loss or algo.loss, algo.loss_args), constant)

    @property
    def supervised(self) -> bool:
        """Whether it learns from given text: nothing was sampled, so no ratio has a meaning."""
        return self.loss is cross_entropy


SFT = Objective(AlgoConfig(tis_max=0.0), cross_entropy)
"""Cross entropy, averaged over all loss tokens of the batch."""


def tis_weights(proximal: Tensor, rollout: Tensor, upper: float) -> Tensor:
    """(N,) min(exp(proximal − rollout), upper): truncated importance sampling (Yao et al. 2025)."""
    return (proximal - rollout).exp().clamp(max=upper)


def kl(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """(N,) estimates of KL(policy ‖ reference) at tokens the policy sampled (Schulman, 2020).

    With d = logprobs − reference: k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d. As a *loss* k1 has no
    expected gradient on fresh samples, k2 has the gradient of the KL itself, and k3 is GRPO's.
    """
    d = logprobs - reference
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return (-d).exp() - 1 + d


def token_weights(
    aggregation: str, row: Tensor, n_rows: int, totals: Totals, constant: float
) -> Tensor:
    """(N,) float64 what each token's loss is multiplied by before everything is summed.

    - "token": 1 / (loss tokens of the batch). DAPO, eq. 8.
    - "sequence": 1 / (loss tokens of its row × rows of the batch). GRPO, eq. 3.
    - "constant": 1 / (constant × rows of the batch). Dr. GRPO (arXiv 2503.20783, listing 1).
    """
    if aggregation == "sequence":
        count = torch.bincount(row, minlength=n_rows).double()
        return 1 / (count[row] * totals.rows)
    each = totals.tokens if aggregation == "token" else constant * totals.rows
    return torch.full(row.shape, 1 / each, dtype=torch.float64, device=row.device)


def objective_loss(
    objective: Objective, inputs: LossInputs, totals: Totals
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of the batch's loss that these tokens make: a scalar to add up and differentiate.

    Args:
        totals: denominators of the *whole* batch, so that parts add up to the batch's loss.

    Returns:
        The scalar, and by metric (N,) detached values whose mean is logged: those of the loss, and
        unless supervised `ratio_mean`, `approx_kl`, and where they apply `tis_truncated` and `kl`.

    Raises:
        ConfigError: the loss returned something else than `LossOutputs` of N tokens.
    """
    algo = objective.algo
    weights = token_weights(
        algo.aggregation, inputs.row, inputs.n_rows, totals, objective.constant
    ).to(inputs.logprobs.dtype)
    outputs = objective.loss(inputs)
    _check(objective.loss, outputs, inputs)
    loss = outputs.loss
    log_ratio = inputs.logprobs.detach() - inputs.old_logprobs
    ratio = log_ratio.exp()
    metrics: dict[str, Tensor] = {}
    if not objective.supervised:
        metrics |= {"ratio_mean": ratio, "approx_kl": ratio - 1 - log_ratio}
    for name, values in outputs.metrics.items():
        metrics[name if name == "clip_fraction" else f"loss/{name}"] = values.detach()
    if algo.tis_max > 0:
        tis = tis_weights(inputs.old_logprobs, inputs.rollout_logprobs, algo.tis_max)
        loss = loss * tis
        metrics["tis_truncated"] = tis >= algo.tis_max
    if algo.kl_coef > 0 and inputs.reference_logprobs is not None:
        divergence = kl(inputs.logprobs, inputs.reference_logprobs, algo.kl_estimator)
        loss = loss + algo.kl_coef * divergence
        metrics["kl"] = divergence.detach()
    if algo.entropy_coef > 0 and inputs.entropy is not None:
        # the bonus of A3C (arXiv 1602.01783, section 4)
        loss = loss - algo.entropy_coef * inputs.entropy
    return (weights * loss).sum(), metrics


def _check(loss: Loss, outputs: object, inputs: LossInputs) -> None:
    """Refuse what a loss from outside may return by mistake, before it is trained on."""
    name = f"the loss {function_name(loss)} returned"
    if not isinstance(outputs, LossOutputs):
        raise ConfigError(f"{name} a {type(outputs).__name__}; return LossOutputs(loss, metrics).")
    n = tuple(inputs.logprobs.shape)
    for what, value in (("loss", outputs.loss), *outputs.metrics.items()):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != n:
            raise ConfigError(
                f"{name} {what!r} of shape {shape}, but there are {n} loss tokens; return a tensor "
                "with one number per token and leave their mean to algo.aggregation."
            )
    if inputs.logprobs.requires_grad and not outputs.loss.requires_grad:
        raise ConfigError(f"{name} a loss without gradient; compute it from inputs.logprobs.")
