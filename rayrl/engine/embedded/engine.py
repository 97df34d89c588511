"""The embedded engine: continuous batching of small Hugging Face causal LMs.

One thread runs steps. A step is a *prefill* of new prompt ids (preferred when requests can be
admitted) or a *decode* of one id per running request. Requests join and leave between steps. Keys
and values are kept between a conversation's turns. Conversations share those of a common prefix
(`slots.py`), and requests that arrive together compute it once, as they do the ids that they sample
alike (`continuous_batch.py`).

**Bits.** On the CPU the same request, seed and weights give the same ids and logprobs, bit for bit,
whatever else is in flight and whether keys and values were cached, shared or recomputed (see
`attention.py`). On a GPU (`gpu.py`) logits differ in their last bits with the batch, and so,
rarely, does a sampled id.

**Why not transformers' own continuous batching.** Measured on one thread (transformers 5.19), it
samples fewer tokens per second from 16 or 64 conversations than `generate` does, keeps no KV cache
across the turns of a conversation, and does not guarantee that the batch leaves results unchanged.

**Lower bound.** A decode step of n rows at context L reads layers * 2 * n * kv_heads * D * L * 4
bytes of keys and values, those that rows share once, and takes 2 * parameters * n FLOP. For the
embedded model (4 layers, width 128, 0.9M parameters) at n = 256, L = 160 without sharing: 168 MB,
7 ms at the 25 GB/s of a large copy; and 0.45 GFLOP, 5 ms at a core's 90 GFLOP/s.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch

from rayrl.chat.tokenizer import load_tokenizer
from rayrl.config import EngineConfig
from rayrl.engine.embedded.continuous_batch import ContinuousBatch
from rayrl.engine.embedded.model import FlatModel
from rayrl.engine.embedded.requests import (
    DeltaStream,
    EngineRequest,
    Inbox,
    Message,
    Release,
    Sleep,
    WeightUpdate,
    deliver,
)
from rayrl.engine.embedded.slots import DecodeState, tokens_for
from rayrl.errors import ConfigError, InfraError
from rayrl.types import Completion, Delta, Request
from rayrl.weights.loading import load_causal_lm
from rayrl.weights.model_dir import explain_load_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rayrl.engine.protocol import Part
    from rayrl.weights.flat import Manifest

__all__ = ["EmbeddedEngine"]

_log = logging.getLogger(__name__)


class EmbeddedEngine:
    """Generate with `model`, a transformers `*ForCausalLM` in fp32 on the CPU or a GPU.

    The engine owns `model` and changes its weights in place. Implements `engine.protocol.Engine`.

    Args:
        config: `max_live`, `max_len`, `kv_cache_gb` (which limits how many tokens stay cached, and
            if need be how many requests run), `dtype` to compute in (on the CPU, attention is in
            fp32 in any case) and `threads` of the step's thread. Their number affects the last bits
            of results in fp32; with more than one and a wide model (SmolLM2), on some CPUs the
            requests in flight do too.
        version: version of the weights in `model`.
        tokenizer: needed only for requests with stop strings.
        raw_logprobs: see `open_engine`.

    Raises:
        ConfigError: a value is out of range, or the engine cannot run this architecture.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig,
        *,
        version: int = 0,
        tokenizer: Any = None,
        raw_logprobs: bool = False,
    ) -> None:
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self._model = FlatModel(model, config.max_len, dtype)
        if config.max_len > self._model.max_len:
            raise ConfigError(
                f"engine.max_len={config.max_len}: the model has {self._model.max_len} positions; "
                "use that or less, or 0 for all of them"
            )
        self.max_len = config.max_len or self._model.max_len
        self.max_live = config.max_live
        token_bytes = self._model.geometry.token_bytes(self._model.kv_dtype.itemsize)
        tokens = tokens_for(token_bytes, self.max_len, config.kv_cache_gb, config.max_live)
        self._has_tokenizer, self._raw_logprobs = tokenizer is not None, raw_logprobs
        self._batch = ContinuousBatch(
            self._model,
            self._model.pool(tokens),
            DecodeState(self.max_live, self.max_len),
            version=version,
            tokenizer=tokenizer,
            raw_logprobs=raw_logprobs,
        )
        self._inbox = Inbox()
        self._thread = threading.Thread(
            target=self._run, args=(config.threads,), name="rayrl-engine", daemon=True
        )
        self._thread.start()

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: EngineConfig,
        *,
        version: int = 0,
        raw_logprobs: bool = False,
    ) -> EmbeddedEngine:
        """Load a Hugging Face directory, with the settings of `config`.

        Raises:
            ConfigError: as the constructor, or `engine.device` is not there.
        """
        device = _device(config)
        model = load_causal_lm(path, dtype=torch.float32).to(device)
        try:
            tokenizer = load_tokenizer(Path(path))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.path={path}: cannot load a tokenizer: {explain_load_error(error)}"
            ) from error
        return cls(model, config, version=version, tokenizer=tokenizer, raw_logprobs=raw_logprobs)

    @property
    def version(self) -> int:
        """Version of the weights that are loaded."""
        return self._batch.version

    # Called from any event loop.

    async def generate(self, request: Request) -> Completion:
        """Answer one request; see `engine.protocol.Engine`.

        Raises:
            ConfigError: the request is invalid.
            StaleWeights: `min_version` is newer than the weights that are loaded or being loaded.
            InfraError: the engine was closed, or a step failed.
        """
        prompt = self._check(request)
        if prompt is None:
            return Completion((), (), (), "length")
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        engine_request = EngineRequest(request, prompt, future)
        self._inbox.put(engine_request)
        try:
            return await future
        except asyncio.CancelledError:
            engine_request.cancelled = True
            raise

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Answer one request with one delta per step; see `engine.protocol.Engine`.

        Raises as `generate`.
        """
        prompt = self._check(request)
        if prompt is None:
            yield Delta((), (), "length")
            return
        deltas = DeltaStream()
        engine_request = EngineRequest(request, prompt, deltas)
        self._inbox.put(engine_request)
        try:
            finish = None
            while finish is None:
                delta = await deltas.get()
                finish = delta.finish
                yield delta
        finally:
            engine_request.cancelled = True  # no effect once it has finished

    async def load_weights(self, version: int, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Load new weights once the running generations have finished on the old ones.

        Requests that arrive meanwhile wait for the new weights. `flat` must not change until then.

        Returns:
            The checksum (`rayrl.weights.flat.checksum`) of the parameters after loading.

        Raises:
            DataError: the weights do not match this model; the old ones stay.
        """
        update = WeightUpdate(version, flat, manifest, asyncio.get_running_loop().create_future())
        self._inbox.put(update)
        return await update.future

    async def sleep(self) -> None:
        """On a CPU, give the memory of the KV cache back once nothing runs.

        What is cached is lost, which a push does as well. Requests need not wait for `wake`.
        """
        if self._model.device.type == "cpu":
            sleep = Sleep(asyncio.get_running_loop().create_future())
            self._inbox.put(sleep)
            await sleep.future

    async def wake(self, part: Part) -> None:
        """Do nothing: memory is taken when it is needed."""

    async def check(self) -> None:
        """Raise InfraError if the step thread has ended."""
        if self._inbox.closed or not self._thread.is_alive():
            raise InfraError("the engine is closed")

    def release(self, sessions: Sequence[str]) -> None:
        """Free the KV slots of sessions that have ended; unknown names are ignored."""
        with suppress(InfraError):  # closed, and with it all that was cached
            self._inbox.put(Release(tuple(sessions)))

    async def close(self) -> None:
        """Stop; requests in flight fail with InfraError. Closing twice is allowed."""
        self._inbox.close()
        await asyncio.to_thread(self._thread.join)

    def stats(self) -> dict[str, float]:
        """Return totals since the start.

        Of `prompt_tokens`, `computed_tokens` were prefilled and `reused_tokens` were cached. For
        the `sampled_tokens` of a reply after its first, `decoded_tokens` were computed: less where
        conversations had the same ids. Seconds are those of the step thread.
        """
        stats = self._batch.stats
        return {
            **asdict(stats),
            "reused_tokens": stats.prompt_tokens - stats.computed_tokens,
            "busy_seconds": stats.prefill_seconds + stats.decode_seconds + stats.load_seconds,
        }

    def _check(self, request: Request) -> NDArray[np.int64] | None:
        """Validate a request; returns its prompt ids (n,), or None if it leaves no room for an id.

        Raises:
            ConfigError: the request is invalid.
        """
        sampling = request.sampling
        if not (
            sampling.temperature >= 0
            and 0 < sampling.top_p <= 1
            and sampling.top_k >= 0
            and sampling.max_tokens >= 0
        ):
            raise ConfigError(
                f"sampling of session {request.session!r}: {sampling} needs temperature >= 0, "
                "0 < top_p <= 1, top_k >= 0 and max_tokens >= 0"
            )
        if request.top_logprobs and not self._raw_logprobs:
            raise ConfigError("top_logprobs: open the engine with raw_logprobs=True")
        if sampling.stop and not self._has_tokenizer:
            raise ConfigError("sampling.stop: this engine has no tokenizer; pass one, or stop_ids")
        if not all(isinstance(stop, str) and stop for stop in sampling.stop):
            raise ConfigError(f"sampling.stop={sampling.stop!r}: each must be a non-empty string")
        integers = (*request.stop_ids, request.seed, sampling.top_k, request.top_logprobs)
        if (
            not all(isinstance(value, SupportsIndex) for value in integers)
            or request.top_logprobs < 0
        ):
            raise ConfigError(
                f"session {request.session!r}: stop_ids, seed, top_k and top_logprobs must be "
                "whole numbers, and top_logprobs 0 or more"
            )
        prompt = np.array(request.prompt_ids, dtype=np.int64)
        if not len(prompt) or prompt.min() < 0 or prompt.max() >= self._model.vocab_size:
            raise ConfigError(
                f"prompt_ids of session {request.session!r} must be one or more ids in "
                f"[0, {self._model.vocab_size}); is it the tokenizer of another model?"
            )
        return prompt if len(prompt) < self.max_len and sampling.max_tokens else None

    # Run on the step thread.

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        inbox, batch = self._inbox, self._batch
        with torch.inference_mode():
            while not inbox.closed:
                if not (inbox or batch.has_work):
                    inbox.wait()
                try:
                    # up to a weight update: later requests wait for the new weights
                    while inbox and batch.update is None:
                        batch.take(inbox.take())
                    batch.step()
                except Exception as error:  # a failed step fails its requests
                    _log.exception("embedded engine: a step failed")
                    batch.fail(error, self._unread())
                answers, batch.answers = batch.answers, []
                deliver(answers)
        batch.fail(InfraError("the engine was closed"), self._unread())
        deliver(batch.answers)

    def _unread(self) -> Iterator[Message]:
        while self._inbox:
            yield self._inbox.take()


def _device(config: EngineConfig) -> torch.device:
    """Return the device that `engine.device` selects; raises ConfigError if it is not there."""
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ConfigError(
            "engine.device=cuda: torch sees no GPU in this process; reserve one for each replica "
            "with cluster.replica_gpus, or set engine.device=cpu"
        )
    if config.dtype == "float16":
        raise ConfigError("engine.dtype=float16: the embedded engine knows float32 and bfloat16")
    return torch.device("cuda" if gpu and config.device != "cpu" else "cpu")
