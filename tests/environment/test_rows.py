from __future__ import annotations

import json
import pickle
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rayrl
from rayrl import Agent, Environment, Message, Row, Scores, ScriptedPlayer, Task, check_env
from rayrl.cluster.open import _played, make_environment
from rayrl.config import from_dict
from rayrl.environment.registry import environment_of, load_env, reference_of
from rayrl.environment.rows import Rows
from rayrl.errors import ConfigError, DataError
from rayrl.rollout.rollout import play_episode
from rayrl.run.stage import evaluation_plans
from rayrl.run.training import _check_rows, _rows_of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_text(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return write_text(name, "".join(f"{json.dumps(row)}\n" for row in rows))


def sums(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"{k} + 1?", "answer": k + 1} for k in range(start, start + n)]


def numbers(tasks: Sequence[Task]) -> list[int]:
    return [task.seed for task in tasks]


@dataclass(frozen=True, kw_only=True)
class Question(Task):
    question: str


PARTS = ("training", "evaluation")
NUMBER = {"prompt": "question", "reward": "number"}


# --- which rows are drawn ------------------------------------------------------------------------


def test_an_epoch_has_every_row_once_and_the_next_another_order() -> None:
    env = load_env(write("d.jsonl", sums(10))).configure(NUMBER)
    steps = [numbers(env.tasks(seed=7, n=4, start=4 * step)) for step in range(5)]
    drawn = [number for step in steps for number in step]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert drawn[:10] != list(range(10))


def test_a_step_draws_the_same_whenever_and_wherever_it_is_drawn() -> None:
    name = write("d.jsonl", sums(10))
    env = load_env(name).configure(NUMBER)
    later = load_env(name).configure(NUMBER).tasks(seed=7, n=4, start=12)
    assert env.tasks(seed=7, n=20)[12:16] == later
    assert env.tasks(seed=8, n=20)[12:16] != later


def test_a_batch_may_be_larger_than_the_data() -> None:
    env = load_env(write("d.jsonl", sums(3))).configure(NUMBER)
    assert Counter(numbers(env.tasks(seed=0, n=7))).most_common()[-1][1] == 2


def test_held_out_rows_are_never_trained_on() -> None:
    env = load_env(write("d.jsonl", sums(20))).configure(NUMBER)
    training, evaluation = env.training(0.25), env.evaluation(0.25)
    assert [len(one.source) for one in (training, evaluation)] == [15, 5]  # type: ignore[arg-type]
    trained = set(numbers(training.tasks(seed=0, n=100)))
    held_out = set(numbers(evaluation.tasks(seed=0, n=100)))
    assert trained | held_out == set(range(20))
    assert not trained & held_out
    # the settings of an evaluation's cell leave the split as it is
    again = evaluation.configure({"system": "Be brief."})
    assert again.tasks(seed=0, n=5) == evaluation.tasks(seed=0, n=5)
    with pytest.raises(ConfigError, match=r"env\.args\.eval_rows: .* no such setting"):
        evaluation.configure({"eval_rows": "other.jsonl"})
    everything = env.training(0), env.evaluation(0)
    assert [len(one.source) for one in everything] == [20, 20]  # type: ignore[arg-type]


def test_a_file_of_its_own_for_evaluation() -> None:
    write("test.jsonl", sums(5, start=100))
    env = load_env(write("train.jsonl", sums(20))).configure(NUMBER | {"eval_rows": "test.jsonl"})
    assert len(env.training(0.5).source) == 20  # type: ignore[arg-type]
    evaluation = env.evaluation(0.5).configure({"system": "Be brief."})
    (task,) = evaluation.tasks(seed=0, n=1)
    assert isinstance(task, Row)
    assert task.place.startswith("test.jsonl:")


