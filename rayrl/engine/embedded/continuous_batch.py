"""The requests that an engine generates for at the same time, and their steps.

Siblings: requests whose ids are the same so far share a slot. Each step computes their logits once,
and each of them samples from these with its own seed. Those that sample another id continue in a
slot of their own, which shares the keys and values of what they have in common.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrl.engine.embedded.prompts import flatten_prompts
from rayrl.engine.embedded.requests import (
    Answer,
    DeltaStream,
    EngineRequest,
    Message,
    Sleep,
    Stats,
    WeightUpdate,
)
from rayrl.engine.embedded.sampler import raw_logprobs, sample
from rayrl.engine.embedded.slots import SLOTS_PER_LIVE, DecodeState, SlotTable
from rayrl.errors import InfraError, RayrlError, StaleWeights
from rayrl.types import Completion, Delta, Finish, VersionSpan

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from numpy.typing import NDArray

    from rayrl.engine.embedded.attention import KVPool
    from rayrl.engine.embedded.model import FlatModel

__all__ = ["ContinuousBatch"]

# distinct tokens per prefill step, between which running requests wait
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}


class ContinuousBatch:
    """Requests join and leave between steps; used by one thread alone.

    Args:
        pool: keys and values.
        state: has a row for each request that runs, and a limit on their lengths.
        tokenizer: for stop strings.
        raw_logprobs: see `open_engine`.

    Attributes:
        version: of the weights that `model` has.
        waiting: requests that have not begun.
        running: those that have, by row of the decode state.
        update: weights to load as soon as nothing runs; until then nothing begins.
        answers: results that have not been delivered yet.
    """

    def __init__(
        self,
        model: FlatModel,
        pool: KVPool,
        state: DecodeState,
        *,
        version: int,
        tokenizer: Any,
        raw_logprobs: bool,
    ) -> None:
        self._model = model
        self._pool = pool
        self._table = SlotTable(SLOTS_PER_LIVE * state.rows, state.max_len, pool.tokens)
        self._state = state
        self._tokenizer = tokenizer
        self._raw_logprobs = raw_logprobs
        self.version = version
        self.waiting: deque[EngineRequest] = deque()
        self.running: dict[int, EngineRequest] = {}
        self.update: WeightUpdate | Sleep | None = None
        self.answers: list[Answer] = []
        self.stats = Stats()

    def take(self, message: Message) -> None:
        """Accept a message that was sent to the engine."""
        if isinstance(message, EngineRequest):
            self.waiting.append(message)
        elif isinstance(message, WeightUpdate | Sleep):
            self.update = message
        else:
            self._table.release(message.sessions)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self.update)

    def step(self) -> None:
        """Load weights or sleep, if that waits and nothing runs; then one prefill or decode."""
        cancelled = [row for row, running in self.running.items() if running.cancelled]
        if cancelled:
            self._finish(np.array(cancelled))
        if self.update is not None and not self.running:
            update, self.update = self.update, None
            if isinstance(update, WeightUpdate):
                self._load(update)
            else:
                self._table.clear()
                self._pool.clear()
                self.answers.append((update.future, None))
        admitted = [] if self.update is not None else self._admit()
        began = time.perf_counter()
        if admitted:
            self._prefill(admitted)
            self.stats.prefill_steps += 1
            self.stats.prefill_seconds += time.perf_counter() - began
        elif self.running:
            self._decode()
            self.stats.decode_steps += 1
            self.stats.decode_seconds += time.perf_counter() - began

    def fail(self, error: Exception, unread: Iterable[Message] = ()) -> None:
        """Fail all requests and updates, and drop state that a failed step left partial.

        Args:
            unread: messages to fail as well.
        """
        if not isinstance(error, RayrlError):
            error = InfraError(f"the engine's step failed: {type(error).__name__}: {error}")
        for failed in (*unread, self.update, *self.running.values(), *self.waiting):
            if isinstance(failed, EngineRequest):
                self.answers.append((failed.reader, error))
            elif isinstance(failed, WeightUpdate | Sleep):
                self.answers.append((failed.future, error))
        self.update = None
        self.waiting.clear()
        self.running.clear()
        self._state.clear()
        self._table.clear()

    def _load(self, update: WeightUpdate) -> None:
        began = time.perf_counter()
        try:
            digest = self._model.load(update.flat, update.manifest)
        except Exception as error:  # of any type, or the caller would wait for ever
            self.answers.append((update.future, error))
            return
        self._table.clear()
        self.version = update.version
        self.answers.append((update.future, digest))
        self.stats.load_seconds += time.perf_counter() - began

    def _admit(self) -> list[EngineRequest]:
        """Give slots to waiting requests, up to about `PREFILL_TOKENS` new tokens.

        A request that the pool might have no room for at its full length waits for others to end.
        """
        admitted: list[EngineRequest] = []
        tokens = 0
        table, state = self._table, self._state
        rows = [*self.running]
        promised = int((state.max_new[rows] - state.sampled[rows]).sum())
        claimed: dict[bytes, tuple[int, int]] = {}  # slot and cached ids of each distinct prompt
        limit = PREFILL_TOKENS[self._model.device.type]
        while self.waiting and tokens < limit and state.free:
            candidate = self.waiting.popleft()
            request, prompt = candidate.request, candidate.prompt
            if candidate.cancelled:
                continue
            if request.min_version > self.version:
                message = f"version {request.min_version} requested, version {self.version} loaded"
                self.answers.append((candidate.reader, StaleWeights(message)))
                continue
            key = prompt.tobytes()
            new = 0
            if key in claimed:
                table.join(request.session, claimed[key][0])
            else:
                claimed[key] = table.claim(request.session, prompt)
                new = len(prompt) - claimed[key][1]
            slot, candidate.cached = claimed[key]
            needed = new + state.limit(request)
            if table.pinned + promised + needed > table.tokens:
                table.finish(np.array([slot]))
                self.waiting.appendleft(candidate)
                break
            promised += needed
            tokens += new
            streams = isinstance(candidate.reader, DeltaStream)
            candidate.row = state.start(slot, request, streams)
            self.running[candidate.row] = candidate
            admitted.append(candidate)
        return admitted

    def _prefill(self, admitted: list[EngineRequest]) -> None:
        """Compute the prompts' uncached tokens, each shared prefix once, and sample."""
        rows = np.array([request.row for request in admitted])
        of_slot = {int(self._state.slot[request.row]): request for request in admitted}
        slots = np.array(sorted(of_slot))
        distinct = [(slot, of_slot[slot].prompt, of_slot[slot].cached) for slot in slots.tolist()]
        flat = flatten_prompts(distinct)
        self._table.place(flat)
        logits = self._model.prefill(self._pool, self._table.rows, flat)
        self.stats.prompt_tokens += int(self._state.prompt[rows].sum())
        self.stats.computed_tokens += len(flat.ids)
        self._sample(rows, slots, logits)

    def _decode(self) -> None:
        """Compute and sample one more id for every running request.

        Requests with the same ids so far are computed once.
        """
        table = self._table
        slots = np.flatnonzero(table.running)
        positions = table.cached[slots]
        table.extend(slots)
        ids = table.ids[slots, positions]
        logits = self._model.decode(self._pool, table.rows, slots, positions, ids)
        self.stats.decoded_tokens += len(slots)
        self._sample(np.array([*self.running]), slots, logits)

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
                self.running[int(rows[k])].alternatives.append(alternatives[k])
        count = state.sampled[rows]
        state.ids[rows, count] = ids
        state.logprobs[rows, count] = logprobs
        state.sampled[rows] = count + 1
        self.stats.sampled_tokens += len(rows)
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
                    self.answers.append((self.running[row].reader, failure))
                else:
                    self.stats.completions += 1
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
            sessions = [self.running[row].request.session for row in moved.tolist()]
            state.slot[moved] = table.split(int(by_slot[parts[part]]), sessions)
        slots = state.slot[rows]
        table.ids[slots, table.cached[slots]] = ids

    def _finish(self, rows: NDArray[np.int64]) -> None:
        for row in rows.tolist():
            del self.running[row]
        self._state.free += rows.tolist()
        self._table.finish(self._state.slot[rows])

    def _ends_with_stop_string(self, row: int) -> bool:
        """Whether the last sampled id completed a stop string."""
        stops = self.running[row].request.sampling.stop
        # every id decodes to at least a byte, so a stop string just completed lies in these ids
        window = max(len(stop.encode()) for stop in stops) + 4
        count = int(self._state.sampled[row])
        tail = self._state.ids[row, max(0, count - window) : count].tolist()
        text = self._tokenizer.decode(tail, skip_special_tokens=False)
        return any(stop in text for stop in stops)

    def _answer(self, row: int, finish: Finish | None) -> None:
        """Queue a stream's next delta or, at its end, a whole completion."""
        answered = self.running[row]
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
        self.answers.append((answered.reader, result))
