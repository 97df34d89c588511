"""A Hugging Face causal LM over a flat batch of tokens, with logits at selected tokens only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrl.engine.embedded.attention import (
    NAME,
    PAD,
    CompiledStep,
    Geometry,
    KVPool,
    Rows,
    SparseStep,
    Step,
    attention,
)
from rayrl.engine.embedded.gpu import DecodeGraphs, PaddedDecode, PaddedPrefill
from rayrl.engine.embedded.prompts import FlatPrompts, flatten_prompts
from rayrl.errors import ConfigError, DataError
from rayrl.native import lanes, missing
from rayrl.weights.flat import Manifest, checksum, flatten, unflatten

__all__ = ["FlatModel"]

Ints = NDArray[np.int64]
MIN_TOKENS = 16  # rows of every linear layer: with fewer, or fewer than 8 per thread, bits change
PASS_TOKENS = 1024  # of a forward pass on a CPU: more exceed the core's cache
PASS_ENTRIES = 1 << 22  # pairs of a query head and a key in it; 24 bytes each in a sparse step
ONE_THREAD = 1 << 17  # numbers of a hidden state up to which only products use more threads
PROBE_TOLERANCE = 1e-3


class FlatModel:
    """Run `model` (a transformers `*ForCausalLM` in fp32) through `attention`.

    Args:
        dtype: number format to run in, once the model has been compared with transformers'.
        max_len: maximum ids per conversation; 0: as many as the model has positions.

    Raises:
        ConfigError: the architecture does not use transformers' attention interface with plain
            causal attention in every layer.
    """

    def __init__(self, model: Any, max_len: int = 0, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, attention)
        self.config = model.config.get_text_config()
        self.geometry = _geometry(model, self.config, max_len)
        self.model = model.eval().requires_grad_(False)
        self.vocab_size, self._width = map(int, model.get_input_embeddings().weight.shape)
        self.device: torch.device = model.device
        self._threads = 1  # of matrix products; of the rest while there is much to do
        self._borrows = False  # weights lie in a buffer that is not its own
        self._probe()
        self.model.to(dtype)
        if self.ragged:
            for module in self.model.modules():
                if _multiplies(module):
                    run = partial(self._threaded, module.forward)
                    module.forward = run
        rope = getattr(self.config, "rope_parameters", None) or {}
        # the others look at the positions on the host, which a graph cannot
        fixed = rope.get("rope_type", "default") not in ("dynamic", "longrope")
        self._captures = fixed and self.device.type == "cuda"
        self._graphs: DecodeGraphs | None = None

    @property
    def max_len(self) -> int:
        """Number of positions of the model: the maximum ids per conversation."""
        return int(self.config.max_position_embeddings)

    @property
    def ragged(self) -> bool:
        """Whether contexts of any lengths are attended to as they are: on a CPU."""
        return self.device.type == "cpu"

    @property
    def compiled(self) -> bool:
        """Whether to attend in C++: on a CPU that has it, with heads of whole vectors."""
        return self.ragged and missing() is None and self.geometry.head_dim % lanes() == 0

    @property
    def kv_dtype(self) -> torch.dtype:
        """Number format of keys and values; torch's sampled product on a CPU has no bf16."""
        dtype: torch.dtype = self.model.dtype
        known = (torch.float32, torch.bfloat16) if self.compiled else (torch.float32,)
        return dtype if dtype in known or not self.ragged else torch.float32

    def pool(self, tokens: int) -> KVPool:
        """Allocate keys and values of `tokens` tokens."""
        return KVPool(self.geometry, tokens, self.device, self.kv_dtype)

    def prefill(self, pool: KVPool, rows: Rows, flat: FlatPrompts) -> Tensor:
        """Compute prompts, whose keys and values go to `rows` (slots, columns) of the pool.

        Returns:
            Logits (prompts, vocabulary) at their last ids.
        """
        if not self.ragged:
            padded = PaddedPrefill(pool, rows, flat)
            return self._logits(padded, flat.ids, flat.positions, flat.last)
        out = torch.empty(len(flat.last), self.vocab_size)
        for part in _passes(flat.positions + 1, self.geometry.heads):
            step = self._step(pool, rows, flat.slots[part], flat.positions[part])
            here = np.flatnonzero((part.start <= flat.last) & (flat.last < part.stop))
            at = flat.last[here] - part.start
            out[here] = self._logits(step, flat.ids[part], flat.positions[part], at)
        return out

    def decode(self, pool: KVPool, rows: Rows, slots: Ints, positions: Ints, ids: Ints) -> Tensor:
        """Compute one id, at `positions`, for each of `slots` (n,).

        Returns:
            Logits (n, vocabulary); on a GPU the next call overwrites them.
        """
        if self.ragged:
            parts = [
                self._logits(
                    self._step(pool, rows, slots[part], positions[part]),
                    ids[part],
                    positions[part],
                    np.arange(part.stop - part.start),
                )
                for part in _passes(positions + 1, self.geometry.heads)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        if not self._captures:
            step = PaddedDecode.of(pool, rows[slots], positions)
            return self._logits(step, ids, positions, np.arange(len(slots)))
        if self._graphs is None:
            self._graphs = DecodeGraphs(pool, rows.shape[1], self._forward)
        return self._graphs.logits(rows[slots], positions, ids)

    def _step(self, pool: KVPool, rows: Rows, slots: Ints, positions: Ints) -> Step:
        """Tokens on a CPU that attend to all up to their positions."""
        if self.compiled:
            return CompiledStep(pool, rows, slots, positions, torch.get_num_threads())
        return SparseStep(pool, rows, slots, positions)

    def _logits(self, step: Step, ids: Ints, positions: Ints, at: Ints) -> Tensor:
        """Run the tokens `ids`, `positions` (T,).

        Returns:
            Logits (n, vocabulary) at the flat indices `at` (n,).
        """
        tokens, wanted = len(ids), len(at)
        if self.device.type == "cpu":
            min_rows = max(MIN_TOKENS, 8 * torch.get_num_threads())
            padding = (0, max(min_rows - tokens, 0))
            ids, positions = np.pad(ids, padding), np.pad(positions, padding)
            at = np.pad(at, (0, max(min_rows - wanted, 0)))
        ids_, positions_, at_ = (
            torch.from_numpy(array).to(self.device) for array in (ids, positions, at)
        )
        return self._forward(step, ids_, positions_, at_, tokens)[:wanted]

    @torch.inference_mode()
    def _forward(
        self,
        step: Step,
        ids: Tensor,
        positions: Tensor,
        at: Tensor | None = None,
        tokens: int | None = None,
    ) -> Tensor:
        """Logits at `at`, or at all ids; from `tokens` on, ids are padding."""
        threads = self._threads = torch.get_num_threads()
        if self.ragged and len(ids) * self._width <= ONE_THREAD:
            # Norms, rotations and gates are hundreds of short operations: waking a thread for each
            # takes longer than it saves.
            torch.set_num_threads(1)
        try:
            out = self.model(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=0 if at is None else at,
                rayrl_step=step,
                rayrl_tokens=len(ids) if tokens is None else tokens,
            )
        finally:
            torch.set_num_threads(threads)
        logits: Tensor = out.logits[0]
        return logits.float()

    def _threaded(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer of matrix products on all threads."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return forward(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def load(self, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Take new weights; returns the checksum of the parameters afterwards.

        A buffer that nobody can write to, as those of Ray's object store, is used as it is if its
        number formats are the model's: replicas and store then hold the weights once. Others are
        copied.

        Raises:
            DataError: names or shapes are not those of this model; nothing has changed then.
        """
        current = self.model.state_dict(keep_vars=True)
        new = unflatten(flat, manifest)
        unknown = [name for name in new if name not in current]
        filled = {current[name].data_ptr() for name in new if name in current}
        missing = [name for name, t in current.items() if t.data_ptr() not in filled]
        reshaped = [n for n in new if n in current and current[n].shape != new[n].shape]
        if unknown or missing or reshaped:
            raise DataError(
                f"weights do not match {type(self.model).__name__}: unknown {unknown[:3]}, "
                f"missing {missing[:3]}, other shape {reshaped[:3]}; push the same architecture"
            )
        if self.device.type == "cpu" and not flat.flags.writeable:
            names = {tensor.data_ptr(): name for name, tensor in current.items() if name in new}
            source = {name: new[names[tensor.data_ptr()]] for name, tensor in current.items()}
            if all(_may_replace(tensor, current[name]) for name, tensor in source.items()):
                for name, tensor in source.items():
                    current[name].data = tensor
                self._borrows = True
                return checksum(flat)
        if self._borrows:  # what is held now cannot be written to
            held = [(tensor, tensor.data_ptr()) for tensor in current.values()]
            own = {at: torch.empty_like(tensor) for tensor, at in held}
            for tensor, at in held:
                tensor.data = own[at]
            self._borrows = False
        for name, tensor in new.items():
            current[name].copy_(tensor)
        loaded = {name: current[name].cpu() for name in new}
        wider = [name for name in new if new[name].dtype.itemsize > loaded[name].dtype.itemsize]
        for name in wider:  # rounded: what has gone is in the buffer alone
            if torch.equal(loaded[name], new[name].to(loaded[name].dtype)):
                loaded[name] = new[name]
        flat, _ = flatten((name, loaded[name].to(new[name].dtype)) for name in new)
        return checksum(flat)

    def _probe(self) -> None:
        """Compare logits of two short conversations with those of transformers' own attention."""
        layers: set[int] = set()
        ids = np.arange(8, dtype=np.int64) % self.vocab_size
        prompts = flatten_prompts([(0, ids[:4], 0), (1, ids[4:], 0)])
        rows = np.zeros((2, PAD), np.int32)
        rows[:, :4] = [[0, 1, 2, 3], [4, 5, 6, 7]]
        step: Step
        if self.ragged:
            step = self._step(self.pool(8), rows, prompts.slots, prompts.positions)
        else:
            step = PaddedPrefill(self.pool(8), rows, prompts)

        class RecordingStep:
            def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                layers.add(layer)
                return step.attend(layer, q, k, v)

        try:
            self.model.set_attn_implementation("sdpa")
            with torch.inference_mode():
                shared = torch.from_numpy(ids).to(self.device).view(2, 4)
                theirs = self.model(input_ids=shared, use_cache=False)
            self.model.set_attn_implementation(NAME)
            ours = self._logits(RecordingStep(), prompts.ids, prompts.positions, prompts.source)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise _refusal(self.model, f"a probe failed: {error}") from error
        if len(layers) != self.geometry.layers:
            raise _refusal(
                self.model, f"only {len(layers)} of {self.geometry.layers} layers have attention"
            )
        gap = float((ours - theirs.logits.flatten(0, 1)).abs().max())
        if not gap <= PROBE_TOLERANCE:
            raise _refusal(self.model, f"its logits differ from transformers' by {gap:.2g}")


def _may_replace(new: Tensor, held: Tensor) -> bool:
    """Whether `new`, which cannot be written to, can take the place of what the model holds."""
    same_form = (new.dtype, new.shape, new.stride()) == (held.dtype, held.shape, held.stride())
    return same_form and isinstance(held, torch.nn.Parameter)  # a forward pass may change a buffer


def _multiplies(module: torch.nn.Module) -> bool:
    """Whether a layer's own parameters are matrices to multiply by, and no table to look up in."""
    matrices = any(p.dim() >= 2 for p in module.parameters(recurse=False))
    return matrices and not isinstance(module, torch.nn.Embedding)


def _passes(lengths: Ints, heads: int) -> Iterator[slice]:
    """Cut tokens that see `lengths` keys into forward passes."""
    entries = lengths.cumsum() * heads
    start = 0
    while start < len(lengths):
        before = entries[start - 1] if start else 0
        fit = int(np.searchsorted(entries, before + PASS_ENTRIES, side="right"))
        stop = max(start + 1, min(fit, start + PASS_TOKENS))
        yield slice(start, stop)
        start = stop


def _refusal(model: Any, why: str) -> ConfigError:
    return ConfigError(
        f"model.path: the embedded engine cannot run {type(model).__name__} ({why}); choose a "
        "model with plain causal attention in every layer, such as a Llama"
    )


def _geometry(model: Any, config: Any, max_len: int) -> Geometry:
    """Read the attention's shapes from the config; raises ConfigError for unsupported models."""
    if any(p.dtype != torch.float32 or p.device != model.device for p in model.parameters()):
        raise _refusal(model, "it is not float32 on one device")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "its forward has no logits_to_keep")
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if kinds:
        raise _refusal(model, f"layers of type {', '.join(sorted(kinds))}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Rotates all positions of a pass by a factor that depends on the longest one, so cached
        # keys would have another rotation. Dynamic RoPE does so only beyond the config's positions,
        # which `max_len` excludes.
        short = int(rope["original_max_position_embeddings"])
        if not 0 < max_len <= short:
            raise _refusal(model, f"LongRoPE is exact only with 0 < engine.max_len <= {short}")
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Geometry(int(config.num_hidden_layers), heads, kv_heads, head_dim)
