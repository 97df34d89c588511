"""The embedded engine: continuous batching of small Hugging Face causal LMs.

One thread runs steps. A step is a *prefill* of new prompt ids (preferred when requests can be
admitted) or a *decode* of one id per running request. Requests join and leave between steps. Keys
and values stay in a conversation's slot between its turns; conversations with a common prefix copy
it from each other, and requests that arrive together compute it once. On the CPU the same request,
seed and weights give the same ids and logprobs, bit for bit, whatever else is in flight and whether
keys and values were cached, copied or recomputed (see `attention.py`). On a GPU (`gpu.py`) logits
differ in their last bits with the batch, and so, rarely, does a sampled id.

**Why not transformers' own continuous batching.** Measured on one thread (transformers 5.19), it
samples fewer tokens per second from 16 or 64 conversations than `generate` does, keeps no KV cache
across the turns of a conversation, and does not guarantee that the batch leaves results unchanged.

**Lower bound.** A decode step of n rows at context L reads layers * 2 * n * kv_heads * D * L * 4
bytes of keys and values and takes 2 * parameters * n FLOP. For the embedded model (4 layers, width
128, 0.9M parameters) at n = 256, L = 160: 168 MB, 6 ms at one core's 30 GB/s; and 0.45 GFLOP,
4.5 ms as measured for its linear layers alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch

from rayrl.chat.tokenizer import load_tokenizer
from rayrl.config import EngineConfig
from rayrl.engine.embedded.model import FlatModel
from rayrl.engine.embedded.prompts import flatten_prompts
from rayrl.engine.embedded.requests import (
    Answer,
    DeltaStream,
    EngineRequest,
    Release,
    Stats,
    WeightUpdate,
    deliver,
)
from rayrl.engine.embedded.sampler import raw_logprobs, sample
from rayrl.engine.embedded.slots import DecodeState, SlotTable, slots_for
from rayrl.errors import ConfigError, InfraError, RayrlError, StaleWeights
from rayrl.types import Completion, Delta, Finish, Request, VersionSpan
from rayrl.weights.loading import load_causal_lm
from rayrl.weights.model_dir import explain_load_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rayrl.engine.protocol import Part
    from rayrl.weights.flat import Manifest

__all__ = ["EmbeddedEngine"]

# distinct tokens per prefill step: on a CPU more exceed the core's cache
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}

_log = logging.getLogger(__name__)


class EmbeddedEngine:
    """Generate with `model`, a transformers `*ForCausalLM` in fp32 on the CPU or a GPU.

    The engine owns `model` and changes its weights in place. Implements `engine.protocol.Engine`.

    Args:
        max_live: conversations decoded at once.
        max_len: maximum ids per conversation; 0: as many as the model has positions.
        kv_cache_gb: memory for keys and values; limits how many conversations stay cached.
        threads: torch threads of the step thread. The number affects the last bits of results; with
            more than one and a wide model (SmolLM2), on some CPUs the requests in flight do too.
        version: version of the weights in `model`.
        tokenizer: needed only for requests with stop strings.
        raw_logprobs: see `open_engine`.
        dtype: number format to compute in; on the CPU, float32 alone.

    Raises:
        ConfigError: a value is out of range, or the engine cannot run this architecture.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_live: int = 256,
        max_len: int = 0,
        kv_cache_gb: float = 1.0,
        threads: int = 1,
        version: int = 0,
        tokenizer: Any = None,
        raw_logprobs: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_live < 1 or threads < 1:
            raise ConfigError(
                f"engine.max_live={max_live}, engine.threads={threads}: both must be at least 1"
            )
        self._model = FlatModel(model, max_len, dtype)
        if not 0 <= max_len <= self._model.max_len:
            raise ConfigError(
                f"engine.max_len={max_len}: the model has {self._model.max_len} positions; "
                "use that or less, or 0 for all of them"
            )
        self.version = version
        self.max_len = max_len or self._model.max_len
        self.max_live = max_live
        slot_bytes = self._model.geometry.slot_bytes(self.max_len, dtype.itemsize)
        slots = slots_for(slot_bytes, self.max_len, kv_cache_gb, max_live)
        self._slab = self._model.slab(slots, self.max_len)
        self._prefill_tokens = PREFILL_TOKENS[self._model.device.type]
        self._table = SlotTable(self._slab)
        self._state = DecodeState(slots, self._slab.max_len)
        self._tokenizer = tokenizer
        self._raw_logprobs = raw_logprobs
        self._threads = threads
        self._running: dict[int, EngineRequest] = {}  # by slot
        self._waiting: deque[EngineRequest] = deque()
        self._update: WeightUpdate | None = None
        self._inbox: deque[EngineRequest | WeightUpdate | Release] = deque()
        self._wake = threading.Event()
        self._inbox_lock = threading.Lock()  # so that nothing is added once it is closing
        self._closing = False
        self._answers: list[Answer] = []
        self._stats = Stats()
        self._thread = threading.Thread(target=self._run, name="rayrl-engine", daemon=True)
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
        return cls(
            model,
            max_live=config.max_live,
            max_len=config.max_len,
            kv_cache_gb=config.kv_cache_gb,
            threads=config.threads,
            version=version,
            tokenizer=tokenizer,
            raw_logprobs=raw_logprobs,
            dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
        )

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
        self._enqueue(engine_request)
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
        self._enqueue(engine_request)
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
        self._enqueue(update)
        return await update.future

    async def sleep(self) -> None:
        """Do nothing: the engine uses no accelerator, and a push clears the KV cache anyway."""

    async def wake(self, part: Part) -> None:
        """Do nothing."""

    async def check(self) -> None:
        """Raise InfraError if the step thread has ended."""
        if self._closing or not self._thread.is_alive():
            raise InfraError("the engine is closed")

    def release(self, sessions: Sequence[str]) -> None:
        """Free the KV slots of sessions that have ended; unknown names are ignored."""
        self._inbox.append(Release(tuple(sessions)))

    async def close(self) -> None:
        """Stop; requests in flight fail with InfraError. Closing twice is allowed."""
        with self._inbox_lock:
            self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def stats(self) -> dict[str, float]:
        """Return totals since the start.

        Of `prompt_tokens`, `computed_tokens` were prefilled and `reused_tokens` were cached;
        seconds are those of the step thread.
        """
        stats = self._stats
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
        if sampling.stop and self._tokenizer is None:
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

    def _enqueue(self, message: EngineRequest | WeightUpdate) -> None:
        with self._inbox_lock:
            if self._closing:
                raise InfraError("the engine is closed")
            self._inbox.append(message)
        self._wake.set()

    # Run on the step thread.

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while not self._closing:
                try:
                    self._step()
                except Exception as error:  # a failed step fails its requests
                    _log.exception("embedded engine: a step failed")
                    self._fail_all(error)
                answers, self._answers = self._answers, []
                deliver(answers)
        self._fail_all(InfraError("the engine was closed"))
        deliver(self._answers)

    def _step(self) -> None:
        """Run one prefill or decode step, or wait for a message."""
        if not (self._inbox or self._waiting or self._running or self._update):
            self._wake.wait()
            self._wake.clear()
        self._read_inbox()
        for slot in [slot for slot, running in self._running.items() if running.cancelled]:
            del self._running[slot]
            self._table.finish(np.array([slot]))
        if self._update is not None and not self._running:
            self._load_update(self._update)
        admitted = [] if self._update is not None else self._admit()
        if admitted:
            began = time.perf_counter()
            self._prefill(admitted)
            self._stats.prefill_steps += 1
            self._stats.prefill_seconds += time.perf_counter() - began
        elif self._running:
            began = time.perf_counter()
            self._decode()
            self._stats.decode_steps += 1
            self._stats.decode_seconds += time.perf_counter() - began

    def _read_inbox(self) -> None:
        # reading ends at a weight update: later requests wait for the new weights
        while self._inbox and self._update is None:
            message = self._inbox.popleft()
            if isinstance(message, EngineRequest):
                self._waiting.append(message)
            elif isinstance(message, WeightUpdate):
                self._update = message
            else:
                self._table.release(message.sessions)

    def _load_update(self, update: WeightUpdate) -> None:
        self._update = None
        began = time.perf_counter()
        try:
            digest = self._model.load(update.flat, update.manifest)
        except Exception as error:  # of any type, or the caller would wait for ever
            self._answers.append((update.future, error))
            return
        self._table.clear()
        self.version = update.version
        self._answers.append((update.future, digest))
        self._stats.load_seconds += time.perf_counter() - began

    def _admit(self) -> list[EngineRequest]:
        """Give slots to waiting requests, up to about `_prefill_tokens` new tokens."""
        admitted: list[EngineRequest] = []
        tokens = 0
        seen: set[bytes] = set()
        limit = self._prefill_tokens
        while self._waiting and tokens < limit and len(self._running) < self.max_live:
            candidate = self._waiting[0]
            request, prompt = candidate.request, candidate.prompt
            if candidate.cancelled:
                self._waiting.popleft()
                continue
            if request.min_version > self.version:
                self._waiting.popleft()
                message = f"version {request.min_version} requested, version {self.version} loaded"
                self._answers.append((candidate.reader, StaleWeights(message)))
                continue
            claim = self._table.claim(request.session, prompt)
            if claim is None:
                break
            self._waiting.popleft()
            candidate.slot, candidate.cached = claim
            self._running[candidate.slot] = candidate
            streams = isinstance(candidate.reader, DeltaStream)
            self._state.start(candidate.slot, request, self.max_len, streams)
            admitted.append(candidate)
            key = prompt.tobytes()
            if key not in seen:
                tokens += len(prompt) - candidate.cached
                seen.add(key)
        return admitted

    def _prefill(self, admitted: list[EngineRequest]) -> None:
        """Compute the prompts' uncached tokens, each shared prefix once, and sample."""
        flat = flatten_prompts([(r.slot, r.prompt, r.cached) for r in admitted])
        slots = np.array([r.slot for r in admitted])
        step = self._slab.prefill(flat)
        logits = self._model.logits(step, flat.ids, flat.positions, flat.last)
        self._table.cached[slots] = self._state.prompt[slots]
        self._stats.prompt_tokens += int(self._state.prompt[slots].sum())
        self._stats.computed_tokens += len(flat.ids)
        order = np.argsort(slots)
        self._sample(slots[order], logits[torch.from_numpy(order).to(logits.device)])

    def _decode(self) -> None:
        """Compute and sample one more id for every running request."""
        slots = np.flatnonzero(self._table.live)
        positions = self._table.cached[slots]
        ids = self._table.ids[slots, positions]
        logits = self._model.decode(self._slab, slots, positions, ids)
        self._table.cached[slots] += 1
        self._sample(slots, logits)

    def _sample(self, slots: NDArray[np.int64], logits: torch.Tensor) -> None:
        """Sample one id per slot, record it, and answer streams and finished requests."""
        state, table = self._state, self._table
        ids, logprobs = sample(logits, state.sampling_batch(slots))
        if self._raw_logprobs:
            logprobs, alternatives = raw_logprobs(logits, ids, state.top[slots])
            for row in np.flatnonzero(state.top[slots]):
                self._running[int(slots[row])].alternatives.append(alternatives[row])
        count = state.sampled[slots]
        table.ids[slots, table.cached[slots]] = ids
        state.logprobs[slots, count] = logprobs
        state.sampled[slots] = count + 1
        self._stats.sampled_tokens += len(slots)
        stopped = (state.stop_ids[slots] == ids[:, None]).any(axis=1)
        failed: dict[int, Exception] = {}
        for row in np.flatnonzero(state.has_stop[slots] & ~stopped):
            try:
                stopped[row] = self._ends_with_stop_string(int(slots[row]))
            except Exception as error:  # a tokenizer's error fails this request alone
                failed[int(slots[row])], stopped[row] = error, True
        ended = stopped | (state.sampled[slots] >= state.max_new[slots])
        for slot in slots[state.streams[slots] & ~ended].tolist():
            self._answer(slot, None)
        if not ended.any():
            return
        for slot, stop in zip(slots[ended].tolist(), stopped[ended].tolist(), strict=True):
            if slot in failed:
                failure = InfraError(f"the tokenizer cannot decode a reply: {failed[slot]}")
                self._answers.append((self._running[slot].reader, failure))
            else:
                self._stats.completions += 1
                self._answer(slot, "stop" if stop else "length")
            del self._running[slot]
        table.finish(slots[ended])

    def _ends_with_stop_string(self, slot: int) -> bool:
        """Whether the last sampled id completed a stop string."""
        stops = self._running[slot].request.sampling.stop
        # every id decodes to at least a byte, so a stop string just completed lies in these ids
        window = max(len(stop.encode()) for stop in stops) + 4
        start, count = int(self._state.prompt[slot]), int(self._state.sampled[slot])
        tail = self._table.ids[slot, start + max(0, count - window) : start + count].tolist()
        text = self._tokenizer.decode(tail, skip_special_tokens=False)
        return any(stop in text for stop in stops)

    def _answer(self, slot: int, finish: Finish | None) -> None:
        """Queue a stream's next delta or, at its end, a whole completion."""
        answered = self._running[slot]
        first = answered.delivered  # 0 unless the reader is a stream
        start, count = int(self._state.prompt[slot]), int(self._state.sampled[slot])
        ids = tuple(self._table.ids[slot, start + first : start + count].tolist())
        logprobs = tuple(self._state.logprobs[slot, first:count].tolist())
        alternatives = tuple(answered.alternatives[first:])
        result: Delta | Completion
        if finish is None or self._state.streams[slot]:
            result = Delta(ids, logprobs, finish, answered.cached, alternatives)
            answered.delivered = count
        else:
            span = VersionSpan(self.version, 0, count)
            result = Completion(ids, logprobs, (span,), finish, answered.cached, alternatives)
        self._answers.append((answered.reader, result))

    def _fail_all(self, error: Exception) -> None:
        """Fail every request and weight update, and drop state that a failed step left partial."""
        if not isinstance(error, RayrlError):
            error = InfraError(f"the engine's step failed: {type(error).__name__}: {error}")
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, EngineRequest):
                self._answers.append((message.reader, error))
            elif isinstance(message, WeightUpdate):
                self._answers.append((message.future, error))
        if self._update is not None:
            self._answers.append((self._update.future, error))
            self._update = None
        for failed in (*self._running.values(), *self._waiting):
            self._answers.append((failed.reader, error))
        self._running.clear()
        self._waiting.clear()
        self._table.finish(np.flatnonzero(self._table.live))
        self._table.clear()


def _device(config: EngineConfig) -> torch.device:
    """Return the device that `engine.device` selects; raises ConfigError if it is not there."""
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ConfigError(
            "engine.device=cuda: torch sees no GPU in this process; reserve one for each replica "
            "with cluster.replica_gpus, or set engine.device=cpu"
        )
    if config.device == "cpu" or not gpu:
        if config.dtype not in ("auto", "float32"):
            raise ConfigError(
                f"engine.dtype={config.dtype}: on a CPU the embedded engine computes in fp32; set "
                "float32, or choose engine=vllm"
            )
        return torch.device("cpu")
    if config.dtype == "float16":
        raise ConfigError("engine.dtype=float16: the embedded engine knows float32 and bfloat16")
    return torch.device("cuda")
