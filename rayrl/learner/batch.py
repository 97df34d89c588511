"""Turn groups into training rows: masks from the turns' spans, one denominator for a whole batch.

A row is one conversation of one seat in one episode, from its beginning (for a branch, that of the
conversation it branched from) up to its last id with loss: what follows that id (an environment's
last message, which nobody answered) predicts nothing. The loss on an id that several conversations
share is taken once. Rows whose advantages
are all zero change nothing and are left out of the computation, but still count in the
denominators, so that leaving them out is exact. Numpy only: batches travel between processes
without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrl.conversations import transcripts
from rayrl.learner.packing import common_prefixes, lexicographic
from rayrl.types import Group, Turn, derive_seed

__all__ = [
    "Batch",
    "Totals",
    "Trajectory",
    "batch_of",
    "count_groups",
    "make_batch",
    "micro_batches",
    "minibatches",
    "shard",
    "supervised_row",
]

GATHER_LIMIT = 8  # times max_tokens: bound on the (row, key) pairs attention gathers at once


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One training row of T ids. Rows made in this module end with an id that has loss.

    Attributes:
        ids: (T,) int32.
        loss_mask: (T,) bool, True where the loss is taken: the ids the policy sampled.
        rollout_logprobs: (T,) float32, recorded by the engine when it sampled; 0 where `loss_mask`
            is False.
        advantages: (T,) float32; 0 where `loss_mask` is False.
        version: the oldest weights any of its sampled ids came from.
        group: which group of the batch it belongs to.
        id: episode id and seat, for messages.
        proximal_logprobs: (T,) float32, of the policy before the step's first update; filled in by
            the learner where a step needs them.
        reference_logprobs: (T,) float32, of the reference policy; likewise.
        temperatures: (T,) float32, at which ids were sampled: NaN at the run's; None: all at that.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    rollout_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    version: int = 0
    group: int = 0
    id: str = ""
    proximal_logprobs: NDArray[np.float32] | None = None
    reference_logprobs: NDArray[np.float32] | None = None
    temperatures: NDArray[np.float32] | None = None

    @property
    def n_loss(self) -> int:
        """How many of its tokens the loss is taken on."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class Totals:
    """The denominators of a batch, over all ranks and micro-batches, dropped rows included."""

    tokens: float
    rows: float

    def share(self, n: int) -> Totals:
        """Denominators of one of `n` minibatches, so that each estimates the whole gradient."""
        return Totals(self.tokens / n, self.rows / n)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to compute on, the denominators of the *full* batch, and metrics about it."""

    rows: tuple[Trajectory, ...]
    totals: Totals
    stats: Mapping[str, float] = field(default_factory=dict)


def make_batch(
    groups: Sequence[Group],
    advantages: Sequence[Mapping[tuple[int, str], Sequence[float]] | Sequence[float]],
    *,
    keep_zero: bool = False,
) -> Batch:
    """Training rows of the groups' trainable seats.

    Args:
        groups: complete groups.
        advantages: for each group, as `learner.advantage.advantages` gives them, by (episode
            index, seat) one number per turn of that seat; or one number per episode, for all its
            trainable seats and turns.
        keep_zero: compute rows whose advantages are all zero too; needed when another term of the
            loss (KL to a reference) acts on them.

    Raises:
        ValueError: a group has a failed episode, there are more or fewer advantages, or a turn does
            not continue its conversation.
    """
    if len(advantages) != len(groups):
        raise ValueError(f"{len(groups)} groups, but advantages of {len(advantages)}")
    rows: list[Trajectory] = []
    zero_variance_groups = 0
    for g, (group, by_seat) in enumerate(zip(groups, advantages, strict=True)):
        if not group.complete:
            failed = next(e for e in group.episodes if e.failure is not None)
            raise ValueError(
                f"group {group.id!r}: episode {failed.id!r} has no reward; repair or drop the group"
            )
        if not isinstance(by_seat, Mapping):
            if len(by_seat) != len(group.episodes):
                raise ValueError(
                    f"group {group.id!r}: {len(group.episodes)} episodes, but advantages of "
                    f"{len(by_seat)}"
                )
            by_seat = {
                (episode.index, seat): (value,) * len(episode.turns_of(seat))
                for episode, value in zip(group.episodes, by_seat, strict=True)
                for seat in group.trainable
            }
        zero_variance_groups += not any(any(values) for values in by_seat.values())
        for episode in group.episodes:
            for seat in group.trainable:
                turns = episode.turns_of(seat)
                name = f"{episode.id}/{seat}"
                rows += _rows(turns, by_seat[episode.index, seat], g, name)
    totals = Totals(float(sum(row.n_loss for row in rows)), float(len(rows)))
    kept = tuple(row for row in rows if keep_zero or bool(row.advantages.any()))
    stats = {
        "groups": float(len(groups)),
        "zero_variance_groups": float(zero_variance_groups),
        "rows": float(len(rows)),
        "dropped_rows": float(len(rows) - len(kept)),
        "row_tokens": float(sum(len(row.ids) for row in rows)),
        "loss_tokens": totals.tokens,
        "distinct_loss_tokens": float(_distinct_loss_tokens(_sorted(rows))),
    }
    return Batch(kept, totals, stats)


def _rows(
    turns: Sequence[Turn], advantages: Sequence[float], group: int, name: str
) -> list[Trajectory]:
    """A seat's conversations; what several share has its loss in the first of them only."""
    if len(turns) != len(advantages):
        raise ValueError(f"{name}: {len(turns)} turns but {len(advantages)} advantages")
    rows: list[Trajectory] = []
    left = set(range(len(turns)))  # whose loss is in no row yet
    for transcript in transcripts(turns):
        with_ids = [k for k in transcript if turns[k].prompt_ids or turns[k].completion_ids]
        conversation = [(turns[k], advantages[k], k in left) for k in with_ids]
        rows += _row(conversation, group, name)
        left.difference_update(transcript)
    return rows


