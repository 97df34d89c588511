"""What every learner does in a step; subclasses say how gradients become an update.

A step is one batch: `epochs` passes of `minibatches` optimizer updates. Every rank makes the same
number of updates and, inside one, the same number of micro-batches (a rank with less to do runs
fillers of weight zero), because under ZeRO 2 and 3 each forward and backward pass is a collective.
"""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayrl.batch import Totals, Trajectory, micro_batches, minibatches
from rayrl.config import Config
from rayrl.errors import ConfigError, DataError
from rayrl.learner.step import (
    Tally,
    filler,
    load_model,
    loss_of,
    rate,
    row_logprobs,
    with_logprobs,
)
from rayrl.loss import SFT, Objective
from rayrl.types import derive_seed
from rayrl.weights import Manifest, flatten

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Learner"]

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)


class Learner(ABC):
    """Trains one model. Rank `rank` of `world_size`; every method is called on every rank.

    Constructing one sets this process's torch threads to `learner.threads`.

    Args:
        cfg: the whole configuration.
        model_path: Hugging Face directory the stage starts from (also the KL reference).
        total_steps: length of the learning-rate schedule; default `cfg.train.steps`.

    Attributes:
        steps: batches done; saved and loaded.
    """

    def __init__(
        self,
        cfg: Config,
        model_path: str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        total_steps: int | None = None,
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(cfg.learner.threads)
        self.cfg = cfg
        self.model_path = Path(model_path)
        self.rank, self.world_size = rank, world_size
        self.total_steps = cfg.train.steps if total_steps is None else total_steps
        self.device = device
        self.steps = 0
        self.objective = Objective.of(cfg.algo, constant=float(cfg.sampling.max_tokens))
        self._reference: Any = None
        self.module: Any = load_model(model_path, device)
        self.model: Any = self.module  # what is called; a subclass may wrap it

    # What a subclass adds.

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this rank's part of the loss; `last` before the update."""

    @abstractmethod
    def _update(self, lr: float, *, finite: bool) -> float:
        """Clip and apply the accumulated gradient, then clear it.

        Returns the gradient's norm over all ranks before clipping; where it, or the loss
        (`finite`), is not finite, nothing is applied and the norm returned is not finite.
        """

    @abstractmethod
    def _reduce(self, vector: Tensor, op: str) -> Tensor:
        """`vector` reduced over ranks by "sum" or "max"."""

    @abstractmethod
    def _state_dict(self) -> dict[str, Tensor]:
        """All weights by name, on every rank."""

    @abstractmethod
    def _save_state(self, folder: Path) -> None: ...

    @abstractmethod
    def _load_state(self, folder: Path) -> None: ...

    # What is the same for all.

    def step(self, rows: Sequence[Trajectory], totals: Totals) -> dict[str, float]:
        """Train on this rank's `rows` of a batch; `totals` are the whole batch's.

        Every rank returns the same metrics: those of `Tally` over all updates and ranks (mismatch
        over the first update, whose weights the step began with), and `lr`, `grad_norm` (largest),
        `updates` made and `skipped` (updates not made because a loss or gradient was not finite).
        """
        algo = self.cfg.algo
        rows = list(rows)
        if algo.epochs * algo.minibatches > 1 and self.objective.tis_max > 0:
            rows = with_logprobs(rows, "proximal", self._each_row(rows))
        if self.objective.kl_coef > 0:
            if self._reference is None:
                self._reference = load_model(self.model_path, self.device).requires_grad_(False)
            values = row_logprobs(self._reference, rows, *self._limits)
            rows = with_logprobs(rows, "reference", values)
        return self._train(rows, totals, self.objective, algo.epochs, algo.minibatches)

    def sft_step(self, rows: Sequence[Trajectory], totals: Totals) -> dict[str, float]:
        """One update of cross entropy on the rows' loss tokens (at temperature 1)."""
        return self._train(rows, totals, SFT, 1, 1)

    def logprobs(self, rows: Sequence[Trajectory]) -> list[NDArray[np.float32]]:
        """(T,) of each row under the current weights and sampling temperature; 0 off its loss."""
        values = self._each_row(rows)
        return [values[id(row)] for row in rows]

    def flat_weights(self) -> tuple[NDArray[np.uint8], Manifest]:
        """All weights as one buffer, for the replicas."""
        return flatten(self._state_dict())

    def save(self, folder: str | Path) -> None:
        """Write weights, optimizer and step into `folder`, for an exact resume by `load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_state(folder)
        if self.rank == 0:
            state = {"steps": self.steps, "world_size": self.world_size, **self._layout()}
            (folder / "learner.json").write_text(json.dumps(state))
        self._reduce(torch.zeros(1), "sum")  # nobody returns before everybody has written

    def load(self, folder: str | Path) -> None:
        """Continue from what `save` wrote."""
        folder = Path(folder)
        try:
            state = json.loads((folder / "learner.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder / 'learner.json'}: not a learner checkpoint ({error})"
            ) from None
        here = {"world_size": self.world_size, **self._layout()}
        for key, value in here.items():
            if state.get(key) != value:
                raise ConfigError(
                    f"{folder} was saved with learner.{key}={state.get(key)}, but now it is "
                    f"{value}; resume with the saved value, or start from an exported model"
                )
        self._load_state(folder)
        self.steps = state["steps"]

    def export(self, folder: str | Path) -> None:
        """Write a Hugging Face directory: config, safetensors and the start model's tokenizer."""
        weights = self._state_dict()
        if self.rank == 0:
            folder = Path(folder)
            self.module.save_pretrained(folder, state_dict=weights)
            for pattern in TOKENIZER_FILES:
                for file in self.model_path.glob(pattern):
                    shutil.copy2(file, folder / file.name)
        self._reduce(torch.zeros(1), "sum")

    def close(self) -> None:
        """Let go of what outlives a step."""
        self._reference = None

    def _layout(self) -> dict[str, Any]:
        """Settings that a saved state can only be loaded under, by their `learner.` keys."""
        return {"kind": self.cfg.learner.kind}

    @property
    def _limits(self) -> tuple[int, float]:
        """Tokens of a micro-batch, and the temperature that the rows were sampled at."""
        temperature = self.cfg.sampling.temperature
        if temperature <= 0:
            raise ConfigError(
                f"sampling.temperature={temperature}: training needs samples; set it above 0"
            )
        return self.cfg.learner.micro_batch_tokens, temperature

    def _each_row(self, rows: Sequence[Trajectory]) -> dict[int, NDArray[np.float32]]:
        limit, temperature = self._limits
        passes = int(self._reduce(torch.tensor([float(len(micro_batches(rows, limit)))]), "max"))
        return row_logprobs(self.model, rows, limit, temperature, passes=passes)

    def _train(
        self,
        rows: Sequence[Trajectory],
        totals: Totals,
        objective: Objective,
        epochs: int,
        parts: int,
    ) -> dict[str, float]:
        lr = rate(self.cfg.learner, self.steps, self.total_steps)
        whole, norms, updates = Tally(), [0.0], 0
        for epoch in range(epochs):
            seed = derive_seed(self.cfg.run.seed, "minibatches", self.steps, epoch)
            for part in minibatches(rows, parts, seed):
                first = epoch == 0 and not updates
                tally = self._accumulate(part, totals.share(parts), objective, first=first)
                if tally is None:
                    continue
                updates += 1
                loss = tally.metrics()["loss"]
                norms.append(self._update(lr, finite=math.isfinite(loss)))
                whole.merge(tally)
        self.steps += 1
        done = [norm for norm in norms[1:] if math.isfinite(norm)]
        return {
            **whole.metrics(),
            "loss": whole.metrics()["loss"] / max(1, updates),
            "lr": lr,
            "grad_norm": max(norms) if all(map(math.isfinite, norms)) else math.nan,
            "updates": float(len(done)),
            "skipped": float(updates - len(done)),
        }

    def _accumulate(
        self, rows: Sequence[Trajectory], totals: Totals, objective: Objective, *, first: bool
    ) -> Tally | None:
        """Add up the gradient of one update; None where no rank has a row."""
        limit, temperature = self.cfg.learner.micro_batch_tokens, 1.0
        if objective.loss != "sft":
            limit, temperature = self._limits
        micros = micro_batches(rows, limit)
        n = int(self._reduce(torch.tensor([float(len(micros))]), "max"))
        if n == 0:
            return None
        tally = Tally()
        for i in range(n):
            work = i < len(micros)
            batch = micros[i] if work else [filler()]
            loss, figures = loss_of(self.model, batch, objective, totals, temperature, first=first)
            self._backward(loss if work else loss * 0, last=i == n - 1)
            if work:
                tally.merge(figures)
        tally.sums = self._reduce(tally.sums, "sum")
        tally.maxima = self._reduce(tally.maxima, "max")
        return tally
