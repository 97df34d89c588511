"""Environments of verifiers: what its own loop gives and what the scheme gives are the same."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayrl.environment.environment import Environment
from rayrl.environment.registry import environment_of, load_env
from rayrl.errors import ConfigError
from rayrl.rollout.check import check_env
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import play_group
from rayrl.types import Episode, Message
from tests.act import instant

vf = pytest.importorskip("verifiers")
schemes = pytest.importorskip("rayrl.environment.schemes.verifiers.v0")

from verifiers.clients import Client  # noqa: E402
from verifiers.types import Response, ResponseMessage, ToolCall  # noqa: E402

HERE = Path(__file__).parent / "verifiers_envs"
NAMES = ("sums", "number_guess", "shop", "tictactoe")


def load(name: str) -> Environment:
    return load_env(f"verifiers:{HERE / name}.py")


def any_reply(messages: Sequence[Message], rng: random.Random) -> str:
    """Right, wrong, malformed and tool-calling replies."""
    if messages[-1].role == "tool" and rng.random() < 0.8:
        return messages[-1].content
    replies = ["no idea", "4", *(f"<answer>{k}</answer>" for k in (0, 3, 5, 60, 120))]
    replies += [f"<think>so</think><move>{rng.randrange(9)}</move>" for _ in range(3)]
    replies += [str(rng.randrange(10)), str(rng.randrange(10))]
    if "cost?" in messages[0].content:
        item = messages[0].content.split()[2]
        replies += [call("price", item=item), call("price", item="gold"), call("stock", items=[])]
    return rng.choice(replies)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Replies(Client):  # type: ignore[misc]
    """Verifiers' own client with replies that are known; notes what it was asked."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__(None)
        self.texts, self.asked = list(texts), []

    async def get_response(self, prompt: Any, model: str, *_: Any, **__: Any) -> Response:
        self.asked.append([str(one.content or "") for one in prompt if one.role != "assistant"])
        text = self.texts[len(self.asked) - 1]
        found = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text, re.DOTALL)
        calls = None
        if found:
            data = json.loads(found[1])
            arguments = json.dumps(data["arguments"])
            calls = [ToolCall(id=f"c{len(self.asked)}", name=data["name"], arguments=arguments)]
        message = ResponseMessage(
            content=None if calls else text,
            tool_calls=calls,
            finish_reason="stop",
            is_truncated=False,
        )
        return Response(id="r", created=0, model=model, message=message)

    async def _unused(self, *_: Any) -> Any:
        raise AssertionError

    to_native_tool = to_native_prompt = get_native_response = _unused
    raise_from_native_response = from_native_response = close = _unused

    def setup_client(self, config: Any) -> None:
        raise AssertionError


def group_of(env: Environment, number: int = 0, size: int = 4, **options: Any) -> list[Episode]:
    (task,) = env.tasks(number, 1)
    player = options.pop("player", None) or ScriptedPlayer(any_reply)
    run = play_group(env, task, {"agent": player}, id="g", size=size, seed=number, retries=0)
    return list(asyncio.run(run).episodes)


def replies(*texts: str) -> ScriptedPlayer:
    left = iter(texts)
    return ScriptedPlayer(lambda messages, rng: next(left))


# --- the same as in verifiers --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sums", "number_guess", "tictactoe"])
@pytest.mark.parametrize("number", range(6))
def test_rollouts_are_those_of_verifiers(name: str, number: int) -> None:
    env = load(name)
    own = schemes._loaded(env.id, "{}").environment
    for episode in group_of(env, number):
        assert episode.failure is None, episode.failure
        client = Replies([turn.text for turn in episode.turns])
        row = dict(episode.task.row)
        with schemes.EpisodeRandom("verifiers", episode.task.seed):
            output = asyncio.run(own.run_rollout(row, client, "m", {}, state_columns=["answer"]))
        assert output["error"] is None
        assert episode.rewards["agent"] == pytest.approx(output["reward"])
        scores = dict(episode.scores["agent"])
        failed = scores.pop("failed_functions")
        assert scores == pytest.approx(output["metrics"])
        assert failed == (name == "sums" and not re.search("<answer>", episode.turns[0].text))
        heard: list[str] = []
        for turn, asked in zip(episode.turns, client.asked, strict=True):
            heard += [message.content for message in turn.prompt]
            assert heard == asked
        assert episode.facts["stop_condition"] == output["stop_condition"]


