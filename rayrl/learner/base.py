"""The training step that all learners share; subclasses implement how gradients become an update.

A step is one batch: `epochs` passes of `minibatches` optimizer updates. Every rank makes the same
number of updates and, per update, the same number of forward and backward passes (a rank with fewer
micro-batches adds passes whose loss is zero), because under ZeRO 2 and 3 each is a collective.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from rayrl.config import Config
from rayrl.errors import ConfigError, DataError, RunFailed
from rayrl.learner.batch import Totals, Trajectory, count_groups, micro_batches, minibatches
from rayrl.learner.forward import (
    Tally,
    checkpoint_layers,
    idle_loss,
    load_model,
    loss_of,
    row_logprobs,
    scheduled_lr,
    with_logprobs,
)
from rayrl.learner.logits import shares_prefixes
from rayrl.learner.lora import (
    ADAPTER,
    LazyWeight,
    lazy_weights,
    plain_names,
    save_adapter,
    with_adapters,
)
from rayrl.learner.loss import SFT, Loss, Objective, resolve_loss
from rayrl.learner.probe import longest_row
from rayrl.learner.readback import misfit, probe_rows
from rayrl.types import derive_seed
from rayrl.weights.flat import Manifest, layout, put, unflatten
from rayrl.weights.loading import stored_names
from rayrl.weights.model_dir import learning_rate, micro_batch_tokens, model_dir

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Learner", "RankInfo"]

BUCKET_BYTES = 64 << 20  # of sharded weights that are gathered at once
KEPT_FILES = (  # of the start model: everything beside its config and its weights
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Which of a learner's processes one is.

    Attributes:
        rank: its number, of `world_size`.
        master_addr: host of rank 0.
        master_port: a free port there, the same for all ranks.
    """

    rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500


ALONE = RankInfo()


