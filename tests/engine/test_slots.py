"""The table of conversations and the rows of the pool that they share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.engine.embedded.prompts import flatten_prompts
from rayrl.engine.embedded.slots import SlotTable, tokens_for
from rayrl.errors import ConfigError

MAX_LEN = 40
TOKENS = 90


class Pool:
    """What a pool would hold: for each row, the ids up to and including its token."""

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self.held: dict[int, tuple[int, ...]] = {}

    def write(self, slot: int, position: int) -> None:
        ids = tuple(self.table.ids[slot, : position + 1].tolist())
        self.held[int(self.table.rows[slot, position])] = ids

    def check(self) -> None:
        """Compare the table with what it should say."""
        table = self.table
        holders = np.zeros(TOKENS, dtype=int)
        pins = np.zeros(TOKENS, dtype=int)
        for slot, cached in enumerate(table.cached.tolist()):
            ids = tuple(table.ids[slot].tolist())
            rows = table.rows[slot, :cached].tolist()
            assert [self.held[row] for row in rows] == [ids[: i + 1] for i in range(cached)]
            holders[rows] += 1
            pins[rows] += table.running[slot] > 0
        assert table.pinned == (pins > 0).sum()
        assert table._free_count == (holders == 0).sum()
        assert set(table._free[: table._free_count].tolist()) == set(np.flatnonzero(holders == 0))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_row_holds_the_ids_of_all_who_share_it(data: st.DataObject) -> None:
    table = SlotTable(6, MAX_LEN, TOKENS)
    pool = Pool(table)
    running: dict[str, int] = {}
    spoken: dict[str, list[int]] = {}
    ids = st.integers(0, 1)
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["begin", "sample", "finish", "release", "clear"]))
        idle = sorted({"a", "b", "c", "d", "e"} - running.keys())
        room = table.tokens - table.pinned >= MAX_LEN
        if action == "begin" and idle and room and len(set(running.values())) < 4:
            name = data.draw(st.sampled_from(idle))
            old = spoken.get(name, []) if data.draw(st.booleans()) else [0] * 8
            prompt = [*old, *data.draw(st.lists(ids, min_size=1, max_size=12))][:MAX_LEN]
            slot, cached = table.claim(name, np.array(prompt))
            assert cached < len(prompt)
            flat = flatten_prompts([(slot, np.array(prompt), cached)])
            table.place(flat)
            for position in range(cached, len(prompt)):
                pool.write(slot, position)
            running[name], spoken[name] = slot, prompt
            twin = data.draw(st.sampled_from([None, *sorted(set(idle) - {name})]))
            if twin is not None:
                table.join(twin, slot)
                running[twin], spoken[twin] = slot, list(prompt)
        elif action == "sample" and running and max(map(len, spoken.values())) < MAX_LEN:
            # each conversation gets an id, and those that differ from their slot's first part
            by_slot: dict[int, dict[int, list[str]]] = {}
            for name, slot in running.items():
                by_slot.setdefault(slot, {}).setdefault(data.draw(ids), []).append(name)
            if table.tokens - table.pinned < len(running):
                continue
            for slot, choices in by_slot.items():
                for number, (token, names) in enumerate(choices.items()):
                    place = slot if number == 0 else table.split(slot, names)
                    for name in names:
                        running[name] = place
                        spoken[name].append(token)
                    if number:
                        table.ids[place, table.cached[place]] = token
                table.ids[slot, table.cached[slot]] = next(iter(choices))
            slots = np.array(sorted(set(running.values())))
            positions = table.cached[slots]
            table.extend(slots)
            for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
                pool.write(slot, position)
        elif action == "finish" and running:
            name = data.draw(st.sampled_from(sorted(running)))
            table.finish(np.array([running.pop(name)]))
        elif action == "release":
            table.release([name for name in idle if data.draw(st.booleans())])
        elif action == "clear" and not running:
            table.clear()
        pool.check()
        for name, slot in running.items():
            cached = int(table.cached[slot])
            assert table.ids[slot, :cached].tolist() == spoken[name][:cached]


def test_a_conversation_must_fit_the_budget() -> None:
    assert tokens_for(1000, 500, 0.001, 4) == 1000
    assert tokens_for(1000, 10, 0.001, 4) == 160, "no more than all slots can hold"
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_gb=0\.001.*max_len"):
        tokens_for(1000, 2000, 0.001, 4)
