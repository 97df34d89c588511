"""The embedded engine: continuous batching of small Hugging Face causal LMs.

One thread runs steps. A step is a *prefill* of new prompt ids (preferred when requests can be
admitted) or a *decode* of one id per running request. Requests join and leave between steps. Keys
and values stay in a conversation's slot between its turns; conversations with a common prefix copy
it from each other, and requests that arrive together compute it once.

**Siblings.** Requests whose ids are the same so far share a slot: each step computes their logits
once, and each of them samples from these with its own seed. Those that sample another id continue
in a slot of their own, with a copy of the keys and values.

**Bits.** On the CPU the same request, seed and weights give the same ids and logprobs, bit for bit,
whatever else is in flight and whether keys and values were cached, copied, shared or recomputed
(see `attention.py`). On a GPU (`gpu.py`) logits differ in their last bits with the batch, and so,
rarely, does a sampled id.

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
        rows = min(max_live, slots)  # each may come to need a slot of its own
        self._state = DecodeState(rows, self._slab.max_len)
        self._free_rows = [*reversed(range(rows))]
        self._tokenizer = tokenizer
        self._raw_logprobs = raw_logprobs
        self._threads = threads
        self._running: dict[int, EngineRequest] = {}  # by row
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

        Of `prompt_tokens`, `computed_tokens` were prefilled and `reused_tokens` were cached. For
        the `sampled_tokens` of a reply after its first, `decoded_tokens` were computed: less where
        conversations had the same ids. Seconds are those of the step thread.
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
        cancelled = [row for row, running in self._running.items() if running.cancelled]
        if cancelled:
            self._finish(np.array(cancelled))
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
        claimed: dict[bytes, tuple[int, int]] = {}  # slot and cached ids of each distinct prompt
        limit = self._prefill_tokens
        while self._waiting and tokens < limit and self._free_rows:
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
            self._waiting.popleft()
            key = prompt.tobytes()
            if key in claimed:
                self._table.join(request.session, claimed[key][0])
            else:
                claimed[key] = self._table.claim(request.session, prompt)
                tokens += len(prompt) - claimed[key][1]
            slot, candidate.cached = claimed[key]
            candidate.row = self._free_rows.pop()
            self._running[candidate.row] = candidate
            streams = isinstance(candidate.reader, DeltaStream)
            self._state.start(candidate.row, slot, request, self.max_len, streams)
            admitted.append(candidate)
        return admitted

    def _prefill(self, admitted: list[EngineRequest]) -> None:
        """Compute the prompts' uncached tokens, each shared prefix once, and sample."""
        rows = np.array([request.row for request in admitted])
        of_slot = {int(self._state.slot[request.row]): request for request in admitted}
        slots = np.array(sorted(of_slot))
        distinct = [(slot, of_slot[slot].prompt, of_slot[slot].cached) for slot in slots.tolist()]
        flat = flatten_prompts(distinct)
        step = self._slab.prefill(flat)
        logits = self._model.logits(step, flat.ids, flat.positions, flat.last)
        self._table.cached[slots] = [len(prompt) for _, prompt, _ in distinct]
        self._stats.prompt_tokens += int(self._state.prompt[rows].sum())
        self._stats.computed_tokens += len(flat.ids)
        self._sample(rows, slots, logits)

    def _decode(self) -> None:
        """Compute and sample one more id for every running request.

        Requests with the same ids so far are computed once.
        """
        slots = np.flatnonzero(self._table.running)
        positions = self._table.cached[slots]
        ids = self._table.ids[slots, positions]
        logits = self._model.decode(self._slab, slots, positions, ids)
        self._table.cached[slots] += 1
        self._stats.decoded_tokens += len(slots)
        self._sample(np.array([*self._running]), slots, logits)

    def _sample(
        self, rows: NDArray[np.int64], slots: NDArray[np.int64], logits: torch.Tensor
    ) -> None:
        """Sample one id per row, record it, and answer streams and finished requests.

        Args:
            rows: (n,) those whose conversations are in `slots`.
            slots: (m,) ascending.
            logits: (m, vocabulary).
        """
        state = self._state
        at = np.searchsorted(slots, state.slot[rows])
        ids, logprobs = sample(logits, state.sampling_batch(rows), at)
        if self._raw_logprobs:
            logprobs, alternatives = raw_logprobs(logits, at, ids, state.top[rows])
            for k in np.flatnonzero(state.top[rows]):
                self._running[int(rows[k])].alternatives.append(alternatives[k])
        count = state.sampled[rows]
        state.ids[rows, count] = ids
        state.logprobs[rows, count] = logprobs
        state.sampled[rows] = count + 1
        self._stats.sampled_tokens += len(rows)
        stopped = (state.stop_ids[rows] == ids[:, None]).any(axis=1)
        failed: dict[int, Exception] = {}
        for k in np.flatnonzero(state.has_stop[rows] & ~stopped):
            try:
                stopped[k] = self._ends_with_stop_string(int(rows[k]))
            except Exception as error:  # a tokenizer's error fails this request alone
                failed[int(rows[k])], stopped[k] = error, True
        ended = stopped | (state.sampled[rows] >= state.max_new[rows])
        for row in rows[state.streams[rows] & ~ended].tolist():
            self._answer(row, None)
        if ended.any():
            for row, stop in zip(rows[ended].tolist(), stopped[ended].tolist(), strict=True):
                if row in failed:
                    failure = InfraError(f"the tokenizer cannot decode a reply: {failed[row]}")
                    self._answers.append((self._running[row].reader, failure))
                else:
                    self._stats.completions += 1
                    self._answer(row, "stop" if stop else "length")
            self._finish(rows[ended])
        self._continue(rows[~ended], ids[~ended])

    def _continue(self, rows: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Append the sampled ids (n,) to conversations, which part where the ids differ."""
        state, table = self._state, self._table
        slots = state.slot[rows]
        order = np.lexsort((ids, slots))
        by_slot, by_id = slots[order], ids[order]
        parts = np.flatnonzero(
            (np.diff(by_slot, prepend=-1) != 0) | (np.diff(by_id, prepend=-1) != 0)
        )
        parted = np.flatnonzero(np.diff(by_slot[parts], prepend=-1) == 0)
        for part in parted.tolist():
            stop = parts[part + 1] if part + 1 < len(parts) else len(order)
            moved = rows[order[parts[part] : stop]]
            sessions = [self._running[row].request.session for row in moved.tolist()]
            state.slot[moved] = table.split(int(by_slot[parts[part]]), sessions)
        slots = state.slot[rows]
        table.ids[slots, table.cached[slots]] = ids

    def _finish(self, rows: NDArray[np.int64]) -> None:
        for row in rows.tolist():
            del self._running[row]
        self._free_rows += rows.tolist()
        self._table.finish(self._state.slot[rows])

    def _ends_with_stop_string(self, row: int) -> bool:
        """Whether the last sampled id completed a stop string."""
        stops = self._running[row].request.sampling.stop
        # every id decodes to at least a byte, so a stop string just completed lies in these ids
        window = max(len(stop.encode()) for stop in stops) + 4
        count = int(self._state.sampled[row])
        tail = self._state.ids[row, max(0, count - window) : count].tolist()
        text = self._tokenizer.decode(tail, skip_special_tokens=False)
        return any(stop in text for stop in stops)

    def _answer(self, row: int, finish: Finish | None) -> None:
        """Queue a stream's next delta or, at its end, a whole completion."""
        answered = self._running[row]
        first = answered.delivered  # 0 unless the reader is a stream
        count = int(self._state.sampled[row])
        ids = tuple(self._state.ids[row, first:count].tolist())
        logprobs = tuple(self._state.logprobs[row, first:count].tolist())
        alternatives = tuple(answered.alternatives[first:])
        result: Delta | Completion
        if finish is None or self._state.streams[row]:
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
        self._waiting.clear()
        self._running.clear()
        self._free_rows = [*range(self._state.rows)]
        self._table.running[:] = 0
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
