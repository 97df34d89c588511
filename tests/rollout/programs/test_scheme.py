"""`env.name=program:agent.py`: a program is the environment, and no code is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import rayrl
from rayrl import ConfigError, ScriptedPlayer, check_env, load_env
from rayrl.rollout.subprocess_env import SubprocessEnv

PROGRAM = """
import json, os, sys, urllib.request
task = json.load(sys.stdin)
body = {"model": "policy", "messages": [{"role": "user", "content": str(task["seed"])}]}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps(body).encode(), {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(json.load(opener.open(request))["choices"][0]["message"]["content"])
sys.exit(3)
"""
GRADES = """
def length(output):
    return len(output.strip())
async def right(output, given):
    return float(output.strip() == str(given["seed"]))
def no_number(output):
    return "much"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.py").write_text(PROGRAM)
    (tmp_path / "grade.py").write_text(GRADES)
    script = tmp_path / "run.sh"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} agent.py\n")
    script.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", ["agent.py", "./run.sh"])
async def test_it_is_run_and_scored(folder: Path, name: str, isolated: bool) -> None:
    env = load_env(f"program:{name}").configure({"score": "grade.py:right"})
    (task,) = env.tasks(5, 1)
    player = ScriptedPlayer(lambda messages, rng: messages[-1].content)
    if isolated:
        async with SubprocessEnv(env, slots=1) as env:
            episode = await rayrl.play_episode(env, task, {"agent": player}, id="e")
    else:
        episode = await rayrl.play_episode(env, task, {"agent": player}, id="e")
    assert episode.failure is None, episode.failure
    assert episode.scores == {"agent": {"score": 1.0, "failed": 1.0}}
    (turn,) = episode.turns
    assert turn.text == str(task.seed)


def test_its_check_and_its_settings(folder: Path) -> None:
    env = load_env("program:agent.py")
    assert check_env(env, {"score": "grade.py:length"}) == []
    (problem,) = check_env(env, {"score": "grade.py:lenth"})
    assert "has no function 'lenth'. Did you mean 'length'?" in problem
    (problem,) = check_env(env, {"score": "grade.py:no_number"})
    assert "env.args.score=grade.py:no_number: returned 'much', no number" in problem
    (problem,) = check_env(env, {})
    assert "needs env.args.score" in problem
    with pytest.raises(ConfigError, match=r"env.name=program:agnt.py: there is no file"):
        load_env("program:agnt.py")
