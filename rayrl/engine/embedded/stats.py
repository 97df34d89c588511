"""Counters of the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(slots=True)
class Stats:
    """Totals since the engine started; seconds are those of the step thread."""

    prompt_tokens: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    completions: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    load_seconds: float = 0.0
