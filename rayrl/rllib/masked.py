"""PPO's default network for environments that say which actions are legal."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.utils.torch_utils import FLOAT_MIN

from rayrl.errors import ConfigError

__all__ = ["MaskedPPO"]


class MaskedPPO(DefaultPPOTorchRLModule):  # type: ignore[misc]
    """PPO's default module, in which illegal actions have no probability.

    Observations are as `rayrl.to_gymnasium` makes them: `observations`, which the network sees, and
    `action_mask`, 1 for a legal action and 0 for another.
    """

    def __init__(self, *, observation_space: Any, **keywords: Any) -> None:
        try:
            box = observation_space["observations"]
        except (TypeError, KeyError):
            raise ConfigError(
                f"MaskedPPO observes a dictionary of observations and action_mask, not "
                f"{observation_space}: declare `legal=…` in the environment's observation, or use "
                "PPO's own module"
            ) from None
        super().__init__(observation_space=box, **keywords)  # which the network is built for
        self.observation_space = observation_space

    def _forward(self, batch: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        return _masked(super()._forward(_bare(batch), **keywords), batch)

    def _forward_train(self, batch: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        return _masked(super()._forward_train(_bare(batch), **keywords), batch)

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Any:
        """Values of the states, (B,)."""
        return super().compute_values(_bare(batch), embeddings)


def _bare(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, Columns.OBS: batch[Columns.OBS]["observations"]}


def _masked(outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    logits = outputs[Columns.ACTION_DIST_INPUTS]  # (B, actions)
    legal = batch[Columns.OBS]["action_mask"] > 0
    return {**outputs, Columns.ACTION_DIST_INPUTS: torch.where(legal, logits, FLOAT_MIN)}
