"""What a bar keeps where there is little room."""

from __future__ import annotations

import io
import re

import pytest

from rayrl.run.progress_bar import ProgressBar

METRICS = {
    "reward": "0.553 ±0.41",
    "win": "0.61",
    "format": "1.00",
    "invalid": "-0.01",
    "entropy": "0.321",
    "grad": "1.25",
    "play": "12.4 s",
    "learn": "3.1 s",
}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def line(columns: int, monkeypatch: pytest.MonkeyPatch, title: str = "tictactoe-rl1") -> str:
    """The line of a terminal that wide, at step 60 of 1,000."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with ProgressBar(title, 1000, stream=stream) as bar:
        bar.update(60, METRICS)
    text = ESCAPE.sub("", stream.getvalue())
    return [part for part in re.split(r"[\r\n]", text) if part.strip()][-1]


@pytest.mark.parametrize("columns", [50, 60, 80, 100, 109, 110, 120, 160, 250])
@pytest.mark.parametrize("title", ["rl", "tictactoe-rl1", "a_very_long_name_of_a_run" * 3])
def test_step_and_time_are_always_there(
    columns: int, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = line(columns, monkeypatch, title)
    assert len(shown.rstrip()) <= columns
    assert "60/1000" in shown
    assert re.search(r"\d:\d\d:\d\d", shown)
    if columns >= 80:
        assert "reward 0.553 ±0.41" in shown


def test_a_narrow_terminal_omits_the_last_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [line(columns, monkeypatch) for columns in (80, 110, 250)]
    counts = [sum(f"{name} {value}" in one for name, value in METRICS.items()) for one in shown]
    for one, count in zip(shown, counts, strict=True):  # whole, and the first ones
        assert all(f"{n} {v}" in one for n, v in list(METRICS.items())[:count])
        assert "…" not in one
    assert counts[0] >= 1
    assert counts[2] == len(METRICS)