def _row(
    conversation: Sequence[tuple[Turn, float, bool]], group: int, name: str
) -> list[Trajectory]:
    """The row of turns with their advantages and whether the loss is taken on them, if any is."""
    length = sum(len(t.prompt_ids) + len(t.completion_ids) for t, _, _ in conversation)
    ids = np.zeros(length, np.int32)
    mask = np.zeros(length, np.bool_)
    rollout = np.zeros(length, np.float32)
    adv = np.zeros(length, np.float32)
    temperatures = np.full(length, np.nan, np.float32)
    versions: list[int] = []
    at = 0
    for turn, advantage, with_loss in conversation:
        if turn.offset != at:
            raise ValueError(
                f"{name}: a turn at offset {turn.offset} follows {at} ids of its conversation"
            )
        if len(turn.rollout_logprobs) != len(turn.completion_ids):
            raise ValueError(
                f"{name}: {len(turn.completion_ids)} sampled ids, "
                f"{len(turn.rollout_logprobs)} rollout logprobs"
            )
        begin = at + len(turn.prompt_ids)
        end = begin + len(turn.completion_ids)
        ids[at:begin] = turn.prompt_ids
        ids[begin:end] = turn.completion_ids
        if with_loss and turn.temperature != 0:  # greedily there is no other reply
            mask[begin:end] = True
            rollout[begin:end] = turn.rollout_logprobs
            adv[begin:end] = advantage
            if turn.temperature is not None:
                temperatures[begin:end] = turn.temperature
            versions += [span.version for span in turn.versions]
        at = end
    if not mask.any():
        return []
    if mask[0]:
        raise ValueError(f"{name}: a conversation cannot begin with a sampled id")
    end = _end(mask)
    row = Trajectory(
        ids[:end], mask[:end], rollout[:end], adv[:end], min(versions, default=0), group, name
    )
    usual = np.isnan(temperatures).all()
    return [row if usual else replace(row, temperatures=temperatures[:end])]


def _end(mask: NDArray[np.bool_]) -> int:
    """Where a row with this loss mask ends: after its last id with loss."""
    return int(np.flatnonzero(mask)[-1]) + 1


def supervised_row(ids: Sequence[int], loss_mask: Sequence[bool], name: str = "") -> Trajectory:
    """A row for supervised learning, up to its last id with loss; without any, it is left whole.

    A loss at position 0 is taken out: nothing predicts it.
    """
    mask = np.array(loss_mask, np.bool_)
    mask[:1] = False
    mask = mask[: _end(mask)] if mask.any() else mask
    zeros = np.zeros(len(mask), np.float32)
    whole = np.array(ids, np.int32)
    return Trajectory(whole[: len(mask)], mask, zeros, mask.astype(np.float32), id=name)


def batch_of(rows: Sequence[Trajectory]) -> Batch:
    """A batch of exactly these rows."""
    return Batch(tuple(rows), Totals(float(sum(r.n_loss for r in rows)), float(len(rows))))


