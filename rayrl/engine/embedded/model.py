"""A Hugging Face causal LM as the embedded engine runs it: flat tokens in, logits of some out."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrl.engine.embedded.attention import NAME, Geometry, KVSlab, Prefill, Step, attention
from rayrl.errors import ConfigError, DataError
from rayrl.weights.flat import Manifest, checksum, flatten, unflatten

__all__ = ["FlatModel"]

Ints = NDArray[np.int64]
MIN_TOKENS = 16  # rows of every linear layer: with fewer, or 8 a thread, the bits change
PROBE_TOLERANCE = 1e-3


class FlatModel:
    """Runs `model` (a transformers `*ForCausalLM`, fp32, CPU) through `attention`.

    Args:
        max_len: ids of one conversation; 0: what the model's positions allow.

    Raises:
        ConfigError: the architecture does not go through transformers' attention interface with
            plain causal attention in every layer.
    """

    def __init__(self, model: Any, max_len: int = 0) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, attention)
        self.config = model.config.get_text_config()
        self.geometry = _geometry(model, self.config, max_len)
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._probe()

    @property
    def max_len(self) -> int:
        """Ids the model's positions allow in one conversation."""
        return int(self.config.max_position_embeddings)

    @torch.inference_mode()
    def logits(
        self,
        step: Step,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        at: NDArray[np.int64],
    ) -> Tensor:
        """Logits (n, vocabulary) after the flat tokens `at` (n,), of tokens ids, positions (T,)."""
        count, kept = len(ids), len(at)
        least = max(MIN_TOKENS, 8 * torch.get_num_threads())
        short = max(least - count, 0)
        flat = torch.from_numpy(np.pad(ids, (0, short)))[None]
        where = torch.from_numpy(np.pad(positions, (0, short)))[None]
        keep = torch.from_numpy(np.pad(at, (0, max(least - kept, 0))))
        out = self.model(
            input_ids=flat,
            position_ids=where,
            use_cache=False,
            logits_to_keep=keep,
            rayrl_step=step,
            rayrl_tokens=count,
        )
        logits: Tensor = out.logits[0, :kept]
        return logits

    @torch.inference_mode()
    def load(self, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Copy new weights in place; the checksum of what the parameters hold afterwards.

        Raises:
            DataError: names or shapes are not this model's; nothing has been changed then.
        """
        held = self.model.state_dict()
        new = unflatten(flat, manifest)
        unknown = [name for name in new if name not in held]
        filled = {held[name].data_ptr() for name in new if name in held}
        missing = [name for name, t in held.items() if t.data_ptr() not in filled]
        wrong = [n for n in new if n in held and held[n].shape != new[n].shape]
        if unknown or missing or wrong:
            raise DataError(
                f"weights do not fit {type(self.model).__name__}: unknown {unknown[:3]}, "
                f"missing {missing[:3]}, other shape {wrong[:3]}; push the same architecture"
            )
        for name, tensor in new.items():
            held[name].copy_(tensor)
        kept, _ = flatten((name, held[name].to(new[name].dtype)) for name in new)
        return checksum(kept)

    def _probe(self) -> None:
        """Two short conversations, flat, must give what transformers' own attention gives."""
        layers: set[int] = set()
        ids = np.arange(8, dtype=np.int64) % self.vocab_size
        slab = KVSlab(self.geometry, 2, 16)
        places = np.arange(8)
        step = Prefill(slab, [(0, 0, 0, 4), (1, 0, 4, 4)], places, places // 4, places % 4)

        class Counting:
            def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                layers.add(layer)
                return step.attend(layer, q, k, v)

        try:
            self.model.set_attn_implementation("sdpa")
            with torch.inference_mode():
                theirs = self.model(input_ids=torch.from_numpy(ids).view(2, 4), use_cache=False)
            self.model.set_attn_implementation(NAME)
            ours = self.logits(Counting(), ids, places % 4, places)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise _refusal(self.model, f"a probe failed: {error}") from error
        if len(layers) != self.geometry.layers:
            raise _refusal(self.model, f"{len(layers)} of {self.geometry.layers} layers attend")
        gap = float((ours - theirs.logits.flatten(0, 1)).abs().max())
        if not gap <= PROBE_TOLERANCE:
            raise _refusal(self.model, f"its logits differ from transformers' by {gap:.2g}")


def _refusal(model: Any, why: str) -> ConfigError:
    return ConfigError(
        f"model.path: the embedded engine cannot run {type(model).__name__} ({why}); choose a "
        "model with plain causal attention in every layer, such as a Llama"
    )


def _geometry(model: Any, config: Any, max_len: int) -> Geometry:
    """The attention's shapes, or a refusal that says what the engine does not have."""
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise _refusal(model, "it is not float32 on the CPU")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "its forward has no logits_to_keep")
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if kinds:
        raise _refusal(model, f"layers of type {', '.join(sorted(kinds))}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Turns all positions of a pass by its last one; keys that are kept were turned otherwise.
        # The dynamic kind does so beyond all positions that the config names, which `max_len` ends.
        short = int(rope["original_max_position_embeddings"])
        if not 0 < max_len <= short:
            raise _refusal(model, f"LongRoPE, exact with 0 < engine.max_len <= {short} alone")
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Geometry(int(config.num_hidden_layers), heads, kv_heads, head_dim)
