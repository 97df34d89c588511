"""Slots of the KV slab: the conversations in them, and the generations that run in them."""

from __future__ import annotations

from collections.abc import Iterable
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
    """Slots, their owning sessions and their cached ids.

    Attributes:
        ids: (slots, max_len) ids of each slot's conversation.
        cached: (slots,) number of leading ids whose keys and values are in the slab.
        live: (slots,) bool; a live slot has a running generation and is not reassigned.
    """

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.ids: NDArray[np.int64] = np.zeros((slab.slots, slab.max_len), dtype=np.int64)
        self.cached: NDArray[np.int64] = np.zeros(slab.slots, dtype=np.int64)
        self.live: NDArray[np.bool_] = np.zeros(slab.slots, dtype=np.bool_)
        self._owner: list[str | None] = [None] * slab.slots
        self._slot_of: dict[str, int] = {}
        self._used = np.zeros(slab.slots, dtype=np.int64)  # tick of the last use; 0: free
        self._tick = 0

    def claim(self, session: str, prompt: NDArray[np.int64]) -> tuple[int, int] | None:
        """Make a slot live for a prompt; returns the slot and its number of cached prompt ids.

        They were cached by the session's earlier turns, or are copied from the slot with the
        longest common prefix. The last prompt id never counts: its logits are needed. Returns None
        if every slot is live.
        """
        slot = self._slot_of.get(session)
        if slot is not None and self.live[slot]:
            slot = None  # a second request of a session at the same time gets another slot
        own = 0
        if slot is not None:
            limit = min(int(self.cached[slot]), len(prompt) - 1)
            differs = np.flatnonzero(self.ids[slot, :limit] != prompt[:limit])
            own = int(differs[0]) if len(differs) else limit
        if slot is None or own < min(self.cached[slot], len(prompt) - 1):
            donor, shared = self._longest_prefix(prompt)
            if slot is None:
                if self.live.all():
                    return None
                last_used = np.where(self.live, np.iinfo(np.int64).max, self._used)
                slot = int(last_used.argmin())
                self._disown(slot)
                if session not in self._slot_of:
                    self._owner[slot] = session
                    self._slot_of[session] = slot
            if donor == slot:
                own = shared
            elif shared >= own + MIN_SHARED:
                self.slab.copy_prefix(donor, slot, shared)
                own = shared
        self.ids[slot, : len(prompt)] = prompt
        self.cached[slot] = own
        self.live[slot] = True
        return slot, own

    def finish(self, slots: NDArray[np.int64]) -> None:
        """End the slots' generations; their sessions own them until another one needs a slot."""
        self._tick += 1
        self.live[slots] = False
        self._used[slots] = self._tick

    def release(self, sessions: Iterable[str]) -> None:
        """Free the slots of sessions that have ended, so that they are reassigned first."""
        for session in sessions:
            slot = self._slot_of.get(session)
            if slot is not None:
                self._disown(slot)
                self._used[slot] = 0

    def clear(self) -> None:
        """Invalidate all keys and values, e.g. because the weights have changed."""
        self.cached[:] = 0

    def _disown(self, slot: int) -> None:
        owner = self._owner[slot]
        if owner is not None:
            del self._slot_of[owner]
            self._owner[slot] = None

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
    """Generation state of each slot, in arrays (slots,) so that no step loops over slots.

    Attributes:
        prompt: number of prompt ids. sampled: number of ids sampled so far. max_new: limit on it.
        stop_ids: (slots, n) padded with -1. has_stop: whether the request has stop strings.
        top: alternatives per sampled id. streams: whether the reader wants deltas.
        logprobs: (slots, max_len) of the ids sampled so far.
    """

    slots: int
    max_len: int
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
    logprobs: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        n = self.slots
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
        self.logprobs = np.zeros((n, self.max_len), dtype=np.float32)

    def start(self, slot: int, request: Request, max_len: int, streams: bool) -> None:
        """Initialize a slot for a request whose conversation may have `max_len` ids."""
        sampling, stop_ids = request.sampling, request.stop_ids
        self.prompt[slot] = len(request.prompt_ids)
        self.sampled[slot] = 0
        self.max_new[slot] = min(sampling.max_tokens, max_len - len(request.prompt_ids))
        self.seed[slot] = request.seed & 0xFFFFFFFFFFFFFFFF
        # clipped, so that logits / temperature stays finite
        warm = float(np.clip(sampling.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE))
        self.temperature[slot] = warm if sampling.temperature else 0.0
        self.top_k[slot] = min(sampling.top_k, np.iinfo(np.int64).max)
        self.top_p[slot] = sampling.top_p
        extra = len(stop_ids) - self.stop_ids.shape[1]
        if extra > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, extra)), constant_values=-1)
        self.stop_ids[slot] = -1
        possible = [i if 0 <= i < MAX_ID else -1 for i in stop_ids]  # others are never sampled
        self.stop_ids[slot, : len(stop_ids)] = possible
        self.has_stop[slot] = bool(sampling.stop)
        self.top[slot] = min(request.top_logprobs, np.iinfo(np.int64).max)
        self.streams[slot] = streams

    def sampling_batch(self, slots: NDArray[np.int64]) -> SamplingBatch:
        """Return the sampling parameters for the next id of each of `slots`."""
        return SamplingBatch(
            self.temperature[slots],
            self.top_k[slots],
            self.top_p[slots],
            self.seed[slots],
            self.sampled[slots],
        )
