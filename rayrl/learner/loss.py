"""What is minimised: pure functions over the flat (N,) loss tokens of any number of rows.

Three log-probabilities of a sampled token matter, and the names here are always these:

- `logprobs`: of the policy being differentiated;
- `proximal`: of the policy at the start of the step, before its first optimizer update;
- `rollout`: recorded by the engine when it sampled.

With truncated importance sampling on (`tis_max` > 0) the objective is the decoupled one (AReaL,
arXiv 2505.24298, eq. 5): ratios and clips compare `logprobs` with `proximal`, and each token is
weighted by min(exp(proximal − rollout), tis_max), which corrects what the engine's numerics, or
weights that were a step old, did to the sample. A step of one optimizer update has proximal =
logprobs, so nothing extra is computed; a step of several computes `proximal` once, before its first
update. With it off, ratios compare `logprobs` with `rollout` directly, as the papers write them.

Deviations, numbered: (1) GSPO is its token form (eq. 17), equal in value and gradient where a row's
advantages are equal, and defined where they differ by turn. (2) A row is one conversation: its
prompts and tool results carry no loss and count in no denominator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rayrl.config import AlgoConfig
from rayrl.errors import ConfigError, did_you_mean
from rayrl.learner.batch import Totals

__all__ = [
    "SFT",
    "LossTokens",
    "Objective",
    "cispo",
    "clipped",
    "gspo",
    "kl",
    "objective_loss",
    "tis_weights",
    "token_weights",
]


@dataclass(frozen=True, slots=True)
class Objective:
    """Which loss, with its numbers; see `AlgoConfig` for their meaning.

    Attributes:
        constant: with aggregation "constant", tokens a row is divided by.
    """

    loss: str
    aggregation: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    cispo_max: float = 5.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    tis_max: float = 0.0
    constant: float = 1.0

    def __post_init__(self) -> None:
        for key, value, known in (
            ("loss", self.loss, (*LOSSES, "sft")),
            ("aggregation", self.aggregation, AGGREGATIONS),
            ("kl_estimator", self.kl_estimator, KL_ESTIMATORS),
        ):
            if value not in known:
                raise ConfigError(
                    f"algo.{key}={value!r} is not one of {', '.join(known)}."
                    f"{did_you_mean(value, known)}"
                )

    @classmethod
    def of(cls, algo: AlgoConfig, constant: float) -> Objective:
        """The objective `algo` describes."""
        return cls(
            loss=algo.loss,
            aggregation=algo.aggregation,
            clip_low=algo.clip_low,
            clip_high=algo.clip_high,
            cispo_max=algo.cispo_max,
            entropy_coef=algo.entropy_coef,
            kl_coef=algo.kl_coef,
            kl_estimator=algo.kl_estimator,
            tis_max=algo.tis_max,
            constant=constant,
        )


@dataclass(frozen=True, slots=True, eq=False)
class LossTokens:
    """N loss tokens of `n_rows` whole rows, flat.

    Attributes:
        row: (N,) int64, which row each belongs to.
        advantages: (N,).
        rollout: (N,) log-probabilities the engine recorded.
        proximal: (N,), or None where the step has one update and they equal the current ones.
        reference: (N,) of the reference policy, or None without a KL term.
        entropy: (N,) of the current policy where each was drawn, in nats and with gradient; None
            without an entropy bonus.
    """

    row: Tensor
    n_rows: int
    advantages: Tensor
    rollout: Tensor
    proximal: Tensor | None = None
    reference: Tensor | None = None
    entropy: Tensor | None = None


# (objective, logprobs, old, advantages, row, n_rows) -> loss a token (N,), where clipped (N,)
_Loss = Callable[[Objective, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """−min(r·A, clip(r, 1−low, 1+high)·A), and where the clip has cut the gradient.

    PPO (arXiv 1707.06347, eq. 7), used by GRPO (2402.03300, eq. 3); high > low is DAPO's
    clip-higher (2503.14476, eq. 10).
    """
    bounded = ratio.clamp(1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    cut = ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
    return loss, cut


def _grpo(
    o: Objective, logprobs: Tensor, old: Tensor, advantages: Tensor, row: Tensor, n_rows: int
) -> tuple[Tensor, Tensor]:
    return clipped((logprobs - old).exp(), advantages, o.clip_low, o.clip_high)


def cispo(logprobs: Tensor, old: Tensor, advantages: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    """−sg(min(r, upper))·A·logprob, and where r was truncated (MiniMax-M1, 2506.13585, eq. 4–5).

    The *weight* is clipped, not the update: every token keeps a gradient. There is no lower bound,
    as in the paper's experiments.
    """
    ratio = (logprobs.detach() - old).exp()
    return -ratio.clamp(max=upper) * advantages * logprobs, ratio > upper


def _cispo(
    o: Objective, logprobs: Tensor, old: Tensor, advantages: Tensor, row: Tensor, n_rows: int
) -> tuple[Tensor, Tensor]:
    return cispo(logprobs, old, advantages, o.cispo_max)


def gspo(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    row: Tensor,
    n_rows: int,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """The clipped objective on each row's sequence ratio (GSPO, arXiv 2507.18071, eq. 5, 7, 17).

    s = exp(mean over the row of logprobs − old), the geometric mean of its tokens' ratios. Every
    token has value s and, by the stop-gradient, gradient s·∇logprob.
    """
    difference = logprobs - old
    count = torch.bincount(row, minlength=n_rows).clamp(min=1)
    mean = difference.new_zeros(n_rows).index_add(0, row, difference.detach()) / count
    ratio = (mean[row] + logprobs - logprobs.detach()).exp()
    return clipped(ratio, advantages, low, high)


def _gspo(
    o: Objective, logprobs: Tensor, old: Tensor, advantages: Tensor, row: Tensor, n_rows: int
) -> tuple[Tensor, Tensor]:
    return gspo(logprobs, old, advantages, row, n_rows, o.clip_low, o.clip_high)


LOSSES: dict[str, _Loss] = {"grpo": _grpo, "cispo": _cispo, "gspo": _gspo}
AGGREGATIONS = ("token", "sequence", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")


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


SFT = Objective(loss="sft")
"""Cross entropy, averaged over all loss tokens of the batch."""


def objective_loss(
    objective: Objective, logprobs: Tensor, tokens: LossTokens, totals: Totals
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of the batch's loss that these tokens make: a scalar to add up and differentiate.

    Args:
        logprobs: (N,) of the current policy, with gradient.
        totals: denominators of the *whole* batch, so that parts add up to the batch's loss.

    Returns:
        The scalar, and (N,) detached tensors for the metrics: `ratio`, `clipped`, `log_ratio`,
        and where they apply `tis` and `kl`.
    """
    weights = token_weights(
        objective.aggregation, tokens.row, tokens.n_rows, totals, objective.constant
    ).to(logprobs.dtype)
    now = logprobs.detach()
    if objective.loss == "sft":
        return -(weights * logprobs).sum(), {}
    proximal = now if tokens.proximal is None else tokens.proximal
    old = proximal if objective.tis_max > 0 else tokens.rollout
    loss, cut = LOSSES[objective.loss](
        objective, logprobs, old, tokens.advantages, tokens.row, tokens.n_rows
    )
    terms = {"log_ratio": now - old, "ratio": (now - old).exp(), "clipped": cut}
    if objective.tis_max > 0:
        tis = tis_weights(proximal, tokens.rollout, objective.tis_max)
        loss = loss * tis
        terms["tis"] = tis
    if tokens.reference is not None and objective.kl_coef > 0:
        divergence = kl(logprobs, tokens.reference, objective.kl_estimator)
        loss = loss + objective.kl_coef * divergence
        terms["kl"] = divergence.detach()
    if tokens.entropy is not None:  # the bonus of A3C (arXiv 1602.01783, section 4)
        loss = loss - objective.entropy_coef * tokens.entropy
    return (weights * loss).sum(), terms
