"""`env.name=program:agent.py`: a program is the environment, and no code is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import ConfigError, DataError, ScriptedPlayer, Task, check_env, load_env
from rayrl.environment.environment import Environment
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
import json
def length(output):
    return len(output.strip())
async def right(output, given):
    return float(output.strip() == str(given["seed"]))
def whole(output, row):
    return json.loads(output.removeprefix("1 ")) == row
def parts(output, row):
    return output == "3 --level {level} Q: {question}\\n".format(**row)
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


ECHO = "import sys; print(len(sys.argv), *sys.argv[1:], sys.stdin.read())"
ROWS = "question,answer,level\n2+3?,5,1\n6+1?,7,2\n4+4?,8,2\n"


def of_rows(folder: Path, **more: Any) -> Environment:
    (folder / "echo.py").write_text(ECHO)
    (folder / "sums.csv").write_text(ROWS)
    return load_env("program:echo.py").configure(
        {"score": "grade.py:whole", "rows": "sums.csv", **more}
    )


async def scored(env: Environment, task: Task) -> float:
    player = ScriptedPlayer(lambda messages, rng: "")
    episode = await rayrl.play_episode(env, task, {"agent": player}, id="e")
    assert episode.failure is None, episode.failure
    return episode.scores["agent"]["score"]


@pytest.mark.parametrize("isolated", [False, True])
async def test_rows_are_its_tasks(folder: Path, isolated: bool) -> None:
    """It is given a row as JSON, or what the templates make of it; both are scored by the row."""
    env = of_rows(folder)
    tasks = env.tasks(0, 3)
    assert {task.columns["question"] for task in tasks} == {"2+3?", "6+1?", "4+4?"}
    assert {task.place for task in tasks} == {"sums.csv:2", "sums.csv:3", "sums.csv:4"}
    templates = {"stdin": "Q: {question}", "arguments": ["--level", "{level}"]}
    for settings in ({"score": "grade.py:whole"}, {"score": "grade.py:parts", **templates}):
        env = env.configure(settings)
        if isolated:
            async with SubprocessEnv(env, slots=1) as played:
                found = [await scored(played, task) for task in tasks]
        else:
            found = [await scored(env, task) for task in tasks]
        assert found == [1.0, 1.0, 1.0]


def test_rows_are_held_out_or_their_own_file(folder: Path) -> None:
    env = of_rows(folder)
    trained, evaluated = env.training(0.34), env.evaluation(0.34)
    sides = [{task.place for task in one.tasks(0, 3)} for one in (trained, evaluated)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) == 3
    again = trained.configure({"timeout_s": 5.0})
    assert {task.place for task in again.tasks(0, 3)} == sides[0], "still the same part"

    (folder / "more.jsonl").write_text('{"question": "1+1?", "answer": "2", "level": 1}\n')
    env = env.configure({"eval_rows": "more.jsonl"})
    (task,) = env.evaluation(0.1).configure({"timeout_s": 5.0}).tasks(0, 1)
    assert task.place == "more.jsonl:1"
    with pytest.raises(ConfigError, match=r"env\.args\.rows: .* no such setting"):
        env.evaluation(0.1).configure({"rows": "sums.csv"})

    same = '{"question": "6+1?", "answer": "7", "level": 3}\n'
    (folder / "more.jsonl").write_text(same)
    env.training(0.1)  # another level: the program is given something else
    with pytest.raises(DataError, match=r"more\.jsonl:1 repeats sums\.csv:3"):
        env.configure({"stdin": "{question}"}).training(0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"stdin": "{qestion}"},
            r"sums\.csv:2: .* 'qestion', .* Did you mean 'question'\? env\.args\.stdin names it",
        ),
        (
            {"arguments": ["{levl}"]},
            r"no column 'levl'.* Did you mean 'level'\? env\.args\.arguments",
        ),
        ({"stdin": "{question"}, r"env\.args\.stdin='\{question'"),
        ({"rows": "sms.csv"}, r"sms\.csv: there is no such file\. Did you mean 'sums\.csv'\?"),
        ({"score": ""}, r"needs env\.args\.score"),
        ({"row": "sums.csv"}, r"env\.args\.row: .* no such setting\. Did you mean 'rows'\?"),
    ],
)
def test_what_does_not_fit_the_rows_is_named(
    folder: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        of_rows(folder, **settings).tasks(0, 1)


def test_without_rows_a_template_knows_seed_and_u(folder: Path) -> None:
    (folder / "echo.py").write_text(ECHO)
    (folder / "sums.csv").write_text(ROWS)
    env = load_env("program:echo.py").configure({"score": "grade.py:length"})
    cell = env.evaluation(0.1).configure({"rows": "sums.csv"})
    assert {task.place for task in cell.tasks(0, 3)} == {f"sums.csv:{k}" for k in (2, 3, 4)}
    (task,) = env.configure({"arguments": ["{seed}"]}).tasks(0, 1)
    assert set(task.columns) == {"seed", "u"}
    with pytest.raises(ConfigError, match=r"'question', only seed, u\..* Set env\.args\.rows"):
        env.configure({"stdin": "{question}"}).tasks(0, 1)
