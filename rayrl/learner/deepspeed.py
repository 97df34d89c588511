"""The learner on DeepSpeed: one rank, ZeRO 0 to 3, CPU (gloo) or GPU (nccl).

DeepSpeed accumulates, reduces, clips and applies gradients; the loss and the division of rows are
in `base.py` and `forward.py`. Four of DeepSpeed's ways need attention:

- It averages gradients over ranks, while a rank's loss is its part of a *sum*: the loss is
  multiplied by the world size.
- Gradient accumulation has no fixed length here, so its boundary is set by hand for every pass.
- bf16 with fp32 masters and sums of gradients is part of its ZeRO, so it needs stage 1 or more.
- In fp32 it does not check for overflow. The client optimizer does: it is the one place that every
  ZeRO stage reaches with reduced gradients, once per update, before weights or moments change.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayrl.config import Config, LearnerConfig
from rayrl.errors import ConfigError
from rayrl.learner.base import ALONE, Learner, RankInfo
from rayrl.learner.forward import Tally, scheduled_lr
from rayrl.learner.lora import adapts_fused_weights
from rayrl.learner.loss import Loss
from rayrl.weights.loading import read_state
from rayrl.weights.model_dir import is_pretrained

__all__ = ["DeepSpeedLearner"]

TAG = "state"  # name DeepSpeed gives a checkpoint inside its folder
TIMEOUT = timedelta(minutes=10)  # for one collective, when a rank has died without closing


class _GuardedAdamW(torch.optim.AdamW):
    """AdamW that makes no update if `veto` is set or any rank's gradient is not finite."""

    veto = False
    skipped = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update unless vetoed; `skipped` says which happened."""
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        present = [grad for grad in grads if grad is not None and grad.numel()]
        bad = torch.zeros(1)
        if present:  # its extremes are not finite where any element is not
            ends = torch.stack([end for grad in present for end in grad.aminmax()])
            bad[0] = float(not bool(ends.isfinite().all()))
        if dist.get_world_size() > 1:
            bad = bad.to(present[0].device) if dist.get_backend() == "nccl" and present else bad
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if self.veto or bool(bad):
            self.skipped = True
        else:
            super().step()


class DeepSpeedLearner(Learner):
    """One rank; all ranks construct it and call every method together.

    Arguments as `Learner`'s. All learners of a process share its process group.
    """

    def __init__(
        self,
        cfg: Config,
        model_path: str | Path,
        *,
        info: RankInfo = ALONE,
        total_steps: int | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
    ) -> None:
        super().__init__(
            cfg, model_path, info=info, total_steps=total_steps, device=device, loss=loss
        )
        if cfg.learner.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"learner.zero_stage={cfg.learner.zero_stage}: choose 0, 1, 2 or 3")
        if cfg.learner.zero_stage == 3 and adapts_fused_weights(self.module):
            raise ConfigError(
                f"learner.zero_stage=3: lora.targets={list(cfg.lora.targets)} has adapters on "
                "fused experts or routers, whose weights peft needs before DeepSpeed gathers them; "
                "set learner.zero_stage=2, or name other layers, as lora.targets=[q_proj,v_proj]."
            )
        os.environ.update(
            RANK=str(info.rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(info.world_size),
            DS_ACCELERATOR="cpu" if device == "cpu" else "cuda",
        )
        alone = info.world_size == 1
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo" if device == "cpu" else "nccl",
                # One rank needs no port, so it cannot meet one that is taken.
                store=dist.HashStore() if alone else None,  # type: ignore[attr-defined]
                init_method=None if alone else f"tcp://{info.master_addr}:{info.master_port}",
                rank=info.rank,
                world_size=info.world_size,
                timeout=TIMEOUT,
            )
        # What the backward pass has freed goes back to the system before the optimizer needs as
        # much again: 0.4 GiB less at the peak of 135M parameters, for 0.1 s.
        large = device == "cpu" and is_pretrained(self.model_path)
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if large else None  # glibc's
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        with _quiet():
            import deepspeed

            self._deepspeed = deepspeed
            # Its shared-memory collectives are a C++ extension compiled on first use; gloo will do.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            self.optimizer = self._make_optimizer(self.cfg.learner)
            self.model, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=self.optimizer,
                config=self._settings(cfg.learner),
            )
            self.model.checkpoint_engine.load = _read  # its own would run whatever a file says

    def _make_optimizer(self, learner: LearnerConfig) -> _GuardedAdamW:
        return _GuardedAdamW(
            [one for one in self.module.parameters() if one.requires_grad],
            lr=scheduled_lr(learner, 0, self.total_steps),
            betas=(learner.betas[0], learner.betas[1]),
            eps=learner.eps,
            weight_decay=learner.weight_decay,
            # One pass over memory instead of ten, where there is much of it. Not in fp32: its last
            # bits are others, and small models gain nothing.
            fused=self.dtype == torch.bfloat16,
        )

    def _settings(self, learner: LearnerConfig) -> dict[str, Any]:
        numel = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        bucket = min(1 << 25, numel + 1024)  # gradients; the default would take 2 GB for any model
        return {
            "train_micro_batch_size_per_gpu": 1,  # unused: rows are divided before they get here
            "gradient_accumulation_steps": 1,
            # Without ZeRO it clips but does not tell the norm; with, it needs a bound to have one.
            "gradient_clipping": (learner.max_grad_norm or 1e30) if learner.zero_stage else 0.0,
            "bf16": {
                "enabled": self.dtype == torch.bfloat16,
                # Each gradient is added to its sum in fp32 and freed as soon as it is there.
                "immediate_grad_update": True,
            },
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 1 << 62,
            "zero_allow_untested_optimizer": True,  # a subclass of AdamW
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": learner.zero_stage,
                "overlap_comm": False,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "sub_group_size": 10**12,
            },
        }

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * self.info.world_size)

    def _update(self, lr: float, *, finite: bool) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.veto, self.optimizer.skipped = not finite, False
        if self._trim is not None:
            self._trim(0)
        norm: Any = None
        if self.cfg.learner.zero_stage == 0:
            limit = self.cfg.learner.max_grad_norm or math.inf
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        self.model.step()
        if norm is None:
            norm = self.model.get_global_grad_norm()
        return math.nan if self.optimizer.skipped or norm is None else float(norm)

    def _reduce(self, vector: Tensor, op: str) -> Tensor:
        if self.info.world_size > 1:
            vector = vector.to(self.device)
            dist.all_reduce(vector, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        return vector.cpu()

    def _gather(self, tally: Tally) -> list[Tally]:
        if self.info.world_size == 1:
            return [tally]
        # as objects: a loss may name metrics that another rank has not met
        tallies: list[Any] = [None] * self.info.world_size
        dist.all_gather_object(tallies, tally)
        return tallies

    @contextlib.contextmanager
    def _whole(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        if self.cfg.learner.zero_stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(parameters)):
            yield

    def _save_state(self, folder: Path) -> None:
        with _quiet():
            self.model.save_checkpoint(str(folder), tag=TAG)

    def _load_state(self, folder: Path) -> None:
        with _quiet():
            self.model.load_checkpoint(str(folder), tag=TAG)

    def close(self) -> None:
        """Destroy the process group; this process can use no learner afterwards."""
        super().close()
        dist.destroy_process_group()

    def _layout(self) -> dict[str, Any]:
        return {**super()._layout(), "learner.zero_stage": self.cfg.learner.zero_stage}


def _read(path: str, map_location: Any = None) -> dict[str, Any]:
    """Load what DeepSpeed saved; besides tensors and plain data it holds these classes only."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
    return read_state(path, map_location or "cpu", known)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence DeepSpeed's output at a start, logged and printed, but for errors."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
