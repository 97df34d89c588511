"""Code inside vLLM's worker process: loads weights from a mapped file or a broadcast."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler

from rayrl.engine.vllm.adapters import FILE, file_names
from rayrl.engine.vllm.convert import MISMATCH, from_wire
from rayrl.weights.broadcast import BroadcastGroup, Rendezvous, receive
from rayrl.weights.flat import checksum, flatten, unflatten

__all__ = ["BACKEND", "Transfer", "Worker"]

BACKEND = "rayrl"


@dataclass
class Init(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not type-checked
    """The fields of a `broadcast.Rendezvous`, and the first rank of this engine's workers."""

    rendezvous: list[Any]
    first_rank: int


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A plan from `to_wire`: of one buffer in `file`, or (without a file) of a broadcast."""

    plan: list[list[Any]]
    file: str = ""


class Transfer(WeightTransferEngine[Init, Update]):  # type: ignore[misc]
    """Load all weights from a flat buffer in a file or from broadcast buckets."""

    init_info_cls = Init
    update_info_cls = Update

    digest = ""  # checksum of the weights loaded last
    group: BroadcastGroup | None = None
    mapped: tuple[str, Any] = ("", None)  # name and map of the file, rewritten for every push

    def init_transfer_engine(self, init_info: Init) -> None:
        """Join a broadcast group, after leaving any earlier one."""
        self.shutdown()
        config = self.parallel_config
        offset = config.data_parallel_index * config.world_size + config.rank
        rendezvous = Rendezvous(*init_info.rendezvous)
        self.group = BroadcastGroup(rendezvous, init_info.first_rank + offset)

    def start_weight_update(self) -> None:
        """Undo the packing and fusing of layers, so that they can load again."""
        if self.device.type == "cpu":
            # vLLM 0.32 packs experts for the CPU only when it creates their kernel: with the old
            # kernel it would compute with unpacked weights as if they were packed
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if hasattr(method, "moe_kernel"):
                    method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load weights and wait for the accelerator, if there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Load every tensor directly from the mapped file, or from buckets as they arrive."""
        plan = from_wire(update_info.plan)
        if not update_info.file:
            if self.group is None:
                raise RuntimeError("cannot receive weights before joining a broadcast group")
            self.digest = receive(plan, self.group, self.load)
            return
        if self.mapped[0] != update_info.file:
            self.mapped = (update_info.file, np.memmap(update_info.file, np.uint8, "r"))
        flat = self.mapped[1]
        with ThreadPoolExecutor(1) as executor:
            digest = executor.submit(checksum, flat)
            self.load(unflatten(flat, plan[0]).items())
            self.digest = digest.result()

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors named as in the learner's model.

        Raises:
            ValueError: names or shapes are not those of vLLM's model.
        """
        try:
            self.model.load_weights(tensors)
        except (AssertionError, KeyError, ValueError) as error:
            reason = str(error)[:300]  # vLLM lists all names of its model
            raise ValueError(f"{MISMATCH} {type(self.model).__name__}: {reason}") from error

    def finish_weight_update(self) -> None:
        """Pack and fuse the layers again for computation."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # vLLM 0.32 packs a tied output layer for the CPU only when the model starts
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Leave the broadcast group."""
        if self.group is not None:
            self.group.close()
            self.group = None


class Worker:
    """Methods that vLLM adds to its worker (`worker_extension_cls`)."""

    weight_transfer_engine: Transfer

    def rayrl_checksum(self) -> str:
        """Return the checksum of the weights loaded last."""
        return self.weight_transfer_engine.digest

    def rayrl_adapter_checksum(self, folder: str, plan: list[list[Any]]) -> str:
        """Checksum an adapter file as this process reads it, in the learner's buffer layout."""
        (manifest,) = from_wire(plan)
        names = file_names(manifest)
        with safe_open(Path(folder) / FILE, "pt") as file:
            flat, _ = flatten((name, file.get_tensor(names[name])) for name in manifest.names())
        return checksum(flat)


WeightTransferEngineFactory.register_engine(BACKEND, Transfer)


def for_each_draft(
    x: torch.Tensor,
    ends: torch.Tensor,
    count: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat a request's setting for each of its drafted tokens.

    vLLM 0.32's own has a kernel for CPUs that takes temperatures for integers and returns memory
    that nobody has written to: with speculation, ids would be sampled at any temperature.

    Args:
        x: (requests,).
        ends: (requests,) drafted tokens of the requests so far.
        count: of all drafted tokens.

    Returns:
        (count,).
    """
    drafted = ends.diff(prepend=ends.new_zeros(1))
    return x.where(x != replace_from, replace_to).repeat_interleave(drafted, output_size=count)


if current_platform.is_cpu():
    rejection_sampler.expand_batch_to_tokens = for_each_draft
