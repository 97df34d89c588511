"""Whole episodes through rayrl's own loop, the tools, the scores, the settings."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from rayrl_tools import Errand, errands, score, tools
from rayrl_tools.corpus import Corpus
from rayrl_tools.desk import Desk, NoSuchDocument, ServiceDown

from rayrl import ConfigError, Episode, Message, ScriptedPlayer, check_env, format_call, play_group

FLAKY = 0.5


def errand(level: int = 3, seed: int = 1, **args: Any) -> Errand:
    return errands(seed, 0.0, easiest=level, hardest=level, **args)


async def play(task: Errand, player: Callable[..., str] | str, size: int = 1) -> list[Episode]:
    function = tools.players[player] if isinstance(player, str) else player
    players = {"agent": ScriptedPlayer(function)}
    group = await play_group(tools, task, players, id="g", size=size, seed=0)
    assert group.complete
    return list(group.episodes)


def script(*replies: str) -> Callable[..., str]:
    def say(messages: Sequence[Message], rng: random.Random) -> str:
        return replies[sum(message.role == "assistant" for message in messages)]

    return say


# --- tasks -----------------------------------------------------------------------------------


def test_levels_cover_their_range_evenly() -> None:
    tasks = tools.configure({"easiest": 2, "hardest": 4}).tasks(seed=0, n=9)
    assert [task.level for task in tasks] == [2, 2, 2, 3, 3, 3, 4, 4, 4]  # type: ignore[attr-defined]


def test_a_question_depends_on_seed_level_and_split_only() -> None:
    one = errand(seed=5)
    other = errand(seed=5, protocol="text", failure_rate=0.3, rounds=3)
    assert (one.question, one.answer) == (other.question, other.answer)
    assert errand(seed=6).question != one.question
    assert errand(seed=5, split="test").question != one.question


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"easiest": 0}, "easiest=0"),
        ({"hardest": 6}, "hardest=6"),
        ({"easiest": 3, "hardest": 2}, "easiest=3 and hardest=2"),
        ({"failure_rate": 1.0}, "failure_rate=1.0"),
        ({"failure_rate": -0.1}, "failure_rate"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_invalid_settings_are_rejected(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        errands(0, 0.0, **args)


@pytest.mark.parametrize(("key", "value"), [("protocol", "xml"), ("split", "dev")])
def test_words_are_checked_against_their_choices(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"env\.args\.{key}.*expected one of"):
        tools.configure({key: value})


def test_env_check_finds_no_problems() -> None:
    assert check_env(tools) == []


# --- the tools ---------------------------------------------------------------------------------


def test_search_and_open() -> None:
    desk = Desk(errand(), 0.0)
    first = desk.search("How many people live in Baronpan?").splitlines()[0]
    assert first == "[d002] Baronpan (town)"
    for way in ("d002", "[d002]", " D002 "):
        assert desk.open_document(way).startswith("Baronpan (town): The town of Baronpan stands")
    assert desk.search("qwertz").startswith("No document")
    with pytest.raises(NoSuchDocument, match="'Baronpan': search gives the ids"):
        desk.open_document("Baronpan")
    assert desk.calculator("2 * 3") == "6"
    assert (desk.valid, desk.unlucky) == (6, 0)


def fails(desk: Desk, query: str) -> bool:
    try:
        desk.search(query)
    except ServiceDown:
        return True
    return False


def test_simulated_outages_depend_on_the_task_and_end() -> None:
    runs = []
    for _ in range(2):
        desk = Desk(errand(seed=3), 0.7)
        runs.append([[fails(desk, query) for _ in range(30)] for query in ("a", "b", "c")])
        assert desk.unlucky == sum(map(sum, runs[-1]))
        assert desk.valid == 90
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]
    for luck in runs[0]:
        assert all(not (a and b and c) for a, b, c in zip(luck, luck[1:], luck[2:], strict=False))
    # what another call met on the way changes nothing
    desk = Desk(errand(seed=3), 0.7)
    assert [fails(desk, "c") for _ in range(30)] == runs[0][2]
    assert not any(fails(Desk(errand(seed=3), 0.0), query) for query in ("a", "b", "c"))


def test_failure_rate_is_how_often_a_first_call_fails() -> None:
    failed = sum(fails(Desk(errand(seed=seed), 0.3), "a") for seed in range(1000))
    assert failed == pytest.approx(300, abs=58)  # four standard deviations


# --- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "calls", "valid", "expected"),
    [
        ("<answer>{}</answer>", 5, 5, (1.0, 1.0, 1.0, 1.0)),
        ("So: <answer>{}</answer>\n", 10, 8, (1.0, 0.8, 0.5, 1.0)),
        ("<answer>{}</answer>", 2, 2, (1.0, 1.0, 1.0, 1.0)),
        ("<answer>{}</answer>", 0, 0, (1.0, 0.0, 1.0, 1.0)),
        ("<answer>{}</answer> I think", 5, 5, (1.0, 1.0, 1.0, 0.0)),
        ("<answer>-1</answer>", 5, 5, (0.0, 1.0, 0.0, 1.0)),
        ("<answer>1</answer><answer>{}</answer>", 5, 5, (0.0, 1.0, 0.0, 0.0)),
        ("{}", 5, 5, (0.0, 1.0, 0.0, 0.0)),
        ("", 0, 0, (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_scores_by_hand(
    reply: str, calls: int, valid: int, expected: tuple[float, float, float, float]
) -> None:
    task = errand()
    assert task.needed == 5
    scores = score(task, reply.format(task.answer), calls, valid)
    assert scores.pop("needed") == 5.0
    assert tuple(scores.values()) == expected


# --- episodes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["native", "text"])
@pytest.mark.parametrize("split", ["train", "test"])
async def test_perfect_reaches_the_whole_reward(protocol: Any, split: Any) -> None:
    for level in range(1, 6):
        for seed in range(30):
            task = errand(level, seed, protocol=protocol, split=split)
            (episode,) = await play(task, "perfect")
            assert episode.scores["agent"] == {
                "correct": 1.0,
                "valid": 1.0,
                "calls": 1.0,
                "format": 1.0,
                "needed": float(task.needed),
                "tool_calls": float(task.needed),
                "tool_errors": 0.0,
            }
            assert episode.rewards["agent"] == pytest.approx(1.3)


@pytest.mark.parametrize("protocol", ["native", "text"])
async def test_perfect_retries_and_outages_are_the_same_within_a_group(protocol: Any) -> None:
    unlucky = 0
    for seed in range(20):
        task = errand(5, seed, protocol=protocol, failure_rate=FLAKY)
        one, other = await play(task, "perfect", size=2)
        assert [turn.prompt for turn in one.turns] == [turn.prompt for turn in other.turns]
        scores = one.scores["agent"]
        assert (scores["correct"], scores["valid"]) == (1.0, 1.0)  # bad luck is not its fault
        assert scores["tool_calls"] == scores["needed"] + scores["tool_errors"]
        assert scores["calls"] == scores["needed"] / scores["tool_calls"]
        unlucky += scores["tool_errors"] > 0
    assert unlucky > 15


@pytest.mark.parametrize("protocol", ["native", "text"])
async def test_clumsy_recovers(protocol: Any) -> None:
    task = errand(protocol=protocol)
    (episode,) = await play(task, "clumsy")
    scores = episode.scores["agent"]
    assert (scores["correct"], scores["tool_errors"]) == (1.0, 3.0)
    assert scores["valid"] == pytest.approx(5 / 8)
    told = [message.content for turn in episode.turns[1:3] for message in turn.prompt]
    wrong = "\n".join(told)
    assert "Did you mean 'search'?" in wrong
    assert "CalculatorError: not an arithmetic expression: 'two plus two'" in wrong
    assert ("line of its own" if protocol == "text" else "not valid JSON") in told[0]


async def test_guesser_never_looks() -> None:
    for seed in range(20):
        (episode,) = await play(errand(seed=seed), "guesser")
        scores = episode.scores["agent"]
        assert (scores["valid"], scores["tool_calls"], scores["format"]) == (0.0, 0.0, 1.0)
        assert len(episode.turns) == 1


async def test_concurrent_calls_are_answered_in_order() -> None:
    calls = [
        format_call("calculator", {"expression": "6 * 7"}),
        format_call("open_document", {"document": "d999"}),
        format_call("search", {"query": "Baronpan", "pages": 2}),
        format_call("calculator", {"expression": "1 / 4"}),
    ]
    (episode,) = await play(errand(), script("Now:\n" + "\n".join(calls), "<answer>42</answer>"))
    results = episode.turns[1].prompt
    assert [message.tool_call_id for message in results] == [f"call_{k}" for k in range(4)]
    assert [message.content for message in results] == [
        "42",
        (
            "Error: open_document raised NoSuchDocument: there is no document 'd999': search gives "
            "the ids"
        ),
        "Error: search: unknown argument 'pages'. Known: query.",
        "0.25",
    ]
    scores = episode.scores["agent"]
    assert (scores["tool_calls"], scores["tool_errors"], scores["valid"]) == (4.0, 2.0, 0.5)


async def test_rounds_run_out() -> None:
    call = format_call("calculator", {"expression": "1"})
    (episode,) = await play(errand(rounds=2), script(call, call, call))
    assert len(episode.turns) == 3
    assert episode.turns[2].prompt[0].content.endswith("answer now.")
    assert episode.scores["agent"]["format"] == 0.0
    assert tools.statistics_function is not None
    assert tools.statistics_function(episode) == {
        "correct %": False,
        "answered %": False,
        "valid %": 1.0,
        "calls": 2.0,
        "needed": 5.0,
        "format %": 0.0,
    }


async def test_messages_to_the_model_in_each_protocol() -> None:
    native, text = errand(), errand(protocol="text")
    (episode,) = await play(native, "guesser")
    rules, question = episode.turns[0].prompt
    assert (rules.content, question.content) == (native.system_prompt, native.question)
    assert [schema["function"]["name"] for schema in episode.turns[0].tools] == [
        "search",
        "open_document",
        "calculator",
    ]
    (episode,) = await play(text, "guesser")
    rules, question = episode.turns[0].prompt
    assert rules.content.startswith(text.system_prompt + "\n\nYou can use these tools.")
    assert "CALL calculator: expression - " in rules.content
    assert question.content == text.question
    assert episode.turns[0].tools == ()


def test_no_single_document_contains_the_answer() -> None:
    """The prompt and the tools' descriptions hold no fact."""
    listing = json.dumps([function.__doc__ for function in Desk(errand(), 0.0).tools])
    for one in Corpus.load().documents:
        assert one.title not in listing + errand().system_prompt
