from __future__ import annotations

from pathlib import Path

import pytest

from rayrl.commands import env_check
from rayrl.config import from_dict
from rayrl.errors import EnvError

# Goes wrong on tasks that rayrl.check_env does not draw: it plays the first 8 of seed 0.
RARE = """
import asyncio
import rayrl
from rayrl import Task
from rayrl.types import derive_seed

checked = {derive_seed(0, "task", k) for k in range(8)}

@rayrl.env(tasks=lambda seed, u: Task(seed=seed), rewards={"win": 1.0})
async def rare(task, agent):
    await agent("?")
    if task.seed not in checked:
        HOW
    return {"win": 1.0}

@rare.player("yes")
def yes(messages, rng):
    return "yes"
"""


@pytest.mark.parametrize("seed", [0, 1])  # of seed 0 half of the tasks are fine, of seed 1 none
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise KeyError('board')", "KeyError: 'board'"),
        ("await asyncio.Event().wait()", "did not end within 0.05 s"),
    ],
)
def test_an_episode_that_fails_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: int,
    how: str,
    said: str,
) -> None:
    (tmp_path / "rare.py").write_text(RARE.replace("HOW", how))
    monkeypatch.setattr(env_check, "DEADLINE_S", 0.05)
    config = from_dict({"run": {"seed": seed}, "env": {"name": str(tmp_path / "rare.py")}})
    with pytest.raises(EnvError, match=rf"not ready to train on:\n  - with player 'yes': .*{said}"):
        env_check.run(config)
    out = capsys.readouterr().out
    shown = {
        0: "player yes: reward 1.00 (1.00 to 1.00), 1.0 turns, 8 of 16 episodes failed",
        1: "player yes: 16 of 16 episodes failed",
    }
    assert shown[seed] in out
    assert "ready to train on" not in out


def test_a_deadline_of_training_does_not_slow_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(env_check, "check_env", lambda *args, **more: given.append(more) or [])
    env_check.run(from_dict({"env": {"name": "copyword", "deadline_s": 120.0}}))
    assert given == [{}]
