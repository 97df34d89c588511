"""The embedded engine: continuous batching of small Hugging Face causal LMs on the CPU.

One thread runs steps. A step is a *prefill* of new prompt ids (first, when any can be admitted) or
a *decode* of one id for every live conversation. Requests join and leave between steps. Keys and
values stay in a conversation's slot between its turns; conversations that begin alike copy each
other's, and siblings that arrive together compute what they share once. The same request, seed
and weights give the same ids and logprobs, bit for bit, whatever else is in flight and whether keys
and values were kept, copied or computed again (`attention.py` says how).

**Why not transformers' own continuous batching.** Measured on this project's machine (5.19, one
thread) it samples fewer tokens per second from 16 or 64 conversations than `generate` does, has no
KV kept across the turns of a conversation, and no promise that a batch does not change a result.

**The floor.** A decode step of n rows at context L reads layers * 2 * n * kv_heads * D * L * 4
bytes of keys and values and multiplies 2 * parameters * n. For the embedded model (4 layers, width
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch

from rayrl.chat.tokenizer import load_tokenizer
from rayrl.config import EngineConfig
from rayrl.engine.embedded.attention import Decode, KVSlab, Prefill
from rayrl.engine.embedded.kv import SlotTable, slots_for
from rayrl.engine.embedded.mail import (
    Answer,
    DeltaStream,
    EngineRequest,
    Release,
    WeightUpdate,
    deliver,
)
from rayrl.engine.embedded.model import FlatModel
from rayrl.engine.embedded.prompts import flatten_prompts
from rayrl.engine.embedded.rows import DecodeState
from rayrl.engine.embedded.sampler import raw_logprobs, sample
from rayrl.engine.embedded.stats import Stats
from rayrl.errors import ConfigError, InfraError, RayrlError, StaleWeights
from rayrl.types import Completion, Delta, Finish, Request, VersionSpan
from rayrl.weights.loading import load_causal_lm
from rayrl.weights.model_dir import explain_load_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rayrl.engine.protocol import Part
    from rayrl.weights.flat import Manifest

__all__ = ["EmbeddedEngine"]

PREFILL_TOKENS = 1024  # distinct tokens a prefill step: more fall out of the core's cache

_log = logging.getLogger(__name__)


class EmbeddedEngine:
    """Generates with `model`, a transformers `*ForCausalLM` in fp32 on the CPU.

    It keeps `model` and changes its weights in place. Implements `engine.protocol.Engine`.

    Args:
        max_live: conversations decoded at once.
        max_len: ids of one conversation; 0: what the model's positions allow.
        kv_cache_gb: memory for keys and values; bounds how many conversations are kept.
        threads: torch threads of the step thread. Results depend on the number in the last bits;
            with more than one and a wide model (SmolLM2), on some CPUs on what is in flight, too.
        version: version of the weights that `model` holds.
        tokenizer: only for requests with stop strings.
        raw_logprobs: see `open_engine`.

    Raises:
        ConfigError: a value is out of range, or the architecture cannot be run (it says why).
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
    ) -> None:
        if max_live < 1 or threads < 1:
            raise ConfigError(
                f"engine.max_live={max_live}, engine.threads={threads}: both must be at least 1"
            )
        self._model = FlatModel(model, max_len)
        if not 0 <= max_len <= self._model.max_len:
            raise ConfigError(
                f"engine.max_len={max_len}: the model has {self._model.max_len} positions; "
                "use that or less, or 0 for all of them"
            )
        self.version = version
        self.max_len = max_len or self._model.max_len
        self.max_live = max_live
        geometry = self._model.geometry
        slots = slots_for(geometry, self.max_len, kv_cache_gb, max_live)
        self._slab = KVSlab(geometry, slots, self.max_len)
        self._table = SlotTable(self._slab)
        self._rows = DecodeState(slots, self._slab.max_len)
        self._tokenizer = tokenizer
        self._raw_logprobs = raw_logprobs
        self._threads = threads
        self._jobs: dict[int, EngineRequest] = {}  # by slot
        self._waiting: deque[EngineRequest] = deque()
        self._load: WeightUpdate | None = None
        self._inbox: deque[EngineRequest | WeightUpdate | Release] = deque()
        self._wake = threading.Event()
        self._mail = threading.Lock()  # so that nothing is posted after the last look
        self._closing = False
        self._done: list[Answer] = []
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
        """The engine for a Hugging Face directory, with the settings of `config`."""
        model = load_causal_lm(path, dtype=torch.float32)
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
        )

    # What others call, on any event loop.

    async def generate(self, request: Request) -> Completion:
        """Answer one request; see `engine.protocol.Engine`.

        Raises:
            ConfigError: the request itself makes no sense.
            StaleWeights: `min_version` is newer than what is held or being loaded.
            InfraError: the engine was closed, or a step failed.
        """
        prompt = self._check(request)
        if self._has_no_room(request):
            return Completion((), (), (), "length")
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        job = EngineRequest(request, prompt, future)
        self._send(job)
        try:
            return await future
        except asyncio.CancelledError:
            job.cancelled = True
            raise

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The same in parts, one a step; see `engine.protocol.Engine`. Raises as `generate`."""
        prompt = self._check(request)
        if self._has_no_room(request):
            yield Delta((), (), "length")
            return
        parts = DeltaStream()
        job = EngineRequest(request, prompt, parts)
        self._send(job)
        try:
            finish = None
            while finish is None:
                part = await parts.get()
                finish = part.finish
                yield part
        finally:
            job.cancelled = True  # does nothing to one that has ended

    def _has_no_room(self, request: Request) -> bool:
        return len(request.prompt_ids) >= self.max_len or request.sampling.max_tokens == 0

    async def load_weights(self, version: int, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Take over new weights once the generations now running have ended on the old ones.

        Requests that come meanwhile wait for the new weights. `flat` must not change until then.

        Returns:
            The checksum (`rayrl.weights.flat.checksum`) of what the parameters hold afterwards.

        Raises:
            DataError: the weights are not this model's; the old ones are kept.
        """
        load = WeightUpdate(version, flat, manifest, asyncio.get_running_loop().create_future())
        self._send(load)
        return await load.future

    async def sleep(self) -> None:
        """Nothing to do: it is on no accelerator, and a push forgets keys and values anyway."""

    async def wake(self, part: Part) -> None:
        """Nothing to do."""

    async def check(self) -> None:
        """Raise InfraError if the step thread has ended."""
        if self._closing or not self._thread.is_alive():
            raise InfraError("the engine is closed")

    def release(self, sessions: Sequence[str]) -> None:
        """Free what is kept for conversations that are over; unknown names are fine."""
        self._inbox.append(Release(tuple(sessions)))

    async def close(self) -> None:
        """Stop; what is in flight fails with InfraError. Closing twice is fine."""
        with self._mail:
            self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def stats(self) -> dict[str, float]:
        """Totals since the start.

        `prompt_tokens` is what prompts had, `computed_tokens` what was prefilled of it, the
        difference `reused_tokens`; seconds are of the step thread.
        """
        return self._stats.figures()

    def _check(self, request: Request) -> NDArray[np.int64]:
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
            raise ConfigError(f"sampling.stop={sampling.stop!r}: each must be a text, not empty")
        numbers = (*request.stop_ids, request.seed, sampling.top_k, request.top_logprobs)
        if not all(isinstance(one, SupportsIndex) for one in numbers) or request.top_logprobs < 0:
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
        return prompt

    def _send(self, message: EngineRequest | WeightUpdate) -> None:
        with self._mail:
            if self._closing:
                raise InfraError("the engine is closed")
            self._inbox.append(message)
        self._wake.set()

    # The step thread.

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while not self._closing:
                try:
                    self._turn()
                except Exception as error:  # a step failed: its requests are told, never left
                    _log.exception("embedded engine: a step failed")
                    self._fail(error)
                done, self._done = self._done, []
                deliver(done)
        self._fail(InfraError("the engine was closed"))
        deliver(self._done)

    def _turn(self) -> None:
        """One step, or a wait for something to do."""
        if not (self._inbox or self._waiting or self._jobs or self._load):
            self._wake.wait()
            self._wake.clear()
        self._receive()
        self._drop_cancelled()
        if self._load is not None and not self._jobs:
            self._take_weights(self._load)
        admitted = [] if self._load is not None else self._admit()
        if admitted:
            began = time.perf_counter()
            self._prefill(admitted)
            self._stats.prefill_steps += 1
            self._stats.prefill_seconds += time.perf_counter() - began
        elif self._jobs:
            began = time.perf_counter()
            self._decode()
            self._stats.decode_steps += 1
            self._stats.decode_seconds += time.perf_counter() - began

    def _receive(self) -> None:
        # a load stops the mail: what comes after it waits for the new weights
        while self._inbox and self._load is None:
            message = self._inbox.popleft()
            if isinstance(message, EngineRequest):
                self._waiting.append(message)
            elif isinstance(message, WeightUpdate):
                self._load = message
            else:
                self._table.release(message.sessions)

    def _drop_cancelled(self) -> None:
        for slot in [slot for slot, job in self._jobs.items() if job.cancelled]:
            del self._jobs[slot]
            self._table.finish(np.array([slot]))

    def _take_weights(self, load: WeightUpdate) -> None:
        self._load = None
        began = time.perf_counter()
        try:
            digest = self._model.load(load.flat, load.manifest)
        except Exception as error:  # not one of ours either may leave the caller waiting
            self._done.append((load.future, error))
            return
        self._table.clear()
        self.version = load.version
        self._done.append((load.future, digest))
        self._stats.load_seconds += time.perf_counter() - began

    def _admit(self) -> list[EngineRequest]:
        """Waiting requests that get a slot now, for at most about `PREFILL_TOKENS` new tokens."""
        admitted: list[EngineRequest] = []
        tokens = 0
        seen: set[bytes] = set()
        while self._waiting and tokens < PREFILL_TOKENS and len(self._jobs) < self.max_live:
            job = self._waiting[0]
            if job.cancelled:
                self._waiting.popleft()
                continue
            if job.request.min_version > self.version:
                self._waiting.popleft()
                message = f"version {job.request.min_version} asked, version {self.version} held"
                self._done.append((job.reader, StaleWeights(message)))
                continue
            claim = self._table.claim(job.request.session, job.prompt)
            if claim is None:
                break
            self._waiting.popleft()
            job.slot, job.cached = claim
            self._jobs[job.slot] = job
            streams = isinstance(job.reader, DeltaStream)
            self._rows.start(job.slot, job.request, self.max_len, streams)
            admitted.append(job)
            key = job.prompt.tobytes()
            if key not in seen:
                tokens += len(job.prompt) - job.cached
                seen.add(key)
        return admitted

    def _prefill(self, jobs: list[EngineRequest]) -> None:
        """Compute the admitted prompts' new tokens, each distinct one once, and sample."""
        flat = flatten_prompts([(job.slot, job.prompt, job.cached) for job in jobs])
        slots = np.array([job.slot for job in jobs])
        step = Prefill(self._slab, flat.runs, flat.source, flat.slots, flat.places)
        logits = self._model.logits(step, flat.ids, flat.positions, flat.last)
        self._table.held[slots] = self._rows.prompt[slots]
        self._stats.prompt_tokens += int(self._rows.prompt[slots].sum())
        self._stats.computed_tokens += len(flat.ids)
        order = np.argsort(slots)
        self._emit(slots[order], logits[torch.from_numpy(order)])

    def _decode(self) -> None:
        """One more id for every live conversation."""
        slots = np.flatnonzero(self._table.live)
        positions = self._table.held[slots]
        step = Decode(self._slab, slots, positions)
        ids = self._table.ids[slots, positions]
        logits = self._model.logits(step, ids, positions, np.arange(len(slots)))
        self._table.held[slots] += 1
        self._emit(slots, logits)

    def _emit(self, slots: NDArray[np.int64], logits: torch.Tensor) -> None:
        """Sample for `slots`, note the ids, and hand back what is finished."""
        rows, table = self._rows, self._table
        ids, logprobs = sample(logits, rows.draws(slots))
        if self._raw_logprobs:
            logprobs, alternatives = raw_logprobs(logits, ids, rows.top[slots])
            for at in np.flatnonzero(rows.top[slots]):
                self._jobs[int(slots[at])].alternatives.append(alternatives[at])
        count = rows.sampled[slots]
        table.ids[slots, table.held[slots]] = ids
        rows.logprobs[slots, count] = logprobs
        rows.sampled[slots] = count + 1
        self._stats.sampled_tokens += len(slots)
        stopped = (rows.stop_ids[slots] == ids[:, None]).any(axis=1)
        failed: dict[int, Exception] = {}
        for at in np.flatnonzero(rows.has_stop[slots] & ~stopped):
            try:
                stopped[at] = self._stop_string(int(slots[at]))
            except Exception as error:  # what a tokenizer says to one request is not the others'
                failed[int(slots[at])], stopped[at] = error, True
        ended = stopped | (rows.sampled[slots] >= rows.most[slots])
        for slot in slots[rows.streams[slots] & ~ended].tolist():
            self._tell(slot, None)
        if not ended.any():
            return
        for slot, stop in zip(slots[ended].tolist(), stopped[ended].tolist(), strict=True):
            if slot in failed:
                why = InfraError(f"the tokenizer cannot decode a reply: {failed[slot]}")
                self._done.append((self._jobs.pop(slot).reader, why))
            else:
                self._complete(slot, "stop" if stop else "length")
        table.finish(slots[ended])

    def _stop_string(self, slot: int) -> bool:
        """Whether the text sampled so far ends a stop string with its last id."""
        stops = self._jobs[slot].request.sampling.stop
        # an id is at least a byte, so a stop string that has just been completed lies in these
        reach = max(len(stop.encode()) for stop in stops) + 4
        start, count = int(self._rows.prompt[slot]), int(self._rows.sampled[slot])
        tail = self._table.ids[slot, start + max(0, count - reach) : start + count].tolist()
        text = self._tokenizer.decode(tail, skip_special_tokens=False)
        return any(stop in text for stop in stops)

    def _complete(self, slot: int, finish: Finish) -> None:
        self._stats.completions += 1
        if self._rows.streams[slot]:
            self._tell(slot, finish)
            del self._jobs[slot]
            return
        job = self._jobs.pop(slot)
        start, count = int(self._rows.prompt[slot]), int(self._rows.sampled[slot])
        completion = Completion(
            tuple(self._table.ids[slot, start : start + count].tolist()),
            tuple(self._rows.logprobs[slot, :count].tolist()),
            (VersionSpan(self.version, 0, count),),
            finish,
            job.cached,
            tuple(job.alternatives),
        )
        self._done.append((job.reader, completion))

    def _tell(self, slot: int, finish: Finish | None) -> None:
        """Send who reads in parts what is new."""
        job, told = self._jobs[slot], self._jobs[slot].told
        start, job.told = int(self._rows.prompt[slot]), int(self._rows.sampled[slot])
        part = Delta(
            tuple(self._table.ids[slot, start + told : start + job.told].tolist()),
            tuple(self._rows.logprobs[slot, told : job.told].tolist()),
            finish,
            job.cached,
            tuple(job.alternatives[told:]),
        )
        self._done.append((job.reader, part))

    def _fail(self, error: Exception) -> None:
        """Tell everything that waits; keep nothing a broken step may have left half done."""
        if not isinstance(error, RayrlError):
            error = InfraError(f"the engine's step failed: {type(error).__name__}: {error}")
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, EngineRequest):
                self._done.append((message.reader, error))
            elif isinstance(message, WeightUpdate):
                self._done.append((message.future, error))
        if self._load is not None:
            self._done.append((self._load.future, error))
            self._load = None
        jobs = [*self._jobs.values(), *self._waiting]
        self._done.extend((job.reader, error) for job in jobs)
        self._jobs.clear()
        self._waiting.clear()
        self._table.finish(np.flatnonzero(self._table.live))
        self._table.clear()
