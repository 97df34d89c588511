"""The plain learner: torch, one process, nothing hidden. The DeepSpeed one must equal it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from rayrl.config import Config
from rayrl.learner.base import Learner
from rayrl.learner.forward import Tally, scheduled_lr
from rayrl.learner.loss import Loss
from rayrl.weights.loading import read_state

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
        loss: Loss | None = None,
    ) -> None:
        super().__init__(cfg, model_path, total_steps=total_steps, device=device, loss=loss)
        learner = self.cfg.learner
        self._parameters = [one for one in self.module.parameters() if one.requires_grad]
        # Updates of a bf16 weight are mostly smaller than its rounding: they are summed in fp32.
        self._masters = (
            self._parameters
            if self.dtype == torch.float32
            else [one.detach().float().requires_grad_() for one in self._parameters]
        )
        self.optimizer = torch.optim.AdamW(
            self._masters,
            lr=scheduled_lr(learner, 0, self.total_steps),
            betas=(learner.betas[0], learner.betas[1]),
            eps=learner.eps,
            weight_decay=learner.weight_decay,
            fused=self.dtype == torch.bfloat16,  # as the DeepSpeed learner's
        )

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if self._masters is not self._parameters:
            for master, parameter in zip(self._masters, self._parameters, strict=True):
                if parameter.grad is not None:
                    grad = parameter.grad.float()
                    master.grad = grad if master.grad is None else master.grad + grad
                    parameter.grad = None

    def _update(self, lr: float, *, finite: bool) -> float:
        limit = self.cfg.learner.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self._masters, limit))
        finite = finite and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self._masters is not self._parameters:
                with torch.no_grad():  # into the model's weights, rounded
                    for master, parameter in zip(self._masters, self._parameters, strict=True):
                        parameter.copy_(master)
        self.optimizer.zero_grad(set_to_none=True)
        return norm if finite else math.nan

    def _reduce(self, vector: Tensor, op: str) -> Tensor:
        return vector

    def _gather(self, tally: Tally) -> list[Tally]:
        return [tally]

    def _save_state(self, folder: Path) -> None:
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masters": [] if self._masters is self._parameters else self._masters,
        }
        torch.save(state, folder / "state.pt")

    def _load_state(self, folder: Path) -> None:
        state = read_state(folder / "state.pt")
        self.module.load_state_dict(state["model"])
        with torch.no_grad():
            for master, saved in zip(self._masters, state["masters"], strict=False):
                master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