@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_a_row_on_both_sides_is_named(part: str) -> None:
    write("train.jsonl", sums(20))
    write("test.jsonl", [{"question": "new", "answer": 1}, *sums(5, start=18)])
    env = load_env("train.jsonl").configure(NUMBER | {"eval_rows": "test.jsonl"})
    complaint = (
        "test.jsonl:2 repeats train.jsonl:19; test.jsonl:3 repeats train.jsonl:20. Remove one"
    )
    with pytest.raises(DataError, match=re.escape(complaint)):
        getattr(env, part)(0.1)


def test_rows_on_both_sides_are_dropped_from_training() -> None:
    write("train.jsonl", sums(20))
    write("test.jsonl", [{"question": "new", "answer": 1}, *sums(5, start=18)])
    env = load_env("train.jsonl").configure(NUMBER | {"eval_rows": "test.jsonl"})
    training = env.training(0.1, "drop")
    assert sorted(numbers(training.tasks(seed=0, n=18))) == list(range(18))
    assert isinstance(training.source, Rows)
    assert training.source.dropped == (
        "train.jsonl:19 repeats test.jsonl:2",
        "train.jsonl:20 repeats test.jsonl:3",
    )
    assert len(env.evaluation(0.1, "drop").source) == 6  # type: ignore[arg-type]
    write("test.jsonl", sums(20))
    env = load_env("train.jsonl").configure(NUMBER | {"eval_rows": "test.jsonl"})
    with pytest.raises(DataError, match=r"; none other is left to train"):
        env.training(0.1, "drop")


def test_a_row_that_is_held_out_and_there_again() -> None:
    """It is the question that counts, not the answer; where it is trained or evaluated twice, it
    does no harm."""
    rows = sums(20)
    env = load_env(write("d.jsonl", rows)).configure(NUMBER)
    ours = set(numbers(env.evaluation(0.25).tasks(seed=0, n=5)))
    first, second = sorted(ours)[:2]
    theirs = min(set(range(20)) - ours)
    write("d.jsonl", [{**rows[first], "answer": 0} if k == theirs else rows[k] for k in range(20)])
    complaint = f"d.jsonl:{first + 1} repeats d.jsonl:{theirs + 1}"
    broken = load_env("d.jsonl").configure(NUMBER)
    with pytest.raises(DataError, match=re.escape(complaint)):
        broken.training(0.25)
    assert theirs not in numbers(broken.training(0.25, "drop").tasks(seed=0, n=14))
    assert first in numbers(broken.evaluation(0.25, "drop").tasks(seed=0, n=5))
    broken.training(0)  # nothing is held out
    write("d.jsonl", [rows[first] if k == second else rows[k] for k in range(20)])
    load_env("d.jsonl").configure(NUMBER).training(0.25)


# --- bad rows and settings -----------------------------------------------------------------------

GOOD = {"q": "1 + 1?", "a": 2, "word": "two"}


