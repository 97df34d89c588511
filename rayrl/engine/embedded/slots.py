"""Slots of the KV slab: the conversations in them, and the generations that run in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayrl.engine.embedded.attention import Slab
from rayrl.engine.embedded.sampler import SamplingBatch
from rayrl.errors import ConfigError
from rayrl.types import Request

__all__ = ["DecodeState", "SlotTable", "slots_for"]

SLOTS_PER_LIVE = 4  # limit on slots, per conversation that may be decoded at once
MIN_SHARED = 8  # ids; shorter prefixes are not worth copying
MAX_ID = 2**62
STOP_IDS = 8  # initial columns of the stop id table; it grows with requests that have more
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30


def slots_for(slot_bytes: int, max_len: int, kv_cache_gb: float, max_live: int) -> int:
    """Return the number of slots that fit the budget, at most `SLOTS_PER_LIVE * max_live`.

    Args:
        slot_bytes: keys and values of a conversation of `max_len` ids.

    Raises:
        ConfigError: not even one conversation fits.
    """
    fit = int(kv_cache_gb * 1e9 // slot_bytes)
    if fit < 1:
        raise ConfigError(
            f"engine.kv_cache_gb={kv_cache_gb}: one conversation of {max_len} ids takes "
            f"{slot_bytes / 1e9:.3g} GB; raise it or lower engine.max_len"
        )
    return min(fit, SLOTS_PER_LIVE * max_live)


class SlotTable:
    """Slots, the sessions that continue from them, and their cached ids.

    Conversations with the same ids so far are in one slot, each distinct one once.

    Attributes:
        ids: (slots, max_len) ids of each slot's conversation.
        cached: (slots,) number of leading ids whose keys and values are in the slab.
        running: (slots,) generations that run in each; meanwhile it is not reassigned.
    """

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.ids: NDArray[np.int64] = np.zeros((slab.slots, slab.max_len), dtype=np.int64)
        self.cached: NDArray[np.int64] = np.zeros(slab.slots, dtype=np.int64)
        self.running: NDArray[np.int64] = np.zeros(slab.slots, dtype=np.int64)
        self._sessions: list[set[str]] = [set() for _ in range(slab.slots)]
        self._slot_of: dict[str, int] = {}
        self._used = np.zeros(slab.slots, dtype=np.int64)  # tick of the last use; 0: free
        self._tick = 0

    def claim(self, session: str, prompt: NDArray[np.int64]) -> tuple[int, int]:
        """Begin a generation; returns its slot and the number of cached prompt ids.

        They were cached by the session's earlier turns, or are copied from the slot with the
        longest common prefix. The last prompt id never counts: its logits are needed. There must
        be a slot in which nothing runs.
        """
        slot = self._slot_of.get(session)
        own = 0 if slot is None else self._common_prefix(slot, prompt)
        donor, shared = slot, own
        if slot is None or own < min(self.cached[slot], len(prompt) - 1):
            donor, shared = self._longest_prefix(prompt)
        # others that continue from it would lose what this prompt does not have
        loses = slot is not None and own < self.cached[slot] and len(self._sessions[slot]) > 1
        if slot is None or self.running[slot] or loses:
            slot, own = self._free(), 0
        if donor == slot:
            own = shared
        elif donor is not None and shared >= own + MIN_SHARED:
            self.slab.copy_prefix(donor, slot, shared)
            own = shared
        self.ids[slot, : len(prompt)] = prompt
        self.cached[slot] = own
        self.join(session, slot)
        return slot, own

    def join(self, session: str, slot: int) -> None:
        """Begin another generation in a slot, for a conversation with the same ids."""
        self.running[slot] += 1
        self._move(session, slot)

    def split(self, slot: int, sessions: Sequence[str]) -> int:
        """Move one generation of each session to a slot of their own, with a copy of this one."""
        new = self._free()
        length = int(self.cached[slot])
        self.slab.copy_prefix(slot, new, length)
        self.ids[new, :length] = self.ids[slot, :length]
        self.cached[new] = length
        self.running[slot] -= len(sessions)
        self.running[new] = len(sessions)
        for session in sessions:
            self._move(session, new)
        return new

    def finish(self, slots: NDArray[np.int64]) -> None:
        """End a generation in each of the slots, which may repeat.

        Its session continues from the slot until another one needs it.
        """
        self._tick += 1
        np.subtract.at(self.running, slots, 1)
        self._used[slots] = self._tick

    def release(self, sessions: Iterable[str]) -> None:
        """Forget sessions that have ended; slots that no other has are reassigned first."""
        for session in sessions:
            slot = self._slot_of.pop(session, None)
            if slot is not None:
                self._sessions[slot].discard(session)
                if not self._sessions[slot]:
                    self._used[slot] = 0

    def clear(self) -> None:
        """Invalidate all keys and values, e.g. because the weights have changed."""
        self.cached[:] = 0

    def _move(self, session: str, slot: int) -> None:
        self.release([session])
        self._slot_of[session] = slot
        self._sessions[slot].add(session)

    def _free(self) -> int:
        """Return the slot that has not been used for longest, without its sessions."""
        last_used = np.where(self.running > 0, np.iinfo(np.int64).max, self._used)
        slot = int(last_used.argmin())
        for session in self._sessions[slot]:
            del self._slot_of[session]
        self._sessions[slot].clear()
        return slot

    def _common_prefix(self, slot: int, prompt: NDArray[np.int64]) -> int:
        limit = min(int(self.cached[slot]), len(prompt) - 1)
        differs = np.flatnonzero(self.ids[slot, :limit] != prompt[:limit])
        return int(differs[0]) if len(differs) else limit

    def _longest_prefix(self, prompt: NDArray[np.int64]) -> tuple[int, int]:
        """Return the slot with the longest cached prefix of the prompt, and the prefix's length."""
        limit = min(len(prompt) - 1, int(self.cached.max()))
        if limit < MIN_SHARED:
            return 0, 0
        candidates = np.flatnonzero(
            (self.cached >= MIN_SHARED)
            & (self.ids[:, :MIN_SHARED] == prompt[:MIN_SHARED]).all(axis=1)
        )
        if not len(candidates):
            return 0, 0
        differs = self.ids[candidates, :limit] != prompt[:limit]
        shared = np.where(differs.any(axis=1), differs.argmax(axis=1), limit)
        shared = np.minimum(shared, self.cached[candidates])
        best = int(shared.argmax())
        return int(candidates[best]), int(shared[best])


