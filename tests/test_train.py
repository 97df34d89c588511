from __future__ import annotations

from pathlib import Path

import pytest

from rayrl import train
from rayrl.config import from_dict
from rayrl.errors import ConfigError


def test_nobody_to_train_is_said_before_anything_starts(tmp_path: Path) -> None:
    data = {"name": "tictactoe", "seats": {"agent": "player:optimal"}}
    config = from_dict({"run": {"dir": str(tmp_path / "run")}, "env": data})
    with pytest.raises(ConfigError, match=r"no seat of 'tictactoe' .*set env\.seats\.agent=policy"):
        train.run(config)
    assert not (tmp_path / "run").exists()
