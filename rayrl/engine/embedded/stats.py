"""What an embedded engine has done since it started."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Stats"]


@dataclass(slots=True)
class Stats:
    """Totals; seconds are of the step thread."""

    prompt_tokens: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    completions: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    load_seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """The totals and what follows from them."""
        return {
            **asdict(self),
            "reused_tokens": self.prompt_tokens - self.computed_tokens,
            "busy_seconds": self.prefill_seconds + self.decode_seconds + self.load_seconds,
        }
