"""The plain learner: torch, one process, nothing hidden. The DeepSpeed one must equal it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrl.config import Config
from rayrl.learner.base import Learner

__all__ = ["ReferenceLearner"]


class ReferenceLearner(Learner):
    """AdamW on one process; arguments as `Learner`'s."""

    def __init__(
        self,
        cfg: Config,
        model_path: str | Path,
        *,
        total_steps: int | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(cfg, model_path, total_steps=total_steps, device=device)
        learner = cfg.learner
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=learner.lr,
            betas=(learner.betas[0], learner.betas[1]),
            eps=learner.eps,
            weight_decay=learner.weight_decay,
        )

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self, lr: float, *, finite: bool) -> float:
        limit = self.cfg.learner.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        finite = finite and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm if finite else math.nan

    def _reduce(self, vector: Tensor, op: str) -> Tensor:
        return vector

    def _state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.module.state_dict()
        return state

    def _save_state(self, folder: Path) -> None:
        state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "state.pt")

    def _load_state(self, folder: Path) -> None:
        state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
