"""What runs inside vLLM's worker process: takes weights over from a mapped file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rayrl.weights import Entry, Manifest, checksum, unflatten

__all__ = ["BACKEND", "FlatTransfer", "Worker"]

BACKEND = "rayrl_flat"


@dataclass
class Init(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not type-checked
    """Nothing: a file needs no rendezvous."""


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the flat buffer lies, and what it holds: (name, dtype, shape, offset) each."""

    file: str
    manifest: list[list[Any]]


class FlatTransfer(WeightTransferEngine[Init, Update]):  # type: ignore[misc]
    """Loads all weights of a flat buffer in a file."""

    init_info_cls = Init
    update_info_cls = Update

    digest = ""  # of the buffer that was loaded last

    def init_transfer_engine(self, init_info: Init) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Undo what loading did to the layers (packing, fusing), so that they can load again."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load; on the CPU there is no accelerator to wait for."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Map the file and load every tensor from the mapping."""
        flat = np.memmap(update_info.file, dtype=np.uint8, mode="r")
        entries = tuple(
            Entry(name, dtype, tuple(shape), offset)
            for name, dtype, shape, offset in update_info.manifest
        )
        manifest = Manifest(entries, flat.nbytes)
        self.model.load_weights(unflatten(flat, manifest).items())
        self.digest = checksum(flat)

    def finish_weight_update(self) -> None:
        """Bring the layers into the form they compute with."""
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        method = getattr(head, "quant_method", None)
        if method is not None and self.device.type == "cpu":
            # vLLM 0.32 packs a tied output layer for the CPU when the model starts and not again
            method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing is held."""


class Worker:
    """Methods that vLLM adds to its worker (`worker_extension_cls`)."""

    weight_transfer_engine: FlatTransfer

    def rayrl_checksum(self) -> str:
        """Of the weights that were loaded last."""
        return self.weight_transfer_engine.digest


WeightTransferEngineFactory.register_engine(BACKEND, FlatTransfer)