@pytest.mark.parametrize(
    ("second", "args", "complaint"),
    [
        ({"q": "x"}, {}, "d.jsonl:2: there is no column 'a', only q. env.args.answer names it."),
        ({"a": 1, "que": "x"}, {}, "d.jsonl:2: there is no column 'q', only a, que. Did you mean"),
        ({"q": None, "a": 1}, {}, "d.jsonl:2: column 'q' is empty (null), and env.args.prompt"),
        ({"q": " ", "a": 1}, {}, "d.jsonl:2: the prompt is empty"),
        ({"q": "x", "a": "two"}, {}, 'd.jsonl:2: "two" is no answer for env.args.reward=number'),
        ({"q": "x", "a": None}, {}, "d.jsonl:2: column 'a' is empty (null), and env.args.answer"),
        ({"q": "x", "a": 1}, {"prompt": "{q} {word}"}, "d.jsonl:2: there is no column 'word'"),
        ({"q": "x", "a": 1}, {"system": "{word}"}, "d.jsonl:2: there is no column 'word'"),
        ({"q": "x", "a": 1}, {"gold": "{word}"}, "d.jsonl:2: there is no column 'word'"),
        (
            {"q": "x", "a": "1"},
            {"prompt": "{q} {a:.2f}"},
            "d.jsonl:2: env.args.prompt does not",
        ),
        ({"q": "x", "a": 1}, {"prompt": "{q[0][k]}"}, "d.jsonl:1: env.args.prompt does not fit"),
        ({"q": [], "a": 1}, {}, "d.jsonl:2: column 'q' must be a list of messages, got []"),
        ({"q": [{"role": "usr", "content": ""}], "a": 1}, {}, "'q': message 1 must have a role"),
        ({"q": [{"role": "user", "content": 1}], "a": 1}, {}, "message 1 must have text as its"),
        ({"q": [{"role": "assistant", "content": "x"}], "a": 1}, {}, "'q' ends with a reply"),
        (
            {"q": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], "a": 1},
            {"system": "s"},
            "d.jsonl:2: the row has a system message of its own",
        ),
    ],
)
def test_bad_rows(second: Mapping[str, Any], args: Mapping[str, Any], complaint: str) -> None:
    name = write("d.jsonl", [GOOD, second])
    base = {"prompt": "q", "answer": "a", "reward": "number"}
    env = load_env(name).configure({**base, **args})
    with pytest.raises(DataError, match=re.escape(complaint)):
        env.tasks(seed=0, n=1)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"promt": "q"}, "env.args.promt: environment 'd' has no such setting. Did you mean 'pr"),
        ({"prompt": 3}, "env.args.prompt of environment 'd': expected str, got 3"),
        ({"prompt": "{q"}, "env.args.prompt='{q': expected '}'"),
        ({"prompt": "say {}"}, "env.args.prompt='say {}': name a column between the braces"),
        ({"system": "say {0}"}, "env.args.system='say {0}': name a column between the braces"),
        ({"reward": "numbr"}, "env.args.reward='numbr' is not one of exact, number, math, choice,"),
        ({"reward": []}, "env.args.reward=[]: name at least one reward"),
        ({"reward": ["number", "own.py:number"]}, "two of them are called 'number'"),
        ({"reward": "own.py:missing"}, "own.py has no function 'missing'"),
        ({"extract": "("}, "env.args.extract='(' is not a regular expression"),
        ({"choices": []}, "env.args.choices=[]"),
        ({"schema": "{}"}, "env.args.schema of environment 'd': expected dict"),
    ],
)
def test_bad_settings(args: Mapping[str, Any], complaint: str) -> None:
    """They are found without reading the file, which is not there."""
    write_text("own.py", "def number(reply, row): ...")
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        load_env("d.jsonl").configure(args)


def test_no_rows() -> None:
    with pytest.raises(DataError, match=r"d\.jsonl: there are no rows in it"):
        load_env(write("d.jsonl", [])).tasks(seed=0, n=1)


# --- playing -------------------------------------------------------------------------------------


async def played(env: Environment, reply: str) -> tuple[Sequence[Message], Mapping[str, float]]:
    """The prompt of the first task, and the scores that the reply gets."""
    (task,) = env.tasks(seed=0, n=1)
    players = {"agent": ScriptedPlayer(lambda messages, rng: reply)}
    episode = await play_episode(env, task, players, id="e")
    assert episode.failure is None, episode.failure
    return episode.turns[0].prompt, episode.scores["agent"]


async def test_prompt_and_system_message_from_columns() -> None:
    name = write("d.jsonl", [{"q": "1 + 1?", "lang": {"name": "English"}, "a": 2}])
    args = {"prompt": "{q} {{x}}", "system": "Speak {lang[name]}.", "answer": "a"}
    prompt, scores = await played(load_env(name).configure(args), "2")
    assert [(m.role, m.content) for m in prompt] == [
        ("system", "Speak English."),
        ("user", "1 + 1? {x}"),
    ]
    assert scores == {"exact": 1.0}


