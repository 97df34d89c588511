"""A data file to a trained model, as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import episodes, train, weights

pytestmark = pytest.mark.slow

ROWS = 14  # two of them are held out


def test_a_run_on_rows_goes_through_an_epoch_across_a_stop(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    lines = [json.dumps({"question": f"{k} + 1?", "answer": k + 1}) for k in range(ROWS)]
    data.write_text("\n".join(lines))
    more = [
        f"env.name={data}",
        "env.args.prompt=question",
        "env.args.reward=number",
        "env.held_out=0.15",
        "sampling.max_tokens=8",
        "train.groups=3",
    ]
    train(tiny, tmp_path / "run", *more, "train.steps=2")
    before = weights(tmp_path / "run")
    train(tiny, tmp_path / "run", *more, "train.steps=4")
    assert weights(tmp_path / "run") != before
    played = episodes(tmp_path / "run")
    assert len(played) == 4
    places = [{row["task"]["place"] for row in rows} for rows in played.values()]
    assert [len(one) for one in places] == [3] * 4
    assert len(set.union(*places)) == ROWS - 2
    assert {key for row in played.popitem()[1] for key in row["scores"]["agent"]} == {"number"}
