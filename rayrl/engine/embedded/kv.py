"""Assignment of conversations to slots of the KV slab, and reuse of their keys and values."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rayrl.engine.embedded.attention import Slab
from rayrl.errors import ConfigError

__all__ = ["SlotTable", "slots_for"]

SLOTS_PER_LIVE = 4  # limit on slots, per conversation that may be decoded at once
MIN_SHARED = 8  # ids; shorter prefixes are not worth copying


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