@pytest.mark.parametrize("number", range(8))
def test_functions_over_a_group_are_those_of_verifiers(number: int) -> None:
    env = load("shop")
    assert env.rewards["right"] == 1.0
    weights = {name: group.weight for name, group in env.group_rewards.items()}
    assert weights == {"shortest": 0.25, "fewest_calls": 0.5}
    episodes = group_of(env, number)
    own = schemes._loaded(env.id, "{}").environment
    row = dict(episodes[0].task.row)

    async def theirs() -> list[Any]:
        states = [
            await own.rollout(row, Replies([turn.text for turn in episode.turns]), "m", {})
            for episode in episodes
        ]
        await own.rubric.score_group(states)
        return states

    for episode, state in zip(episodes, asyncio.run(theirs()), strict=True):
        assert episode.failure is None, episode.failure
        assert episode.rewards["agent"] == pytest.approx(state["reward"])
        scores = dict(episode.scores["agent"])
        assert scores.pop("failed_functions") == 0.0
        assert scores == pytest.approx(state["metrics"])
    assert json.loads(json.dumps(dict(episodes[0].facts))) == episodes[0].facts


def test_functions_over_a_group_that_want_more_than_plain_data_say_so() -> None:
    (one, *_) = group_of(load("shop").configure({"asks_lock": True}))
    assert one.failure is not None
    assert one.failure.kind == "env"
    assert "KeyError: 'lock'. Of the states, lock are no plain data" in one.failure.message


def test_turns_have_ids_and_go_on_from_one_another() -> None:
    for name in ("tictactoe", "shop"):
        (episode,) = group_of(load(name), size=1, player=instant()["agent"])
        assert episode.failure is None, episode.failure
        assert {turn.conversation for turn in episode.turns} == {episode.turns[0].conversation}
        assert all(turn.completion_ids for turn in episode.turns)
        assert all(len(turn.prompt) == 1 for turn in episode.turns[1:]), "only what is new"
    assert [tool["function"]["name"] for tool in episode.turns[0].tools] == ["price", "stock"]


def test_a_history_that_is_rewritten_is_a_conversation_of_its_own(tmp_path: Path) -> None:
    made(
        tmp_path,
        """
        class Forgetful(vf.MultiTurnEnv):
            async def env_response(self, messages, state, **_):
                return [vf.UserMessage(content=f"more {len(state['trajectory'])}")]

            async def get_prompt_messages(self, state):
                messages = await super().get_prompt_messages(state)
                if len(state["trajectory"]) == 2:
                    messages[-1:] = [vf.UserMessage(content="in place")]
                if len(state["trajectory"]) == 3:
                    return [vf.UserMessage(content="again, from the start")]
                if len(state["trajectory"]) == 4:  # as after the first reply, but for the last
                    first = state["trajectory"][1]["prompt"]
                    return [*first[:-1], vf.UserMessage(content="another way on")]
                return messages

        def load_environment():
            rows = Dataset.from_list([{"question": "?", "answer": ""}] * 4)
            return Forgetful(dataset=rows, rubric=vf.Rubric(funcs=[zero]), max_turns=5)
        """,
    )
    env = load_env(f"verifiers:{tmp_path}/own.py")
    (episode,) = group_of(env, size=1, player=replies("a", "b", "c", "d", "e"))
    assert episode.failure is None, episode.failure
    asked = [[message.content for message in turn.prompt] for turn in episode.turns]
    assert asked == [["?"], ["more 1"], ["in place"], ["again, from the start"], ["another way on"]]
    first, second, third, fourth, fifth = (turn.conversation for turn in episode.turns)
    assert first == second == third
    assert len({first, fourth, fifth}) == 3
    assert episode.turns[4].origin is not None


