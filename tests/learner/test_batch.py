"""Rows from episodes, their division, and the trie: masks, denominators, sharing."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.learner.batch import (
    Trajectory,
    batch_of,
    make_batch,
    micro_batches,
    minibatches,
    shard,
    supervised_row,
)
from rayrl.learner.packing import buckets, common_prefixes, lexicographic, pack
from rayrl.types import Episode, Failure, Group, Origin, Task, Turn, VersionSpan


def turn(prompt, completion, offset, seat="agent", version=0):
    return Turn(
        seat=seat,
        prompt=(),
        text="",
        finish="stop",
        offset=offset,
        prompt_ids=tuple(prompt),
        completion_ids=tuple(completion),
        rollout_logprobs=tuple(-0.5 - i for i in range(len(completion))),
        versions=(VersionSpan(version, 0, len(completion)),),
    )


def episode(i, turns, **rewards):
    return Episode(f"g/{i}", "t", Task(), i, tuple(turns), rewards=rewards or {"agent": 0.0})


def two_turns(i, first=(5,), version=0):
    turns = [turn([1, 2], first, 0, version=version), turn([3], [6, 7], 2 + len(first), version=4)]
    return episode(i, turns)


def test_a_row_is_the_turns_own_spans():
    group = Group("g", Task(), (two_turns(0, version=3),))
    batch = make_batch([group], [{(0, "agent"): (0.5, -1.0)}])
    (row,) = batch.rows
    assert row.ids.tolist() == [1, 2, 5, 3, 6, 7]
    assert row.loss_mask.tolist() == [False, False, True, False, True, True]
    assert row.rollout_logprobs.tolist() == [0, 0, -0.5, 0, -0.5, -1.5]
    assert row.advantages.tolist() == [0, 0, 0.5, 0, -1, -1]
    assert (row.version, row.group, row.id) == (3, 0, "g/0/agent")
    assert (batch.totals.tokens, batch.totals.rows) == (3, 1)


def test_zero_rows_cost_nothing_but_count():
    group = Group("g", Task(), (two_turns(0), two_turns(1, (5, 5)), two_turns(2)))
    values = {(0, "agent"): (0.0, 0.0), (1, "agent"): (0.0, 2.0), (2, "agent"): (0.0, 0.0)}
    batch = make_batch([group, group], [values, dict.fromkeys(values, (0.0, 0.0))])
    assert [row.id for row in batch.rows] == ["g/1/agent"]
    assert (batch.totals.tokens, batch.totals.rows) == (2 * (3 + 4 + 3), 6)
    assert batch.stats["zero_variance_groups"] == 1
    assert batch.stats["dropped_rows"] == 5
    assert batch.stats["distinct_loss_tokens"] == 6  # 5, 6 7 after it; 5 again, 6 7 after that
    kept = make_batch([group], [values], keep_zero=True)
    assert len(kept.rows) == 3


def test_what_was_sampled_greedily_is_not_trained_on_and_other_temperatures_are_kept():
    turns = [turn([1], [2, 3], 0), turn([4], [5], 3), turn([6], [7, 8], 5)]
    own = [replace(turns[0], temperature=0.5), replace(turns[1], temperature=0.0), turns[2]]
    (row,) = make_batch([Group("g", Task(), (episode(0, own),))], [[1.0]]).rows
    assert row.loss_mask.tolist() == [False, True, True, False, False, False, True, True]
    assert row.temperatures is not None
    assert np.array_equal(row.temperatures[row.loss_mask], [0.5, 0.5, np.nan, np.nan], True)
    greedy = [replace(one, temperature=0.0) for one in turns]
    assert not make_batch([Group("g", Task(), (episode(0, greedy),))], [[1.0]]).rows
    (row,) = make_batch([Group("g", Task(), (episode(0, turns),))], [[1.0]]).rows
    assert row.temperatures is None


def test_loss_tokens_with_the_same_ids_before_them_are_counted_once():
    rng = random.Random(0)
    for _ in range(200):
        episodes = [
            two_turns(i, rng.choices([5, 6], k=rng.randint(1, 4))) for i in range(rng.randint(1, 6))
        ]
        group = Group("g", Task(), tuple(episodes))
        batch = make_batch([group], [[0.0] * len(episodes)], keep_zero=True)
        losses = [
            tuple(row.ids[: t + 1].tolist())
            for row in batch.rows
            for t in row.loss_mask.nonzero()[0]
        ]
        assert batch.stats["loss_tokens"] == len(losses)
        assert batch.stats["distinct_loss_tokens"] == len(set(losses))


def test_conversations_and_seats_are_separate_rows_and_scripts_none():
    turns = [
        turn([1], [2], 0, "x"),
        Turn("o", (), "scripted", "stop"),
        turn([9], [3], 0, "y"),
        turn([4], [5], 2, "x"),
        replace(turn([1, 1], [8], 0, "x"), conversation="/1", origin=Origin("", 2, empty=True)),
    ]
    group = Group("g", Task(), (episode(0, turns, x=1.0, y=0.0),), trainable=("x", "y"))
    values = {(0, "x"): (1.0, 2.0, 3.0), (0, "y"): (4.0,)}
    rows = make_batch([group], [values]).rows
    assert [row.ids.tolist() for row in rows] == [[1, 2, 4, 5], [1, 1, 8], [9, 3]]
    assert [row.advantages.max() for row in rows] == [2, 3, 4]
    only_x = Group("g", Task(), group.episodes, trainable=("x",))
    assert len(make_batch([only_x], [values]).rows) == 2


def test_what_cannot_be_trained_on_is_refused():
    failed = Episode("g/1", "t", Task(), 1, (), failure=Failure("infra", "gone"))
    with pytest.raises(ValueError, match=r"'g/1' has no reward"):
        make_batch([Group("g", Task(), (two_turns(0), failed))], [{}])
    pair = Group("g", Task(), (two_turns(0), two_turns(1)))
    with pytest.raises(ValueError, match=r"'g': 2 episodes, but advantages of 1"):
        make_batch([pair], [[1.0]])
    with pytest.raises(ValueError, match=r"2 groups, but advantages of 1"):
        make_batch([pair, pair], [[1.0, 0.0]])
    gap = episode(0, [turn([1], [2], 0), turn([3], [4], 5)])
    with pytest.raises(ValueError, match="offset 5 follows 2"):
        make_batch([Group("g", Task(), (gap,))], [{(0, "agent"): (1.0, 1.0)}])
    headless = episode(0, [turn([], [2], 0)])
    with pytest.raises(ValueError, match="cannot begin"):
        make_batch([Group("g", Task(), (headless,))], [{(0, "agent"): (1.0,)}])


def test_supervised_rows_never_predict_the_first_id():
    row = supervised_row([4, 5, 6], [True, False, True])
    assert row.loss_mask.tolist() == [False, False, True]
    assert batch_of([row, row]).totals.tokens == 2


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 30))
def test_a_supervised_row_ends_at_its_last_id_with_loss(mask: list[bool], after: int) -> None:
    row = supervised_row(range(len(mask) + after), mask + [False] * after)
    learned = [i for i, loss in enumerate(mask) if loss and i > 0]
    assert np.flatnonzero(row.loss_mask).tolist() == learned
    length = learned[-1] + 1 if learned else len(mask) + after
    assert row.ids.tolist() == list(range(length))
    assert len(row.loss_mask) == len(row.rollout_logprobs) == len(row.advantages) == length


def test_ids_that_no_reply_follows_are_not_computed():
    asked = turn([1, 2], [5], 0), turn([3], [6, 7], 3)
    unanswered = (*asked, turn([8] * 3000, [], 6))
    groups = [Group("g", Task(), (episode(0, turns),)) for turns in (asked, unanswered)]
    values = [{(0, "agent"): (1.0,) * len(group.episodes[0].turns)} for group in groups]
    plain, cut = (make_batch([g], [v]) for g, v in zip(groups, values, strict=True))
    assert cut.stats == plain.stats
    assert cut.totals == plain.totals
    for field in ("ids", "loss_mask", "rollout_logprobs", "advantages"):
        assert np.array_equal(getattr(cut.rows[0], field), getattr(plain.rows[0], field))
    assert distinct(cut.rows) == 6


# The trie.


def row(ids, loss=None, group=0):
    mask = np.zeros(len(ids), bool)
    mask[-1 if loss is None else loss :] = True
    zero = np.zeros(len(ids), np.float32)
    return Trajectory(np.array(ids, np.int32), mask, zero, zero + mask, group=group)


def random_rows(seed, n=40):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        ids = np.concatenate([[1, 2], rng.integers(0, 3, rng.integers(1, 12))])
        rows.append(row(ids.tolist(), loss=2))
    return [*rows, rows[0], row(rows[3].ids[:-1].tolist())]


def test_trie_by_hand():
    rows = [[1, 2, 3], [1, 2], [1, 4, 3], [1, 2, 3, 5]]
    masks = [np.array([False] * (len(r) - 1) + [True]) for r in rows]
    packed = pack([np.array(r) for r in rows], masks)
    assert packed.order.tolist() == [1, 0, 3, 2]  # lexicographic
    assert packed.ids.tolist() == [1, 2, 3, 5, 4, 3]
    assert packed.positions.tolist() == [0, 1, 2, 3, 1, 2]
    assert packed.starts.tolist() == [0, 2, 3, 1]
    assert packed.path.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3], [0, 4, 5, 0]]
    # Targets 2, 3, 5, 3 are predicted from ids 1, 2, 3, 4.
    assert packed.target.tolist() == [2, 3, 5, 3]
    assert packed.sources[packed.slot].tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("seed", range(5))
def test_trie_holds_each_prefix_once_and_every_row(seed):
    rows = random_rows(seed)
    packed = pack([r.ids for r in rows], [r.loss_mask for r in rows])
    prefixes = {tuple(r.ids[: t + 1].tolist()) for r in rows for t in range(len(r.ids))}
    assert len(packed.ids) == len(prefixes)
    for b, i in enumerate(packed.order):
        n = packed.lengths[b]
        path = packed.path[b, :n]
        # on the path to its last token are the tokens in whose subtree that is
        upto = np.arange(path[-1] + 1)
        assert upto[packed.ends[upto] > path[-1]].tolist() == path.tolist()
        assert packed.ids[path].tolist() == rows[i].ids.tolist()
        assert packed.positions[path].tolist() == list(range(n))
        mine = packed.row == b
        assert packed.target[mine].tolist() == rows[i].ids[rows[i].loss_mask].tolist()
        before = path[packed.position[mine] - 1]
        assert packed.sources[packed.slot[mine]].tolist() == before.tolist()
    owned = np.concatenate([bucket.owned for bucket in buckets(packed)])
    assert sorted(owned.tolist()) == list(range(len(packed.ids)))
    for bucket in buckets(packed):  # every query sees exactly its own prefix
        for q, k, start in zip(bucket.queries, bucket.keys, bucket.starts, strict=True):
            for j, u in enumerate(q[: np.argmax(q) + 1]):
                assert packed.positions[k[: start + j + 1]].tolist() == list(range(start + j + 1))
                assert k[start + j] == u


def test_pack_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="at least one row"):
        pack([], [])
    with pytest.raises(ValueError, match="position 0"):
        pack([np.array([1])], [np.array([True])])


def distinct(rows):
    return len(pack([r.ids for r in rows], [r.loss_mask for r in rows]).ids) if rows else 0


def same(a, b):
    return sorted(map(id, a)) == sorted(map(id, b))


def test_shards_are_a_balanced_partition():
    rows = random_rows(0, 200)
    batch = batch_of(rows)
    for world in (1, 2, 3):
        parts = [shard(batch, rank, world) for rank in range(world)]
        assert same([r for part in parts for r in part.rows], rows)
        assert all(part.totals == batch.totals for part in parts)
        sizes = [distinct(part.rows) for part in parts]
        assert max(sizes) <= distinct(rows) / world + 2 * 14
        again = [shard(batch, rank, world) for rank in range(world)]
        assert all(x.rows == y.rows for x, y in zip(parts, again, strict=True))
    few = [shard(batch_of(rows[:1]), rank, 3) for rank in range(3)]
    assert sum(len(part.rows) for part in few) == 1  # some ranks have nothing to do
    assert shard(batch_of([]), 0, 2).rows == ()


def test_every_minibatch_is_shared_out_among_the_ranks():
    rng = np.random.default_rng(3)
    rows = [
        row([1, 2, g, *rng.integers(0, 9, int(rng.integers(3, 12)))], group=g)
        for g in range(12)
        for _ in range(8)
    ]
    whole = minibatches(rows, 4, seed=7)
    for world in (2, 3, 8):  # more ranks than a minibatch has groups, too
        shards = [shard(batch_of(rows), rank, world, 4, seed=7).rows for rank in range(world)]
        assert same([r for mine in shards for r in mine], rows)
        for mine in shards:  # a rank need not hold the last group to know where its groups belong
            assert same(mine, [r for part in minibatches(mine, 4, 7, groups=12) for r in part])
        for k, part in enumerate(whole):
            on_ranks = [minibatches(mine, 4, seed=7, groups=12)[k] for mine in shards]
            assert same([r for mine in on_ranks for r in mine], part)
            sizes = [distinct(mine) for mine in on_ranks]
            assert max(sizes) <= distinct(part) / world + 2 * 14


def test_micro_batches_count_distinct_tokens():
    rows = random_rows(1, 100)
    micros = micro_batches(rows, 60)
    assert same([r for micro in micros for r in micro], rows)
    assert all(distinct(micro) <= 60 for micro in micros)
    copies = [row([1, 2, 3, 4])] * 30
    assert len(micro_batches(copies, 20)) == 1  # copies are free
    assert len(micro_batches([row(range(1, 50)), row([1, 5])], 10)) == 2  # too long: alone
    assert micro_batches([], 10) == []


def test_minibatches_keep_groups_whole():
    rows = [row([1, 2, g, i], group=g) for g in range(7) for i in range(4)]
    parts = minibatches(rows, 3, seed=5)
    assert same([r for part in parts for r in part], rows)
    groups = [{r.group for r in part} for part in parts]
    assert sorted(map(len, groups)) == [2, 2, 3]
    assert set().union(*groups) == {*range(7)}
    assert minibatches(rows, 3, seed=5) == parts
    assert any(minibatches(rows, 3, seed=s) != parts for s in range(6))
    assert any(minibatches(rows, 3, seed=5, epoch=e) != parts for e in range(1, 6))
    assert sorted(map(len, minibatches(rows[:1], 2, seed=0))) == [0, 1]


def test_sorting_and_prefixes():
    rows = [np.array(r) for r in ([2], [1, 300], [1, 2, 3], [1, 2], [1, 2])]
    order = lexicographic(rows)
    assert order == [3, 4, 2, 1, 0]
    assert common_prefixes([rows[i] for i in order]).tolist() == [0, 2, 2, 1, 0]