async def test_a_prompt_of_messages() -> None:
    chat = [("system", "s"), ("user", "1?"), ("assistant", "1"), ("user", "2?")]
    rows = [{"prompt": [{"role": r, "content": c} for r, c in chat], "answer": "2"}]
    prompt, scores = await played(load_env(write("d.jsonl", rows)), "2")
    assert [(m.role, m.content) for m in prompt] == chat
    assert scores == {"exact": 1.0}


async def test_several_rewards_with_weights_and_what_is_judged_of_a_reply() -> None:
    write_text("own.py", "async def brief(r, row):\n    return float(len(r) < row['limit'])\n")
    name = write("d.jsonl", [{"prompt": "p", "answer": 2, "limit": 30}])
    args = {"reward": ["number", "own.py:brief"], "extract": r"<answer>(.*?)</answer>"}
    env = load_env(name).configure(args, {"brief": 0.5})
    assert env.rewards == {"number": 1.0, "brief": 0.5}
    table = {
        "<answer>2</answer>": (1.0, 1.0),
        "<answer>3</answer> <answer>2</answer>": (1.0, 0.0),  # the last one counts
        "2": (0.0, 1.0),
        "<answer>2</answer> 3": (1.0, 1.0),
    }
    for reply, (number, brief) in table.items():
        _, scores = await played(env, reply)
        assert scores == {"number": number, "brief": brief}, reply
    with pytest.raises(ConfigError, match=r"env\.rewards\.exact: .*no such reward"):
        load_env(name).configure(args, {"exact": 0.5})


@pytest.mark.parametrize(
    ("extract", "reply", "score"),
    [
        ("(.*)", "2", 1.0),  # it also matches the nothing at the end
        (r"answer: (\d+)|none", "answer: 2 or none", 1.0),
        (r"answer: (\d+)|none", "none", 0.0),
        (r"\d", "1 2", 1.0),
    ],
)
async def test_what_is_judged_is_the_last_that_was_found(
    extract: str, reply: str, score: float
) -> None:
    env = load_env(write("d.jsonl", [{"prompt": "p", "answer": "2"}]))
    _, scores = await played(env.configure({"extract": extract}), reply)
    assert scores == {"exact": score}


def test_other_calls_are_another_question() -> None:
    def asked(arguments: str) -> list[dict[str, Any]]:
        calls = [{"function": {"name": "look", "arguments": arguments}}]
        return [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "found"},
        ]

    rows = [{"prompt": asked(json.dumps({"k": k})), "answer": "2"} for k in range(4)]
    load_env(write("d.jsonl", rows)).training(0.5)
    with pytest.raises(DataError, match="repeats"):
        load_env(write("d.jsonl", [rows[0]] * 4)).training(0.5)


def test_a_missing_number_is_no_number() -> None:
    """pandas writes NaN."""
    write_text("d.jsonl", '{"prompt": "p", "answer": 1, "more": [NaN, {"a": NaN}, 2.5]}')
    (task,) = load_env("d.jsonl").tasks(seed=0, n=1)
    assert task["more"] == [None, {"a": None}, 2.5]  # type: ignore[index]


