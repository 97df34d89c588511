import io
from pathlib import Path

import pytest
from rich.console import Console

from rayrl.errors import DataError
from rayrl.report.statistics import Share, Split
from rayrl.report.table import Cell, Column, Result, columns, entry, markdown, rich_table

BASE = Result(
    "base",
    {"random": Cell({"p": 1}, 10, 1, {"w/l": Split({"w": 6, "l": 4}, 10)})},
    settings={"s": 1},
)
RL = Result(
    "rl|1",
    {
        "random": Cell({"p": 1}, 8, 0, {"w/l": Split({"w": 8, "l": 0}, 8), "bad": Share(0, 8)}),
        "optimal": Cell({}, 8, 0, {"bad": Share(2, 8)}),
    },
    {"unbeatable": {"losing lines": 0, "all lines": 12345}},
)


def test_columns_are_the_union_in_order() -> None:
    assert columns([BASE, RL]) == [
        Column("random", "w/l"),
        Column("random", "bad"),
        Column("optimal", "bad"),
        Column("unbeatable", "losing lines", True),
        Column("unbeatable", "all lines", True),
    ]


def test_entries() -> None:
    assert entry(BASE, Column("optimal", "bad")) == ("–", "")
    assert entry(RL, Column("optimal", "bad")) == ("25", "7.1–59.1")
    assert entry(RL, Column("unbeatable", "all lines", True)) == ("12,345", "")
    assert entry(BASE, Column("unbeatable", "all lines", True)) == ("–", "")


def test_saved_and_loaded(tmp_path: Path) -> None:
    for result in (BASE, RL):
        result.save(tmp_path / "eval.json")
        assert Result.load(tmp_path / "eval.json") == result


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "eval.json:1: not JSON"),
        ("{}", "eval.json: not an evaluation"),
        ("3", "eval.json: not"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "eval.json"
    path.write_text(text)
    with pytest.raises(DataError, match=complaint):
        Result.load(path)
    with pytest.raises(DataError, match=r"no such file; `rayrl eval` writes it"):
        Result.load(tmp_path / "none.json")


def test_markdown() -> None:
    lines = markdown([BASE, RL]).splitlines()
    assert lines[0].startswith("|  | random: w/l | random: bad | optimal: bad |")
    assert lines[2].startswith("| base | 60/40 (31.3–83.2 · 16.8–68.7) | – | – |")
    assert lines[3].startswith("| rl\\|1 | 100/0")
    assert "- random: p=1; 8 to 10 episodes per row; 1 failed and are not counted." in lines
    assert "- optimal: default settings; 8 episodes per row." in lines


def test_repeated_tasks_are_said() -> None:
    """In the Markdown, the terminal and the file; where nothing was repeated, nothing is said."""
    again = Result("base", {"tasks": Cell({}, 400, 0, {"w": Share(9, 400, 99.0)}, tasks=100)})
    line = "base, tasks: 400 episodes of 100 tasks; intervals allow for tasks that were played "
    assert line + "several times." in " ".join(markdown([again]).splitlines()[-2].split())
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(rich_table([again]))
    assert line in console.export_text()
    assert Result.from_dict(again.to_dict()) == again
    assert "several times" not in markdown([BASE, RL])
    one = Result("base", {"tasks": Cell({}, 1, 0, {"w": Share(1, 1)})})
    assert "| base | 100 |" in markdown([one])


@pytest.mark.parametrize("width", [40, 80, 100, 300])
def test_nothing_is_cut_off_at_the_terminals_width(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    statistics = {f"{'x' * k}_score": Share(k, 9, 100.0) for k in range(1, 9)}
    result = Result("after a while", {"tasks": Cell({}, 9, 0, statistics)})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table([result]))
    shown = console.export_text()
    assert "…" not in shown
    assert all(name in shown for name in statistics)
    assert (shown.count("after a while") == 1) == (width == 300)


def test_the_terminal_table_shows_all_rows() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(rich_table([BASE, RL]))
    shown = console.export_text()
    assert "60/40" in shown
    assert "12,345" in shown