# --- tasks and settings --------------------------------------------------------------------------


def test_checks() -> None:
    for name in NAMES:
        assert check_env(load(name)) == []


def test_tasks_are_the_same_in_every_process() -> None:
    for name in ("number_guess", "tictactoe"):
        env = load(name)
        first = env.tasks(0, 8)
        schemes._loaded.cache_clear()
        random.seed(77)
        again = environment_of(env.spec)
        assert again.tasks(0, 8) == first
        assert {task.row["example_id"] for task in env.tasks(1, 100)} == {
            task.row["example_id"] for task in again.tasks(2, 100)
        }


def test_evaluation_has_other_tasks() -> None:
    def questions(env: Environment, column: str) -> set[Any]:
        return {str(task.row[column]) for task in env.tasks(3, 400)}

    sums = load("sums")
    assert len(questions(sums.evaluation(0.5), "question")) == 10
    assert not questions(sums, "question") & questions(sums.evaluation(0.5), "question")
    for share, n in ((None, 4), (0.25, 10), (0.01, 1)):
        env = sums.configure({"evaluates": False, "held_out": share})
        ours, held = (questions(one, "example_id") for one in (env, env.evaluation(0.1)))
        assert (len(ours), len(held)) == (40 - n, n)
        assert not ours & held


def test_arguments_are_settings() -> None:
    env = load("sums")
    assert env.args["env_seed"] == 3
    first, other = env.tasks(0, 4), env.configure({"env_seed": 4}).tasks(0, 4)
    assert [task.row for task in first] != [task.row for task in other]
    assert other[0].args == {"seed": 4}
    assert [task.seed for task in first] == [task.seed for task in other]
    plain = env.configure({"style": "plain", "weights": [2.0, 0], "short": True})
    assert plain.rewards["right"] == 2.0
    assert plain.rewards["brief"] == 0.0
    (task,) = plain.tasks(0, 1)
    (episode,) = group_of(plain, size=1, player=replies(task.row["answer"]))
    assert episode.rewards == {"agent": 2.0}
    assert environment_of(plain.spec).rewards == plain.rewards
    assert plain.configure(None, {"near": 0.1}).configure({"largest": 5}).rewards["near"] == 0.1
    (task,) = env.configure({"options": {"max_seq_len": 12}}).tasks(0, 1)
    assert schemes._loaded(env.id, json.dumps(task.args)).environment.max_seq_len == 12


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ({"larges": 5}, r"env.args.larges: .*no such setting. Did you mean 'largest'"),
        ({"style": "loud"}, "env.args.style .*expected one of 'plain', 'tagged', got 'loud'"),
        ({"weights": [1.0]}, "env.args.weights .*expected 2 values"),
        ({"seed": 5}, "env.args.seed: .*Did you mean 'env_seed'"),
        ({"count": 0}, "could not be loaded|its dataset"),
        ({"options": {"dataset": 1}}, "could not be loaded: TypeError"),
        ({"held_out": 0.2}, "has a dataset for evaluation; leave it out"),
        ({"evaluates": False, "held_out": 1.5}, "held_out=1.5: must lie between 0 and 1"),
    ],
)
def test_settings_that_are_wrong(args: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load("sums").configure(args).tasks(0, 1)


# --- names ---------------------------------------------------------------------------------------


def made(folder: Path, code: str, name: str = "own") -> None:
    start = "import verifiers as vf\nfrom datasets import Dataset\n\ndef zero(state): return 0.0\n"
    (folder / f"{name}.py").write_text(start + textwrap.dedent(code))


def test_names_of_packages_folders_and_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two-sums").mkdir()
    (tmp_path / "two-sums" / "two_sums.py").write_text((HERE / "sums.py").read_text())
    assert load_env(f"verifiers:{tmp_path}/two-sums").name == "two_sums"
    monkeypatch.syspath_prepend(str(tmp_path / "two-sums"))
    for name in ("two-sums", "two_sums", "somebody/two-sums", "somebody/two-sums@0.1.0"):
        env = load_env(f"verifiers:{name}")
        assert env.name == "two_sums"
        assert env.spec.ref == f"verifiers:{name}"
        assert env.tasks(0, 1) == environment_of(env.spec).tasks(0, 1)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("", "'own' has no function load_environment. Tasksets of verifiers' v1"),
        ("1 / 0", "own.py could not be run: ZeroDivisionError"),
        ("def load_environment(): return 3", "returned int, which is no environment"),
        ("def load_environment(): raise OSError('no hub')", "could not be loaded: OSError: no hub"),
        ("def load_environment(): raise SystemExit(2)", "could not be loaded: SystemExit: 2"),
        (
            """
            def load_environment():
                rows = Dataset.from_list([{"question": "?", "answer": ""}])
                return vf.SingleTurnEnv(dataset=rows, score_rollouts=False)
            """,
            "it does not score",
        ),
    ],
)
def test_what_cannot_be_played_says_why(tmp_path: Path, code: str, what: str) -> None:
    made(tmp_path, code)
    with pytest.raises(ConfigError, match=what):
        load_env(f"verifiers:{tmp_path}/own.py")


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"there is no module 'no_such_env'\. Install the env"):
        load_env("verifiers:somebody/no-such-env")


