"""Low-rank adapters through `peft`, and the names by which weights are published and exported.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685): a linear layer
W x becomes W x + (alpha / rank) B A x, and only A and B are trained. What is pushed to replicas and
exported is *merged*: W plus what peft's layer adds to it, under the weight's own name, so that an
engine needs no adapter support; the adapter is exported beside it. What is added depends on the
layer: the experts of a fused layer have an A and a B each, and GPT-2 stores W transposed.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrl.config import LoraConfig
from rayrl.errors import ConfigError
from rayrl.learner.forward import row_logprobs
from rayrl.learner.readback import PROBE_TOKENS, probe_rows

__all__ = [
    "ADAPTER",
    "LazyWeight",
    "adapts_fused_weights",
    "lazy_weights",
    "plain_names",
    "save_adapter",
    "with_adapters",
]

ADAPTER = "adapter"  # folder of an export that holds the adapter alone
_WRAPPED = "base_model.model."  # what peft puts before the names of the model it wraps
_LAYERS = re.compile(
    r"(\.base_layer)+\."
)  # what it puts into them, once for each weight of a layer


@dataclass(frozen=True, slots=True)
class LazyWeight:
    """A weight by its name, computed on demand.

    Attributes:
        parameters: what must be gathered (not sharded) while `tensor` is called.
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
        ConfigError: peft is not installed, or `lora.targets` names no layer, or one that cannot be
            computed with an adapter or whose adapter could not be merged.
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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # it warns of tied layers, which are checked below, and of what it then corrects itself
        warnings.simplefilter("ignore")
        torch.manual_seed(seed % 2**63)
        try:
            wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ConfigError(f"lora.targets={targets}: {error}") from error
    _check_layers(wrapped, targets)
    wrapped.train()
    rows = probe_rows(model.config.get_text_config().vocab_size)
    try:
        row_logprobs(wrapped, rows, PROBE_TOKENS, 1.0)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"lora.targets={targets}: {type(model).__name__} cannot be computed with adapters on "
            f"these layers ({error}), as where a layer returns more than a tensor; name others, "
            "such as lora.targets=[q_proj,v_proj]."
        ) from error
    return wrapped


def _check_layers(wrapped: Any, targets: list[str]) -> None:
    """Refuse adapters that could be trained but not merged: they would be lost."""
    uses = Counter(id(one) for _, one in wrapped.named_parameters(remove_duplicate=False))
    merged: set[int] = set()
    tried: set[tuple[type, torch.Size]] = set()
    for name, layer in _layers(wrapped):
        weight, parts = _weight(layer), _parts(layer)
        merged |= {id(one) for one in parts}
        plain = _plain_name(name)
        if uses[id(weight)] > 1:
            raise ConfigError(
                f"lora.targets={targets}: {plain} is tied: another layer has the same weight, and "
                "an adapter on one of the two cannot be merged into it. Leave it out, as "
                "lora.targets=[all-linear] does."
            )
        kind = (type(layer), weight.shape)
        if kind not in tried and _delta(layer).shape != weight.shape:
            raise ConfigError(
                f"lora.targets={targets}: what peft adds to {plain} ({type(layer).__name__}) has "
                f"another shape than its weight, so they cannot be merged; leave it out."
            )
        tried.add(kind)
    for name, one in wrapped.named_parameters():
        if one.requires_grad and id(one) not in merged:
            raise ConfigError(
                f"lora.targets={targets}: {_plain_name(name)} would be trained but cannot be "
                "merged into a weight; leave that layer out."
            )


def lazy_weights(model: Any, *, adapters: bool = False) -> Iterator[LazyWeight]:
    """The weights of a model with or without adapters, under the plain model's names.

    Args:
        adapters: only the adapters, under peft's names.
    """
    layers = {id(_weight(layer)): layer for _, layer in _layers(model)}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        is_adapter = ".lora_" in name
        if adapters != is_adapter:
            continue
        if layer := layers.get(id(tensor)):
            yield _merged(_plain_name(name), layer, tensor)
        else:
            name = name if adapters else _plain_name(name)
            yield LazyWeight(name, (tensor,), _shape(tensor), tensor.dtype, tensor.detach)


def adapts_fused_weights(model: Any) -> bool:
    """Whether an adapter is on a weight that its layer uses directly, as fused experts do."""
    return any(hasattr(layer, "parameter_name") for _, layer in _layers(model))


def plain_names(model: Any) -> set[str]:
    """The plain model's names of all weights, tied ones under each of theirs."""
    return {_plain_name(name) for name in model.state_dict() if ".lora_" not in name}


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the adapter alone, as peft's `PeftModel.from_pretrained` reads it."""
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """peft's layers and their names; several nested ones where a layer has several weights."""
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            yield name, module


def _weight(layer: Any) -> Tensor:
    """The weight that a layer of peft's adapts."""
    found: Tensor = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    return found


def _parts(layer: Any) -> tuple[Tensor, ...]:
    """The layer's own adapter, not that of a layer inside it."""
    held = (getattr(layer, name) for name in layer.adapter_layer_names)
    return tuple(one for part in held for one in part.parameters())


def _delta(layer: Any) -> Tensor:
    (adapter,) = layer.active_adapters
    with torch.no_grad():
        found: Tensor = layer.get_delta_weight(adapter)
    return found


def _plain_name(name: str) -> str:
    return _LAYERS.sub(".", name.removeprefix(_WRAPPED))


def _merged(name: str, layer: Any, weight: Tensor) -> LazyWeight:
    def tensor() -> Tensor:
        return (weight.detach().float() + _delta(layer).float()).to(weight.dtype)

    return LazyWeight(name, (weight, *_parts(layer)), _shape(weight), weight.dtype, tensor)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The whole shape; a ZeRO-3 shard knows it under another name."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
