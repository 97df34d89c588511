"""What runs inside vLLM's worker process: takes weights over from a mapped file or a channel."""

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

from rayrl.engine.vllm.adapters import FILE, file_names
from rayrl.engine.vllm.wire import MISFIT, from_wire
from rayrl.weights.broadcast import BroadcastGroup, Rendezvous, receive
from rayrl.weights.flat import checksum, flatten, unflatten

__all__ = ["BACKEND", "Transfer", "Worker"]

BACKEND = "rayrl"


@dataclass
class Init(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not type-checked
    """A `broadcast.Rendezvous` with a learner, and the first rank of this engine's workers."""

    meeting: list[Any]
    first: int


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What comes, as `to_wire` has it: as one buffer in a file, or (no file) over the channel."""

    plan: list[list[Any]]
    file: str = ""


class Transfer(WeightTransferEngine[Init, Update]):  # type: ignore[misc]
    """Loads all weights, from a flat buffer in a file or from a channel's buckets."""

    init_info_cls = Init
    update_info_cls = Update

    digest = ""  # of what was loaded last
    channel: BroadcastGroup | None = None
    mapped: tuple[str, Any] = ("", None)  # the file, which is written anew for every push

    def init_transfer_engine(self, init_info: Init) -> None:
        """Meet the learner; an older channel is left first."""
        self.shutdown()
        config = self.parallel_config
        rank = init_info.first + config.data_parallel_index * config.world_size + config.rank
        self.channel = BroadcastGroup(Rendezvous(*init_info.meeting), rank)

    def start_weight_update(self) -> None:
        """Undo what loading did to the layers (packing, fusing), so that they can load again."""
        if self.device.type == "cpu":
            # vLLM 0.32 packs experts for the CPU only when it makes their kernel: without a new one
            # it would compute with unpacked weights as if they were packed
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if hasattr(method, "moe_kernel"):
                    method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load; on the CPU there is no accelerator to wait for."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Load every tensor, straight from the mapped file or from the buckets as they come."""
        plan = from_wire(update_info.plan)
        if not update_info.file:
            if self.channel is None:
                raise RuntimeError("weights were to come over a channel that was never opened")
            self.digest = receive(plan, self.channel, self.load)
            return
        if self.mapped[0] != update_info.file:
            self.mapped = (update_info.file, np.memmap(update_info.file, np.uint8, "r"))
        flat = self.mapped[1]
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(checksum, flat)
            self.load(unflatten(flat, plan[0]).items())
            self.digest = digest.result()

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load some of them, by the names that the learner's model gives them."""
        try:
            self.model.load_weights(tensors)
        except (AssertionError, KeyError, ValueError) as error:  # other names, other shapes
            what = str(error)[:300]  # vLLM lists all names that it has
            raise ValueError(f"{MISFIT} {type(self.model).__name__}: {what}") from error

    def finish_weight_update(self) -> None:
        """Bring the layers into the form they compute with."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # vLLM 0.32 packs a tied output layer for the CPU when the model starts and not again
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Leave the channel."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class Worker:
    """Methods that vLLM adds to its worker (`worker_extension_cls`)."""

    weight_transfer_engine: Transfer

    def rayrl_checksum(self) -> str:
        """Of the weights that were loaded last."""
        return self.weight_transfer_engine.digest

    def rayrl_adapter_checksum(self, folder: str, plan: list[list[Any]]) -> str:
        """Of an adapter's file as this process reads it, laid out as the learner's buffer was."""
        (manifest,) = from_wire(plan)
        names = file_names(manifest)
        with safe_open(Path(folder) / FILE, "pt") as file:
            flat, _ = flatten((name, file.get_tensor(names[name])) for name in manifest.names())
        return checksum(flat)


WeightTransferEngineFactory.register_engine(BACKEND, Transfer)
