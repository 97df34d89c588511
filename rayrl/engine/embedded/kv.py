"""Which conversation owns which slot of the slab, and whose keys and values can be used again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rayrl.engine.embedded.attention import Geometry, KVSlab
from rayrl.errors import ConfigError

__all__ = ["SlotTable", "slots_for"]

SPARE = 4  # slots at most, for each conversation that may be decoded at once
MIN_SHARED = 8  # a prefix shorter than this is not worth copying


def slots_for(geometry: Geometry, max_len: int, kv_cache_gb: float, max_live: int) -> int:
    """Slots that fit the memory budget, at most `SPARE` for each live conversation.

    Raises:
        ConfigError: not one conversation fits.
    """
    each = geometry.slot_bytes(max_len)
    fit = int(kv_cache_gb * 1e9 // each)
    if fit < 1:
        raise ConfigError(
            f"engine.kv_cache_gb={kv_cache_gb}: one conversation of {max_len} ids takes "
            f"{each / 1e9:.3g} GB; raise it or lower engine.max_len"
        )
    return min(fit, SPARE * max_live)


class SlotTable:
    """Slots, their owners and what they hold.

    Attributes:
        ids: (slots, max_len) ids of each slot's conversation.
        held: (slots,) how many of them have keys and values in the slab.
        live: (slots,) bool; a live slot is being generated in, and is not taken away.
    """

    def __init__(self, slab: KVSlab) -> None:
        self.slab = slab
        self.ids: NDArray[np.int64] = np.zeros((slab.slots, slab.max_len), dtype=np.int64)
        self.held: NDArray[np.int64] = np.zeros(slab.slots, dtype=np.int64)
        self.live: NDArray[np.bool_] = np.zeros(slab.slots, dtype=np.bool_)
        self._owner: list[str | None] = [None] * slab.slots
        self._slot_of: dict[str, int] = {}
        self._used = np.zeros(slab.slots, dtype=np.int64)  # tick of the last use; 0 is free
        self._tick = 0

    def claim(self, session: str, prompt: NDArray[np.int64]) -> tuple[int, int] | None:
        """A live slot whose first ids are `prompt`, and how many already have keys and values.

        Those are the slot's own when the session had it, or copied from the slot with the longest
        common prefix. The last prompt id is never among them: its logits are needed. None when
        every slot is live.
        """
        slot = self._slot_of.get(session)
        if slot is not None and self.live[slot]:
            slot = None  # two requests of one session at once: the second is a stranger
        own = 0
        if slot is not None:
            own = _common(self.ids[slot], prompt, int(self.held[slot]))
        if slot is None or own < min(self.held[slot], len(prompt) - 1):
            donor, shared = self._donor(prompt)
            if slot is None:
                slot = self._take()
                if slot is None:
                    return None
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
        self.held[slot] = own
        self.live[slot] = True
        return slot, own

    def finish(self, slots: NDArray[np.int64]) -> None:
        """The slots' generations ended; their owners keep them until others need the room."""
        self._tick += 1
        self.live[slots] = False
        self._used[slots] = self._tick

    def release(self, sessions: Iterable[str]) -> None:
        """These conversations are over: their slots are the first to be taken."""
        for session in sessions:
            slot = self._slot_of.get(session)
            if slot is not None:
                self._disown(slot)
                self._used[slot] = 0

    def clear(self) -> None:
        """Forget all keys and values, e.g. because they were made with older weights."""
        self.held[:] = 0

    def _take(self) -> int | None:
        """The free or longest idle slot."""
        if self.live.all():
            return None
        return int(np.where(self.live, np.iinfo(np.int64).max, self._used).argmin())

    def _disown(self, slot: int) -> None:
        owner = self._owner[slot]
        if owner is not None:
            del self._slot_of[owner]
            self._owner[slot] = None

    def _donor(self, prompt: NDArray[np.int64]) -> tuple[int, int]:
        """The slot that shares the longest prefix with the prompt, and how long it is."""
        most = min(len(prompt) - 1, int(self.held.max()))
        if most < MIN_SHARED:
            return 0, 0
        near = np.flatnonzero(
            (self.held >= MIN_SHARED)
            & (self.ids[:, :MIN_SHARED] == prompt[:MIN_SHARED]).all(axis=1)
        )
        if not len(near):
            return 0, 0
        differs = self.ids[near, :most] != prompt[:most]
        shared = np.where(differs.any(axis=1), differs.argmax(axis=1), most)
        shared = np.minimum(shared, self.held[near])
        best = int(shared.argmax())
        return int(near[best]), int(shared[best])


def _common(ids: NDArray[np.int64], prompt: NDArray[np.int64], held: int) -> int:
    """How many leading ids agree, of those that have keys and values; the last prompt id never."""
    most = min(held, len(prompt) - 1)
    differs = np.flatnonzero(ids[:most] != prompt[:most])
    return int(differs[0]) if len(differs) else most
