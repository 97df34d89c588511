"""Which rows of a dataset are kept for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["HELD_OUT", "part"]

HELD_OUT = 0.1


def part(rows: int, share: float, evaluates: bool) -> Sequence[int]:
    """Numbers of the rows that are held out, spread evenly, or of the others."""
    if rows < 2 or not share:
        return range(rows)
    n = min(max(round(share * rows), 1), rows - 1)
    ours = {(2 * k + 1) * rows // (2 * n) for k in range(n)}
    return [k for k in range(rows) if (k in ours) == evaluates]