def test_one_environment_does_not_train_on_what_another_evaluates() -> None:
    first = load_env(write("a.jsonl", sums(20))).configure(NUMBER)
    second = load_env(write("b.jsonl", sums(20)[::-1])).configure(NUMBER)
    evaluated = second.evaluation(0.25)
    theirs = {task["question"] for task in evaluated.source}  # type: ignore[union-attr,index]
    ours = {task["question"] for task in first.training(0.25).source}  # type: ignore[union-attr,index]
    assert ours & theirs, "or this shows nothing"
    with pytest.raises(DataError, match=r"b\.jsonl:\d+ repeats a\.jsonl:\d+"):
        first.training(0.25).without(evaluated)
    rest = first.training(0.25).without(evaluated, "drop")
    assert {task["question"] for task in rest.source} == ours - theirs  # type: ignore[union-attr,index]
    assert len(rest.source.dropped) == len(ours & theirs)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "args", "reply"),
    [
        ({"answer": "blue"}, {}, "blue"),
        ({"answer": ["blue", "green"]}, {}, "blue"),
        ({"answer": "1 + 1 = 2 #### 2"}, {"reward": "number"}, "1 + 1 = 2 #### 2"),
        ({"answer": 2}, {"reward": "number", "extract": "a(.)b", "gold": "a{answer}b"}, "a2b"),
        ({"answer": "B"}, {"reward": "choice"}, "B"),
        ({"answer": 1}, {"reward": "choice", "choices": [0, 1]}, "1"),
        ({"answer": True}, {"reward": "choice", "choices": [True, False]}, "true"),
        ({"answer": True}, {"gold": "{answer}"}, "true"),
        ({"answer": 1e-05}, {"gold": "{answer}", "reward": "number"}, "0.00001"),
        ({"answer": 2.5}, {"gold": "{answer:.2f}", "reward": "number"}, "2.50"),
        ({"answer": "\\frac{1}{2}"}, {"reward": "math"}, "\\frac{1}{2}"),
        ({"answer": "c.t", "word": "cat"}, {"reward": "regex", "gold": "{word}"}, "cat"),
    ],
)
async def test_the_gold_player_is_right(
    row: Mapping[str, Any], args: Mapping[str, Any], reply: str
) -> None:
    env = load_env(write("d.jsonl", [{"prompt": "p", **row}])).configure(args)
    (task,) = env.tasks(seed=0, n=1)
    episode = await play_episode(env, task, {"agent": ScriptedPlayer(env.players["gold"])}, id="e")
    assert episode.failure is None, episode.failure
    assert [turn.text for turn in episode.turns] == [reply]
    assert set(episode.rewards.values()) == {1.0}


async def test_an_answer_that_is_no_reply() -> None:
    env = load_env(write("d.jsonl", [{"prompt": "p", "answer": "c.t"}]))
    env = env.configure({"reward": "regex"})
    (task,) = env.tasks(seed=0, n=1)
    gold = {"agent": ScriptedPlayer(env.players["gold"])}
    episode = await play_episode(env, task, gold, id="e")
    assert episode.failure is not None
    assert "set env.args.gold" in episode.failure.message


def test_it_passes_the_check_and_travels() -> None:
    name = write("d.jsonl", sums(10))
    env = load_env(name).configure(NUMBER)
    assert check_env(env) == []
    assert reference_of(env) == str(Path(name).resolve())
    Path(name).unlink()  # a process that plays needs no file
    again = environment_of(pickle.loads(pickle.dumps(env.spec)))
    assert again.rewards == {"number": 1.0}


# --- in an environment of one's own --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sum(Task):
    question: str
    answer: int
    unit: str = "apples"


def own(tasks: Rows[Any], eval_tasks: Rows[Any] | None = None) -> Environment:
    @rayrl.env(tasks=tasks, eval_tasks=eval_tasks, rewards={"right": 1.0})
    async def play(task: Task, agent: Agent) -> Scores:
        return {"right": 1.0}

    return play


def test_rows_for_an_environment_of_ones_own() -> None:
    write("d.jsonl", sums(10))
    (task,) = own(rayrl.rows("d.jsonl")).tasks(seed=0, n=1)
    assert isinstance(task, Row)
    assert task["answer"] == task.seed + 1
    with pytest.raises(DataError, match=r"d\.jsonl:\d+: there is no column 'anser'.* 'answer'"):
        task["anser"]
    tasks = rayrl.rows("d.jsonl", Sum)
    assert tasks[1] == Sum(seed=1, question="1 + 1?", answer=2)
    assert tasks[-2:] == [tasks[8], tasks[9]]
    assert sorted(numbers(own(tasks).tasks(seed=0, n=10))) == list(range(10))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "x"}, "d.jsonl:1: there is no column 'answer', only question. Sum needs it."),
        ({"question": "x", "answer": "two"}, "d.jsonl:1: field 'answer': expected a valid integer"),
        ({"question": 3, "answer": 2}, "d.jsonl:1: field 'question': expected a valid string"),
    ],
)
def test_rows_that_do_not_fit_a_class(row: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=re.escape(complaint)):
        len(rayrl.rows(write("d.jsonl", [row]), Sum))


