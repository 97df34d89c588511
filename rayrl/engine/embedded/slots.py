"""Conversations and where their keys and values are, and the generations that run in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayrl.engine.embedded.attention import PAD
from rayrl.engine.embedded.prompts import FlatPrompts
from rayrl.engine.embedded.sampler import SamplingBatch
from rayrl.errors import ConfigError
from rayrl.types import Request

__all__ = ["SLOTS_PER_LIVE", "DecodeState", "SlotTable", "tokens_for"]

SLOTS_PER_LIVE = 4  # slots per conversation that may be decoded at once; idle ones are kept cached
MIN_SHARED = 8  # ids; shorter prefixes are not looked for
MAX_ID = 2**62
STOP_IDS = 8  # initial columns of the stop id table; it grows with requests that have more
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30


def tokens_for(token_bytes: int, max_len: int, kv_cache_gb: float, max_live: int) -> int:
    """Return how many tokens' keys and values fit the budget; no more than slots could hold.

    Raises:
        ConfigError: not even one conversation of `max_len` ids fits.
    """
    fit = int(kv_cache_gb * 1e9 // token_bytes)
    if fit < max_len:
        raise ConfigError(
            f"engine.kv_cache_gb={kv_cache_gb}: one conversation of {max_len} ids takes "
            f"{max_len * token_bytes / 1e9:.3g} GB; raise it or lower engine.max_len"
        )
    return min(fit, SLOTS_PER_LIVE * max_live * max_len)


class SlotTable:
    """A slot for each distinct conversation: its ids, and where in the pool each one's keys are.

    Conversations share the pool's rows of what they have in common, so together they form a trie of
    tokens (a radix tree with one token per node). A row is free again when no slot has it.

    Args:
        tokens: rows of the pool.

    Attributes:
        ids: (slots, columns) ids of each slot's conversation; `max_len` of the columns are used.
        rows: (slots, columns) the row of the pool of each cached id.
        cached: (slots,) number of leading ids whose keys and values are in the pool.
        running: (slots,) generations that run in each; meanwhile it is not reassigned.
        pinned: rows of the pool that slots have in which something runs; others can be had.
    """

    def __init__(self, slots: int, max_len: int, tokens: int) -> None:
        columns = -(-max_len // PAD) * PAD
        self.tokens = tokens
        self.ids: NDArray[np.int64] = np.zeros((slots, columns), dtype=np.int64)
        self.rows: NDArray[np.int32] = np.zeros((slots, columns), dtype=np.int32)
        self.cached: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self.running: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self._sessions: list[set[str]] = [set() for _ in range(slots)]
        self._slot_of: dict[str, int] = {}
        self._used = np.zeros(slots, dtype=np.int64)  # tick of the last use; 0: free
        self._tick = 0
        self._holders = np.zeros(tokens, dtype=np.int32)  # slots that have each row
        self._pins = np.zeros(tokens, dtype=np.int32)  # of them, those in which something runs
        self._free = np.zeros(tokens, dtype=np.int32)  # a stack, of which `_free_count` are valid
        self.clear()

    def claim(self, session: str, prompt: NDArray[np.int64]) -> tuple[int, int]:
        """Begin a generation; returns its slot and the number of cached prompt ids.

        They were cached by the session's earlier turns, or are those of the slot with the longest
        common prefix. The last prompt id never counts: its logits are needed. There must be a slot
        in which nothing runs.
        """
        slot = self._slot_of.get(session)
        own = 0 if slot is None else self._common_prefix(slot, prompt)
        if slot is not None and own == min(self.cached[slot], len(prompt) - 1):
            donor, shared = slot, own
        else:
            donor, shared = self._longest_prefix(prompt)
        # others that continue from it would lose what this prompt does not have
        loses = slot is not None and own < self.cached[slot] and len(self._sessions[slot]) > 1
        if slot is None or self.running[slot] or loses:
            slot, own = self._idle_slot(), 0
        if donor != slot and shared > own:
            self._share(donor, slot, shared)
        else:
            self._forget(slot, max(own, shared))
        self.ids[slot, : len(prompt)] = prompt
        self.join(session, slot)
        return slot, int(self.cached[slot])

    def join(self, session: str, slot: int) -> None:
        """Begin another generation in a slot, for a conversation with the same ids."""
        self._run(slot, 1)
        self._move(session, slot)

    def split(self, slot: int, sessions: Sequence[str]) -> int:
        """Move one generation of each session to a slot of their own, with the same ids."""
        new = self._idle_slot()
        length = int(self.cached[slot])
        self._share(slot, new, length)
        self.ids[new, :length] = self.ids[slot, :length]
        self._run(new, len(sessions))
        self.running[slot] -= len(sessions)
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
        for slot in np.unique(slots[self.running[slots] == 0]).tolist():
            rows = self.rows[slot, : self.cached[slot]]
            self._pins[rows] -= 1
            self.pinned -= int((self._pins[rows] == 0).sum())

    def place(self, flat: FlatPrompts) -> None:
        """Find room in the pool for the new tokens of prompts, which are cached from now on."""
        rows = self._take(len(flat.ids))
        self.rows[flat.target_slots, flat.target_positions] = rows[flat.source]
        self._holders[rows] = self._pins[rows] = np.bincount(flat.source)
        np.maximum.at(self.cached, flat.target_slots, flat.target_positions + 1)

    def extend(self, slots: NDArray[np.int64]) -> None:
        """Find room in the pool for one more token of each of the slots, cached from now on."""
        rows = self._take(len(slots))
        self.rows[slots, self.cached[slots]] = rows
        self._holders[rows] = self._pins[rows] = 1
        self.cached[slots] += 1

    def release(self, sessions: Iterable[str]) -> None:
        """Forget sessions that have ended; slots that no other has are reassigned first."""
        for session in sessions:
            slot = self._slot_of.pop(session, None)
            if slot is not None:
                self._sessions[slot].discard(session)
                if not self._sessions[slot]:
                    self._used[slot] = 0

    def clear(self) -> None:
        """Invalidate all keys and values, e.g. because the weights have changed; nothing runs."""
        self.running[:] = 0
        self.cached[:] = 0
        self._holders[:] = 0
        self._pins[:] = 0
        self.pinned = 0
        self._free[:] = np.arange(self.tokens)[::-1]
        self._free_count = self.tokens

    def _take(self, count: int) -> NDArray[np.int32]:
        """Return `count` rows of the pool, pinned; idle slots lose theirs if there are too few."""
        while self._free_count < count:
            idle = (self.running == 0) & (self.cached > 0)
            oldest = np.where(idle, self._used, np.iinfo(np.int64).max).argmin()
            self._forget(int(oldest), 0)
        self._free_count -= count
        self.pinned += count
        return self._free[self._free_count : self._free_count + count][::-1].copy()

    def _run(self, slot: int, generations: int) -> None:
        if not self.running[slot]:
            rows = self.rows[slot, : self.cached[slot]]
            self._pins[rows] += 1
            self.pinned += int((self._pins[rows] == 1).sum())
        self.running[slot] += generations

    def _share(self, source: int, target: int, length: int) -> None:
        """Give `target`, in which nothing runs, the first `length` tokens of `source` alone."""
        rows = self.rows[source, :length]
        self._holders[rows] += 1
        self._forget(target, 0)
        self.rows[target, :length] = rows
        self.cached[target] = length

    def _forget(self, slot: int, length: int) -> None:
        """Keep the first `length` tokens of a slot in which nothing runs."""
        rows = self.rows[slot, length : self.cached[slot]]
        self._holders[rows] -= 1
        freed = rows[self._holders[rows] == 0]
        self._free[self._free_count : self._free_count + len(freed)] = freed[::-1]
        self._free_count += len(freed)
        self.cached[slot] = length

    def _move(self, session: str, slot: int) -> None:
        self.release([session])
        self._slot_of[session] = slot
        self._sessions[slot].add(session)

    def _idle_slot(self) -> int:
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
        self.max_new[row] = self.limit(request)
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

    def limit(self, request: Request) -> int:
        """Return how many ids may be sampled for a request."""
        return min(request.sampling.max_tokens, self.max_len - len(request.prompt_ids))

    def sampling_batch(self, rows: NDArray[np.int64]) -> SamplingBatch:
        """Return the sampling parameters for the next id of each of `rows`."""
        return SamplingBatch(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.seed[rows],
            self.sampled[rows],
        )
