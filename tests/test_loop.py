from __future__ import annotations

from pathlib import Path

import pytest

from rayrl import loop
from rayrl.config import from_dict
from rayrl.errors import ConfigError
from rayrl.run.folder import RunDir


def test_a_finished_run_says_where_its_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"name": "copyword"}
    config = from_dict({"run": {"dir": str(tmp_path)}, "env": data, "train": {"steps": 2}})
    with RunDir(tmp_path, config) as folder:
        folder.finish({"steps": 2, "model": "model"})
    loop.run(config)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path}: already finished")
    assert said[1] == f"Model in {tmp_path / 'model'}"


def test_nobody_to_train_is_said_before_anything_starts(tmp_path: Path) -> None:
    data = {"name": "tictactoe", "seats": {"agent": "player:optimal"}}
    config = from_dict({"run": {"dir": str(tmp_path / "run")}, "env": data})
    with pytest.raises(ConfigError, match=r"no seat of 'tictactoe' .*set env\.seats\.agent=policy"):
        loop.run(config)
    assert not (tmp_path / "run").exists()
