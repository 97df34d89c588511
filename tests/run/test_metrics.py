"""What a step says on the screen."""

from __future__ import annotations

from rayrl.run.metrics import headline

METRICS = {
    "reward": -0.0004,
    "reward_std": 0.25,
    "score/win": 0.75,
    "score/invalid": -0.0006,
    "score/talk": -0.5,
    "entropy": 0.1234,
    "grad_norm": 1.5,
    "time/collect": 2.04,
    "time/update": 1.96,
}


def test_the_headline_rounds_and_has_no_negative_zero() -> None:
    assert headline(METRICS) == {
        "reward": "0.000 ±0.25",
        "win": "0.75",
        "invalid": "0.00",
        "talk": "-0.50",
        "entropy": "0.123",
        "grad": "1.50",
        "play": "2.0 s",
        "learn": "2.0 s",
    }


def test_the_headline_shows_a_dash_for_what_was_not_measured() -> None:
    known = {k: v for k, v in METRICS.items() if k not in ("entropy", "grad_norm")}
    assert (headline(known)["entropy"], headline(known)["grad"]) == ("–", "–")