def _sorted(rows: Sequence[Trajectory]) -> list[Trajectory]:
    return [rows[i] for i in lexicographic([row.ids for row in rows])]


def _distinct(rows: Sequence[Trajectory]) -> NDArray[Any]:
    """(B,) tokens each of the sorted rows adds to the trie."""
    lengths = np.fromiter((len(row.ids) for row in rows), np.int64, len(rows))
    return lengths - common_prefixes([row.ids for row in rows])


def _distinct_loss_tokens(rows: Sequence[Trajectory]) -> int:
    """Loss tokens of the sorted rows, those with the same ids up to and including them once."""
    count = 0
    seen = np.zeros(0, np.bool_)  # whether the ids of the row above were counted
    for row, shared in zip(rows, common_prefixes([row.ids for row in rows]), strict=True):
        before = np.append(seen[:shared], np.zeros(len(row.ids) - shared, np.bool_))
        count += int((row.loss_mask & ~before).sum())
        seen = row.loss_mask | before
    return count


def shard(batch: Batch, rank: int, world: int, parts: int = 1, seed: int = 0) -> Batch:
    """The part of `batch` that `rank` of `world` computes; its totals stay the whole batch's.

    The rows of each of its `parts` in the first epoch (see `minibatches`) are cut in lexicographic
    order into contiguous runs of near-equal distinct tokens: siblings stay together, only the
    siblings at a cut are computed on two ranks, and no rank waits long for another. A rank may get
    no rows. Deterministic.
    """
    mine: list[Trajectory] = []
    for one in minibatches(batch.rows, parts, seed):
        rows = _sorted(one)
        if rows:
            cost = np.cumsum(_distinct(rows))
            middle = cost - _distinct(rows) / 2
            part = np.minimum(middle * world // cost[-1], world - 1)
            mine += [row for row, p in zip(rows, part, strict=True) if p == rank]
    return Batch(tuple(mine), batch.totals, batch.stats)


def micro_batches(
    rows: Sequence[Trajectory], max_tokens: int, *, shared: bool = True
) -> list[list[Trajectory]]:
    """Rows in runs of at most `max_tokens` *distinct* tokens each (padding and copies are free).

    A row longer than `max_tokens` forms a run alone. Also bounds the keys attention gathers (rows
    times length) to `GATHER_LIMIT` times `max_tokens`.

    Args:
        shared: false where rows are computed whole and padded; then all that counts.
    """
    rows = _sorted(rows)
    if not rows:
        return []
    if not shared:
        return _padded_runs(rows, max_tokens)
    out: list[list[Trajectory]] = []
    distinct = gathered = max_tokens * GATHER_LIMIT + 1
    for row, added in zip(rows, _distinct(rows).tolist(), strict=True):
        length = len(row.ids)
        if distinct + added > max_tokens or gathered + length > GATHER_LIMIT * max_tokens:
            out.append([])
            distinct, gathered, added = 0, 0, length
        out[-1].append(row)
        distinct += added
        gathered += length
    return out


def _padded_runs(rows: Sequence[Trajectory], max_tokens: int) -> list[list[Trajectory]]:
    out: list[list[Trajectory]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):  # the longest of a run comes last
        if not out or (len(out[-1]) + 1) * len(row.ids) > max_tokens:
            out.append([])
        out[-1].append(row)
    return out


def minibatches(
    rows: Sequence[Trajectory], n: int, seed: int, epoch: int = 0, groups: int | None = None
) -> list[list[Trajectory]]:
    """`n` parts of whole groups, as many in each, dealt at random.

    Parts may be empty (fewer groups than parts): every rank still makes `n` optimizer steps.

    Args:
        seed: that of the run. Another epoch deals anew.
        groups: `count_groups` of the whole batch, where `rows` are one rank's of it: a group is in
            the same part on every rank.
    """
    if n == 1:
        return [list(rows)]
    if groups is None:
        groups = count_groups(rows)
    rng = np.random.default_rng(derive_seed(seed, "minibatches", epoch))
    dealt = rng.permutation(groups) % n
    return [[row for row in rows if dealt[row.group] == part] for part in range(n)]


def count_groups(rows: Sequence[Trajectory]) -> int:
    """How many groups a batch has that ends with the last one of `rows`."""
    return max((row.group for row in rows), default=-1) + 1