def test_rows_that_are_no_plain_data(tmp_path: Path) -> None:
    made(
        tmp_path,
        """
        import datetime

        def load_environment(day: int):
            rows = [{"question": "?", "when": datetime.date(2020, 1, day)}] * 4
            rubric = vf.Rubric(funcs=[zero])
            return vf.SingleTurnEnv(eval_dataset=Dataset.from_list(rows), rubric=rubric)
        """,
    )
    env = load_env(f"verifiers:{tmp_path}/own.py")
    with pytest.raises(ConfigError, match=r"needs env.args.day, which has no default"):
        env.tasks(0, 1)
    env = env.configure({"day": 2})
    assert env.rewards["zero"] == 1.0
    with pytest.raises(ConfigError, match=r"has a dataset for evaluation only. env.args.held_out"):
        env.tasks(0, 1)
    with pytest.raises(ConfigError, match="column 'when' of its dataset holds"):
        env.evaluation(0.1).tasks(0, 1)


# --- other classes of the library ----------------------------------------------------------------

KINDS = {
    "group": (
        """
        def load_environment():
            rows = Dataset.from_list([{"question": "?", "answer": "4"}] * 4)
            def even(completion): return float(len(completion[-1]["content"]) % 2 == 0)
            def right(completion, answer): return float(answer in completion[-1]["content"])
            envs = [
                vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[even], weights=[3.0])),
                vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[right], weights=[5.0])),
            ]
            return vf.EnvGroup(envs=envs, env_names=["even", "right"])
        """,
        {"reward": 1.0, "even": 0.0, "right": 0.0},
    ),
    "stateful tools": (
        """
        def add(item: str, bag: list) -> str:
            bag.append(item)
            return f"{len(bag)} things"

        class Bag(vf.StatefulToolEnv):
            async def setup_state(self, state):
                state["bag"] = []
                return await super().setup_state(state)
            def update_tool_args(self, tool_name, tool_args, messages, state, **kwargs):
                return {**tool_args, "bag": state["bag"]}

        async def things(state): return float(len(state["bag"]))

        def load_environment():
            rows = Dataset.from_list([{"question": "Pack!", "answer": ""}] * 4)
            env = Bag(dataset=rows, rubric=vf.Rubric(funcs=[things]), max_turns=3)
            env.add_tool(add, args_to_skip=["bag"])
            return env
        """,
        {"things": 1.0, "add_calls": 0.0},
    ),
    "same name twice": (
        """
        def load_environment():
            rows = Dataset.from_list([{"question": "?", "answer": ""}] * 4)
            def long(completion): return float(len(completion[-1]["content"]))
            groups = [vf.Rubric(funcs=[long], weights=[weight]) for weight in (1.0, 2.0)]
            return vf.SingleTurnEnv(dataset=rows, rubric=vf.RubricGroup(rubrics=groups))
        """,
        {"reward": 1.0, "long": 0.0},
    ),
    "no rubric": (
        """
        def load_environment():
            rows = Dataset.from_list([{"question": "?", "answer": ""}] * 4)
            return vf.SingleTurnEnv(dataset=rows)
        """,
        {"num_turns": 0.0},
    ),
    "reasoning-gym": (
        """
        def load_environment():
            return vf.ReasoningGymEnv(gym="leg_counting", num_train_examples=20,
                                      num_eval_examples=5, seed=4)
        """,
        {"check_answer_reward_func": 1.0},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_environments(tmp_path: Path, kind: str) -> None:
    code, weights = KINDS[kind]
    made(tmp_path, code)
    env = load_env(f"verifiers:{tmp_path}/own.py")
    assert {key: env.rewards[key] for key in weights} == weights
    for number in range(4):
        (episode,) = group_of(env, number, size=1, player=replies(call("add", item="x"), "44", "y"))
        assert episode.failure is None, episode.failure
        scores = episode.scores["agent"]
        if kind == "group":
            member = episode.task.row["info"]["env_id"]
            first = episode.turns[0].text
            assert scores["reward"] == {"even": 3.0 * (len(first) % 2 == 0), "right": 0.0}[member]
        if kind == "stateful tools":
            assert (scores["things"], scores["add_calls"], len(episode.turns)) == (1.0, 1.0, 2)
            properties = episode.turns[0].tools[0]["function"]["parameters"]["properties"]
            assert [*properties] == ["item"]
        if kind == "same name twice":
            assert scores["reward"] == 3 * len(episode.turns[0].text)


# --- errors, signals, threads --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guess", "kind", "what"),
    [
        ("13", "infra", "SandboxError: the oracle is down"),
        ("14", "env", "ToolCallError: no such call, caused by KeyError: 'oracle'"),
        ("15", "env", "ZeroDivisionError: a mistake in the environment"),
    ],
)
def test_errors(guess: str, kind: str, what: str) -> None:
    (episode,) = group_of(load("number_guess"), size=1, player=replies(guess, "1"))
    assert episode.failure is not None
    assert episode.failure.kind == kind
    assert what in episode.failure.message


def test_a_conversation_without_room_ends_the_rollout() -> None:
    class Full(ScriptedPlayer):
        async def answer(self, conversation: Any, new: Any, options: Any) -> Any:
            turn = await super().answer(conversation, new, options)
            full = len(conversation.messages) > 2
            return replace(turn, text="", finish="length") if full else turn

    env = load("tictactoe").configure({"max_turns": -1})
    (episode,) = group_of(env, size=1, player=Full(any_reply))
    assert episode.failure is None, episode.failure
    assert episode.facts == {"stop_condition": "prompt_too_long", "is_truncated": True}


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_signal_handlers_stay_and_threads_may_load() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    schemes._loaded.cache_clear()
    assert load("sums").tasks(0, 2)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    schemes._loaded.cache_clear()
    episode = in_thread(lambda: group_of(load("tictactoe"), size=1)[0])
    assert episode.failure is None, episode.failure
    import verifiers.envs.environment as theirs

    assert theirs.signal is signal