@pytest.mark.parametrize("kind", [Row, Sum])
def test_rows_of_ones_own_on_both_sides(kind: type[Task]) -> None:
    write("a.jsonl", sums(5))
    write("b.jsonl", sums(5, start=4))
    env = own(rayrl.rows("a.jsonl", kind), rayrl.rows("b.jsonl", kind))
    with pytest.raises(DataError, match=r"b\.jsonl.*1 repeats a\.jsonl.*5\. Remove"):
        env.training(0.1)


async def test_a_player_may_take_the_task() -> None:
    env = own(rayrl.rows(write("d.jsonl", sums(1))))

    async def play(task: Row, agent: Agent) -> Scores:
        right = str(task["answer"])
        said = [await agent("?"), await agent.fork()("?")]
        agent.restart()
        said.append(await agent("?"))
        return {"right": float(said == [right] * 3)}

    def knows(messages: Sequence[Message], rng: random.Random, task: Row) -> str:
        return str(task["answer"])

    (task,) = env.tasks(seed=0, n=1)
    players = {"agent": ScriptedPlayer(knows)}
    episode = await play_episode(env.with_play(play), task, players, id="e")
    assert episode.rewards == {"agent": 1.0}


async def test_each_cell_of_an_evaluation_asks_and_judges_in_its_own_way() -> None:
    cells = {
        "plain": {},
        "polite": {"prompt": "{question} Please!", "system": "Be nice."},
        "words": {"reward": "exact", "gold": "It is {answer}."},
    }
    env = {"name": write("d.jsonl", sums(20)), "args": NUMBER}
    config = from_dict({"env": env, "eval": {"cells": cells, "episodes": 2}})
    evaluated = make_environment(config).evaluation(0.1)
    envs = _played(config)
    assert envs.keys() == {"", *cells}
    prompts, scores = {}, {}
    for cell, args in cells.items():
        plan, _ = evaluation_plans(evaluated.configure(args), config, cell)
        played_env = environment_of(envs[plan.component].env)
        gold = {"agent": ScriptedPlayer(played_env.players["gold"])}
        episode = await play_episode(played_env, plan.task, gold, id="e")
        prompts[cell] = [message.content for message in episode.turns[0].prompt]
        scores[cell] = episode.scores["agent"]
    assert scores == {"plain": {"number": 1.0}, "polite": {"number": 1.0}, "words": {"exact": 0.0}}
    assert prompts["polite"][0] == "Be nice."
    assert prompts["polite"][1].endswith(" + 1? Please!")
    assert prompts["plain"][0].endswith(" + 1?")


def test_other_rows_are_noticed_when_a_run_resumes() -> None:
    write("d.jsonl", sums(20))
    parts = [{"": getattr(load_env("d.jsonl").configure(NUMBER), part)(0.1)} for part in PARTS]
    rows = _rows_of(*parts)
    assert rows.keys() == {"train", "eval"}
    folder: Any = SimpleNamespace(path="runs/x", read_json=lambda name: rows)
    _check_rows(rows, folder)
    write("d.jsonl", sums(20, start=1))
    parts = [{"": getattr(load_env("d.jsonl").configure(NUMBER), part)(0.1)} for part in PARTS]
    with pytest.raises(DataError, match=r"d\.jsonl: its rows are not those that runs/x began"):
        _check_rows(_rows_of(*parts), folder)


async def test_a_column_called_seed_is_not_the_tasks() -> None:
    write("d.jsonl", [{"question": "same", "seed": 7}, {"question": "same", "seed": 7}])
    assert numbers([*rayrl.rows("d.jsonl", Question)]) == [0, 1]