@dataclass(slots=True)
class DecodeState:
    """State of each running generation, in arrays (rows,) so that no step loops over rows.

    Attributes:
        slot: where its conversation is; generations with the same ids so far share one.
        prompt: number of prompt ids. sampled: number of ids sampled so far. max_new: limit on it.
        stop_ids: (rows, n) padded with -1. has_stop: whether the request has stop strings.
        top: alternatives per sampled id. streams: whether the reader wants deltas.
        ids, logprobs: (rows, max_len) of what has been sampled so far.
        free: rows that no generation uses.
    """

    rows: int
    max_len: int
    slot: NDArray[np.int64] = field(init=False)
    prompt: NDArray[np.int64] = field(init=False)
    sampled: NDArray[np.int64] = field(init=False)
    max_new: NDArray[np.int64] = field(init=False)
    seed: NDArray[np.uint64] = field(init=False)
    temperature: NDArray[np.float32] = field(init=False)
    top_k: NDArray[np.int64] = field(init=False)
    top_p: NDArray[np.float64] = field(init=False)
    stop_ids: NDArray[np.int64] = field(init=False)
    has_stop: NDArray[np.bool_] = field(init=False)
    top: NDArray[np.int64] = field(init=False)
    streams: NDArray[np.bool_] = field(init=False)
    ids: NDArray[np.int64] = field(init=False)
    logprobs: NDArray[np.float32] = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        n = self.rows
        self.slot = np.zeros(n, dtype=np.int64)
        self.prompt = np.zeros(n, dtype=np.int64)
        self.sampled = np.zeros(n, dtype=np.int64)
        self.max_new = np.zeros(n, dtype=np.int64)
        self.seed = np.zeros(n, dtype=np.uint64)
        self.temperature = np.zeros(n, dtype=np.float32)
        self.top_k = np.zeros(n, dtype=np.int64)
        self.top_p = np.ones(n, dtype=np.float64)
        self.stop_ids = np.full((n, STOP_IDS), -1, dtype=np.int64)
        self.has_stop = np.zeros(n, dtype=np.bool_)
        self.top = np.zeros(n, dtype=np.int64)
        self.streams = np.zeros(n, dtype=np.bool_)
        self.ids = np.zeros((n, self.max_len), dtype=np.int64)
        self.logprobs = np.zeros((n, self.max_len), dtype=np.float32)
        self.clear()

    def clear(self) -> None:
        """End all generations."""
        self.free = [*reversed(range(self.rows))]

    def start(self, slot: int, request: Request, streams: bool) -> int:
        """Begin a generation; returns its row, one of those that were free."""
        row = self.free.pop()
        sampling, stop_ids = request.sampling, request.stop_ids
        self.slot[row] = slot
        self.prompt[row] = len(request.prompt_ids)
        self.sampled[row] = 0
        self.max_new[row] = min(sampling.max_tokens, self.max_len - len(request.prompt_ids))
        self.seed[row] = request.seed & 0xFFFFFFFFFFFFFFFF
        # clipped, so that logits / temperature stays finite
        warm = float(np.clip(sampling.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE))
        self.temperature[row] = warm if sampling.temperature else 0.0
        self.top_k[row] = min(sampling.top_k, np.iinfo(np.int64).max)
        self.top_p[row] = sampling.top_p
        extra = len(stop_ids) - self.stop_ids.shape[1]
        if extra > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, extra)), constant_values=-1)
        self.stop_ids[row] = -1
        possible = [i if 0 <= i < MAX_ID else -1 for i in stop_ids]  # others are never sampled
        self.stop_ids[row, : len(stop_ids)] = possible
        self.has_stop[row] = bool(sampling.stop)
        self.top[row] = min(request.top_logprobs, np.iinfo(np.int64).max)
        self.streams[row] = streams
        return row

    def sampling_batch(self, rows: NDArray[np.int64]) -> SamplingBatch:
        """Return the sampling parameters for the next id of each of `rows`."""
        return SamplingBatch(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.seed[rows],
            self.sampled[rows],
        )