class Learner(ABC):
    """Trains one model, on one or more ranks; every method is called on every rank.

    Constructing one sets this process's torch threads to `learner.threads`.

    Args:
        cfg: the whole configuration.
        model_path: Hugging Face directory the stage starts from (also the KL reference).
        total_steps: length of the learning-rate schedule; default `cfg.train.steps`.
        loss: what `algo.loss` names, where this process may not be able to import it.

    Attributes:
        cfg: the configuration, with the learning rate that `learner.lr` comes to.
        steps: batches trained on; saved and loaded.
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
        torch.set_num_threads(cfg.learner.threads)
        self.model_path = model_dir(str(model_path))
        lr = learning_rate(cfg, self.model_path)
        self._micro_batch_tokens = micro_batch_tokens(cfg, self.model_path, gpu=device != "cpu")
        self.cfg = cfg = replace(cfg, learner=replace(cfg.learner, lr=lr))
        self.info = info
        self.total_steps = cfg.train.steps if total_steps is None else total_steps
        self.device = device
        self.steps = 0
        self.objective = Objective.of(cfg.algo, float(cfg.sampling.max_tokens), loss)
        self._reference: Any = None
        self.module: Any = self._load()
        self._longest = longest_row(self.module, cfg.engine.max_len)
        if cfg.lora.rank:
            self.module = with_adapters(self.module, cfg.lora, derive_seed(cfg.run.seed, "lora"))
            self.module.eval()
        if info.rank == 0:
            self._try_export()
        if cfg.learner.gradient_checkpointing:
            checkpoint_layers(self.module)
        self.model: Any = self.module  # what is called; a subclass may wrap it

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights and of what is computed."""
        dtype: torch.dtype = getattr(torch, self.cfg.learner.dtype)
        return dtype

    # Implemented by subclasses.

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
    def _gather(self, tally: Tally) -> list[Tally]:
        """The tallies of all ranks, in the order of their ranks."""

    def _whole(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Context in which these parameters are unsharded; entered by all ranks together."""
        return nullcontext()

    @abstractmethod
    def _save_state(self, folder: Path) -> None: ...

    @abstractmethod
    def _load_state(self, folder: Path) -> None: ...

    # Shared by all.

    def step(
        self, rows: Sequence[Trajectory], totals: Totals, loss: str | Loss | None = None
    ) -> dict[str, float]:
        """Train on this rank's `rows` of a batch; `totals` are the whole batch's.

        Every rank returns the same metrics: those of `Tally` over all updates and ranks (mismatch
        over the first update, whose weights the step began with), and `lr`, `grad_norm` (largest),
        `updates` made and `skipped` (updates not made because a loss or gradient was not finite).
        What was not measured has no entry: without a row there is no `entropy` and no `grad_norm`.

        Args:
            loss: for this step only, instead of `algo.loss` and its arguments; see `resolve_loss`.
        """
        algo, objective = self.cfg.algo, self.objective
        if loss is not None:
            objective = replace(objective, loss=resolve_loss(loss))
        rows = list(rows)
        if algo.epochs * algo.minibatches > 1 and algo.tis_max > 0:
            rows = with_logprobs(rows, "proximal_logprobs", self._each_row(rows))
        if algo.kl_coef > 0:
            rows = with_logprobs(rows, "reference_logprobs", self._reference_logprobs(rows))
        return self._train(rows, totals, objective, algo.epochs, algo.minibatches)

    def sft_step(self, rows: Sequence[Trajectory], totals: Totals) -> dict[str, float]:
        """One update of cross entropy on the rows' loss tokens (at temperature 1)."""
        return self._train(rows, totals, SFT, 1, 1)

    def logprobs(
        self, rows: Sequence[Trajectory], temperature: float | None = None
    ) -> list[NDArray[np.float32]]:
        """(T,) of each row under the current weights; 0 off its loss.

        Args:
            temperature: of all ids; default what each was sampled at.
        """
        values = self._each_row(rows, temperature)
        return [values[id(row)] for row in rows]

    def describe(self) -> tuple[str, int]:
        """The model's architecture, and the number of its ids."""
        plain = self.module.get_base_model() if self.cfg.lora.rank else self.module
        return type(plain).__name__, int(plain.config.get_text_config().vocab_size)

    def named_weights(self, *, adapters: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the weights by the plain model's names; called on all ranks together.

        Sharded weights are gathered a few at a time: no rank holds more than a bucket of them. A
        tensor is valid until the next one is requested. Tied weights come once, under the first
        name; adapters are merged into their layers.

        Args:
            adapters: only the adapters, under peft's names.
        """
        for bucket in _buckets(lazy_weights(self.module, adapters=adapters)):
            with self._whole([one for weight in bucket for one in weight.parameters]):
                for weight in bucket:
                    yield weight.name, weight.tensor()

    def manifest(self, *, adapters: bool = False) -> Manifest:
        """What `named_weights` yields and where `flat_weights` puts it; gathers nothing."""
        found = lazy_weights(self.module, adapters=adapters)
        return layout((one.name, one.dtype, one.shape) for one in found)

    def flat_weights(
        self, out: NDArray[np.uint8] | None = None, *, adapters: bool = False
    ) -> tuple[NDArray[np.uint8], Manifest]:
        """All weights as one buffer in this process's memory, for the replicas.

        Called on all ranks; all but rank 0 get an empty buffer.

        Args:
            out: a buffer of an earlier call to write into; fresh memory costs as much as a copy.
            adapters: as `named_weights`.
        """
        manifest = self.manifest(adapters=adapters)
        size = 0 if self.info.rank else manifest.nbytes
        flat = np.zeros(size, dtype=np.uint8) if out is None else out
        walk = self.named_weights(adapters=adapters)
        for entry, (_, tensor) in zip(manifest.entries, walk, strict=True):
            if self.info.rank == 0:
                put(flat, entry, tensor)
        return flat, manifest

    def save(self, folder: str | Path) -> None:
        """Write weights, optimizer and step into `folder`, for an exact resume by `load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_state(folder)
        if self.info.rank == 0:
            state = {"steps": self.steps, **self._layout()}
            (folder / "learner.json").write_text(json.dumps(state))
        self._reduce(torch.zeros(1), "sum")  # a barrier: no rank returns before all have written

    def load(self, folder: str | Path) -> None:
        """Continue from what `save` wrote."""
        folder = Path(folder)
        try:
            state = json.loads((folder / "learner.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder / 'learner.json'}: not a learner checkpoint ({error})"
            ) from None
        for key, value in self._layout().items():
            if state.get(key) != value:
                raise ConfigError(
                    f"{folder} was saved with {key}={state.get(key)}, but now it is "
                    f"{value}; resume with the saved value, or start from an exported model"
                )
        self._load_state(folder)
        self.steps = state["steps"]

    def export(self, folder: str | Path) -> None:
        """Write a Hugging Face directory: config, safetensors and the start model's tokenizer.

        Adapters are merged, and also written by themselves into its folder `adapter`. The files are
        read back: they must hold the learner's weights and compute its logprobs.

        Raises:
            RunFailed: on rank 0, if they do not; the message says how they differ.
        """
        folder = Path(folder)
        flat, manifest = self.flat_weights()
        rows = probe_rows(self.module.config.get_text_config().vocab_size)
        passes = self._passes(rows)
        learned = row_logprobs(self.model, rows, self._micro_batch_tokens, 1.0, passes=passes)
        adapter = {
            name: tensor.cpu().clone()
            for name, tensor in (self.named_weights(adapters=True) if self.cfg.lora.rank else ())
        }
        wrong = ""
        if self.info.rank == 0:
            weights = unflatten(flat, manifest)
            self._write(folder, weights)
            if adapter:
                save_adapter(self.module, folder / ADAPTER, adapter)
            wrong = misfit(folder, weights, rows, learned, self.dtype)
        self._reduce(torch.zeros(1), "sum")
        if wrong:
            raise RunFailed(
                f"the export in {folder} is not the learner's model: {wrong}. It is dropped; the "
                "checkpoint is kept, and the same command exports it again. Please report this, "
                f"with the architecture ({self.describe()[0]})."
            )

    def _write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a Hugging Face directory with these weights and the start model's other files."""
        plain = self.module.get_base_model() if self.cfg.lora.rank else self.module
        own = plain.generation_config
        if (self.model_path / "generation_config.json").is_file():
            plain.generation_config = GenerationConfig()  # its file is copied, valid or not
        try:
            # with the names that the start has: transformers would split fused experts
            fused = stored_names(self.model_path) <= plain_names(self.module)
            plain.save_pretrained(folder, state_dict=dict(weights), save_original_format=not fused)
        finally:
            plain.generation_config = own
        for pattern in KEPT_FILES:
            for file in self.model_path.glob(pattern):
                shutil.copy2(file, folder / file.name)

    def _try_export(self) -> None:
        """Export without weights, so that what would fail after the last step fails before any."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._write(Path(folder), {})
            except Exception as error:  # whatever transformers refuses to write
                raise ConfigError(
                    f"model.path={str(self.model_path)!r}: this model could not be exported after "
                    f"training ({type(error).__name__}: {error}). Mend config.json there, or the "
                    "file that is named."
                ) from error

    def close(self) -> None:
        """Release the reference model."""
        self._reference = None

    def _layout(self) -> dict[str, Any]:
        """Settings that must not change between saving a state and loading it, by key."""
        learner, lora = self.cfg.learner, self.cfg.lora
        return {
            "learner.world_size": self.info.world_size,
            "learner.kind": learner.kind,
            "learner.dtype": learner.dtype,
            "lora.rank": lora.rank,
        }

    def _load(self) -> Any:
        return load_model(self.model_path, self.device, self.dtype, self.cfg.engine.max_len)

    def _reference_logprobs(self, rows: Sequence[Trajectory]) -> dict[int, NDArray[np.float32]]:
        """Logprobs of the rows under the start model; with adapters, the model without them."""
        if self.cfg.lora.rank:
            passes = self._passes(rows)
            with self.module.disable_adapter():
                return row_logprobs(self.model, rows, *self._limits, passes=passes)
        if self._reference is None:
            self._reference = self._load().requires_grad_(False)
        return row_logprobs(self._reference, rows, *self._limits)

    def _passes(self, rows: Sequence[Trajectory]) -> int:
        """Forward passes of the rank with the most micro-batches."""
        mine = len(self._micros(rows))
        return int(self._reduce(torch.tensor([float(mine)]), "max"))

    def _micros(self, rows: Sequence[Trajectory]) -> list[list[Trajectory]]:
        longest = max((len(row.ids) for row in rows), default=0)
        if longest > self._longest:  # `probe.py` has not checked the model on rows this long
            raise ConfigError(
                f"engine.max_len={self.cfg.engine.max_len}: a row has {longest} ids, but a "
                f"conversation can have {self._longest}; raise it, or leave such rows out"
            )
        shared = shares_prefixes(self.module)
        return micro_batches(rows, self._micro_batch_tokens, shared=shared)

    @property
    def _limits(self) -> tuple[int, float]:
        """Tokens of a micro-batch, and the run's sampling temperature."""
        temperature = self.cfg.sampling.temperature
        if temperature <= 0:
            raise ConfigError(
                f"sampling.temperature={temperature}: training needs samples; set it above 0"
            )
        return self._micro_batch_tokens, temperature

    def _each_row(
        self, rows: Sequence[Trajectory], temperature: float | None = None
    ) -> dict[int, NDArray[np.float32]]:
        limit, sampled_at = self._limits
        for_all = temperature is not None
        at = temperature if temperature is not None else sampled_at
        passes = self._passes(rows)
        return row_logprobs(self.model, rows, limit, at, for_all=for_all, passes=passes)

    def _train(
        self,
        rows: Sequence[Trajectory],
        totals: Totals,
        objective: Objective,
        epochs: int,
        parts: int,
    ) -> dict[str, float]:
        lr = scheduled_lr(self.cfg.learner, self.steps, self.total_steps)
        whole, norms = Tally(), list[float]()
        groups = count_groups(rows)
        if parts > 1:
            groups = int(self._reduce(torch.tensor([float(groups)]), "max"))
        for epoch in range(epochs):
            for part in minibatches(rows, parts, self.cfg.run.seed, epoch, groups):
                first = epoch == 0 and not norms
                tally = self._accumulate(part, totals.share(parts), objective, first=first)
                if tally is None:
                    continue
                norms.append(self._update(lr, finite=math.isfinite(tally.sums["loss"])))
                whole.merge(tally)
        self.steps += 1
        done = [norm for norm in norms if math.isfinite(norm)]
        metrics = {**whole.metrics(), "lr": lr}
        if "loss" in metrics:
            metrics["loss"] /= len(norms)
        if norms:
            metrics["grad_norm"] = max(norms) if len(done) == len(norms) else math.nan
        return {**metrics, "updates": float(len(done)), "skipped": float(len(norms) - len(done))}

    def _accumulate(
        self, rows: Sequence[Trajectory], totals: Totals, objective: Objective, *, first: bool
    ) -> Tally | None:
        """Accumulate the gradient of one update; None where no rank has a row."""
        temperature = 1.0 if objective.supervised else self._limits[1]
        micros = self._micros(rows)
        n = self._passes(rows)
        if n == 0:
            return None
        tally = Tally()
        for i in range(n):
            if i < len(micros):
                loss, measured = loss_of(
                    self.model, micros[i], objective, totals, temperature, first=first
                )
                tally.merge(measured)
            else:
                loss = idle_loss(self.model)
            self._backward(loss, last=i == n - 1)
        over_ranks = Tally()
        for one in self._gather(tally):
            over_ranks.merge(one)
        return over_ranks


def _buckets(found: Iterable[LazyWeight]) -> Iterator[list[LazyWeight]]:
    """Consecutive weights, as many as fit into `BUCKET_BYTES`, at least one."""
    bucket: list[LazyWeight] = []
    size = 0
    for weight in found:
        more = math.prod(weight.shape) * weight.dtype.itemsize
        if bucket and size + more > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += more
    if bucket:
        yield bucket
