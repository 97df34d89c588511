"""Low-rank adapters through `peft`, and the names under which a model's weights travel.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685): a linear layer
W x becomes W x + (alpha / rank) B A x, and only A and B are trained. What is pushed to replicas and
exported is *merged*, W + (alpha / rank) B A under the layer's own name, so that whoever generates
needs to know nothing of it; the adapter is exported beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrl.config import LoraConfig
from rayrl.errors import ConfigError

__all__ = ["ADAPTER", "Piece", "pieces", "save_adapter", "with_adapters"]

ADAPTER = "adapter"  # folder of an export that holds the adapter alone
_WRAPPED = "base_model.model."  # what peft puts before the names of the model it wraps


@dataclass(frozen=True, slots=True)
class Piece:
    """One named tensor of a model, and how to get it.

    Attributes:
        parameters: what must be whole (not sharded) while `tensor` is called.
        shape: of the tensor, known without gathering anything.
    """

    name: str
    parameters: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Callable[[], Tensor]


def with_adapters(model: Any, config: LoraConfig, seed: int) -> Any:
    """`model` with everything frozen but new adapters, whose A is drawn from `seed`.

    Raises:
        ConfigError: peft is not installed, or `lora.targets` names no layer.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"lora.rank={config.rank} needs peft, which cannot be imported ({error}); install "
            "rayrl with its extra lora, or set lora.rank=0 to train all weights"
        ) from error
    targets: Any = list(config.targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        try:
            wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ConfigError(f"lora.targets={targets}: {error}") from error
    wrapped.train()
    return wrapped


def pieces(model: Any, *, adapters: bool = False) -> Iterator[Piece]:
    """The weights of a model with or without adapters, under the plain model's names.

    Args:
        adapters: only the adapters, under peft's names.
    """
    layers = {name: module for name, module in model.named_modules() if _adapted(module)}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        is_adapter = ".lora_" in name
        if adapters != is_adapter:
            continue
        prefix, _, last = name.rpartition(".base_layer.")
        layer = layers.get(prefix)
        if layer is not None and last == "weight":
            yield _merged(f"{prefix}.weight".removeprefix(_WRAPPED), layer, tensor)
        else:
            plain = name.replace(".base_layer.", ".")
            yield _plain(name if adapters else plain.removeprefix(_WRAPPED), tensor)


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the adapter alone, as peft's `PeftModel.from_pretrained` reads it."""
    model.save_pretrained(folder, state_dict=weights)


def _adapted(module: Any) -> bool:
    return hasattr(module, "get_delta_weight") and bool(getattr(module, "lora_A", None))


def _plain(name: str, tensor: Tensor) -> Piece:
    return Piece(name, (tensor,), _shape(tensor), tensor.dtype, tensor.detach)


def _merged(name: str, layer: Any, weight: Tensor) -> Piece:
    (adapter,) = layer.active_adapters
    parts = (weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)

    def tensor() -> Tensor:
        with torch.no_grad():  # in fp32: what is added is small, and is rounded once
            b, a = parts[2].float(), parts[1].float()
            merged: Tensor = weight.float() + layer.scaling[adapter] * (b @ a)
            return merged.to(weight.dtype)

    return Piece(name, parts, _shape(weight), weight.dtype, tensor)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The whole shape; a ZeRO-3 shard knows it under another name."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
