from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import Agent, Scores, load_env
from rayrl.chat.renderer import Chat
from rayrl.chat.tools import format_call
from rayrl.commands import sft
from rayrl.commands.sft import batch_indices, load_rows, rows_of
from rayrl.config import Config, from_dict
from rayrl.errors import ConfigError, DataError, InfraError
from rayrl.learner.batch import Batch
from rayrl.rollout.episode_io import read_episodes, write_episodes
from rayrl.rollout.players import PolicyPlayer, ScriptedPlayer
from rayrl.rollout.rollout import play_group
from rayrl.run.folder import RunDir
from rayrl.types import Episode, Failure, Origin, Sampling, Task, Turn, system, user
from tests.act import CHATML, HERMES, Instant, build_tokenizer, chat
from tests.replicas import Replicas
from tests.tiny import save_tiny_model


def config(data: Path | str, **sections: Any) -> Config:
    base = {"env": {"name": "tictactoe"}, "sft": {"data": str(data)}}
    return from_dict({**base, **sections})


async def games(n: int) -> list[Episode]:
    """Games of the scripted teacher."""
    env = load_env("tictactoe")
    player = {"agent": ScriptedPlayer(env.players["teacher"])}
    tasks = env.tasks(seed=5, n=n)
    groups = [await play_group(env, t, player, id=f"g{k}", size=1) for k, t in enumerate(tasks)]
    return [group.episodes[0] for group in groups]


# --- which rows a batch has ----------------------------------------------------------------------


def test_batches_go_through_one_shuffle_after_another() -> None:
    n, size, seed = 10, 4, 7
    seen = [i for step in range(5) for i in batch_indices(n, size, step, seed)]
    assert sorted(seen[:10]) == list(range(10))  # the first epoch
    assert sorted(seen[10:]) == list(range(10))  # the second, from the middle of a batch on
    assert seen[:10] != seen[10:]
    assert batch_indices(n, size, 3, seed) == seen[12:16]  # a function of the step alone


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert Counter(batch_indices(3, 7, 0, seed=0)).most_common()[-1][1] == 2
    assert len(batch_indices(3, 7, 5, seed=0)) == 7
    assert batch_indices(3, 3, 0, seed=0) != batch_indices(3, 3, 0, seed=2)


# --- ids and masks -------------------------------------------------------------------------------


async def test_a_row_has_the_ids_that_playing_it_gives() -> None:
    """The same words said by a policy and by a script end up as the same training row."""
    from rayrl.learner.batch import make_batch

    (scripted,) = await games(1)
    replies = iter([turn.text for turn in scripted.turns])

    class Repeats(Instant):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            self.replies = [chat().reply(next(replies))]
            return await super().generate(request)

    policy = PolicyPlayer(chat(), Repeats(chat(), [""]), Sampling(max_tokens=99))
    env = load_env("tictactoe")
    group = await play_group(env, scripted.task, {"agent": policy}, id="g", size=1)
    played = make_batch([group], [{(0, "agent"): [1.0] * len(scripted.turns)}]).rows[0]

    (row,) = rows_of(scripted, ["agent"], chat())
    assert row.ids.tolist() == played.ids.tolist()
    assert row.loss_mask.tolist() == played.loss_mask.tolist()


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def negate(a: int) -> int:
    """Change the sign."""
    return -a


@rayrl.env(tasks=[Task()], rewards={"right": 1.0})
async def sums(task: Task, agent: Agent) -> Scores:
    await agent([system("be brief"), user("Ready?")])
    await agent("1 + 2?", tools=[add])
    return {"right": float(await agent("and its negative?", tools=[add, negate]) == "-3")}


CALLS = [
    "yes",
    format_call("add", {"a": 1, "b": 2}),
    "3",
    format_call("negate", {"a": 3}),
    "-3",
]


@pytest.mark.parametrize("template", [CHATML, HERMES])
async def test_tools_are_in_the_prompts_as_in_play(tmp_path: Path, template: str) -> None:
    talk = Chat(build_tokenizer(template))
    replies = iter(CALLS)
    teacher = {"agent": ScriptedPlayer(lambda messages, rng: next(replies))}
    shown = await play_group(sums, Task(), teacher, id="g", size=1)
    write_episodes(tmp_path / "d.jsonl", shown.episodes)
    (scripted,) = read_episodes(tmp_path / "d.jsonl")
    assert [[t["function"]["name"] for t in turn.tools] for turn in scripted.turns] == [
        [],
        *[["add"]] * 2,
        *[["add", "negate"]] * 2,
    ]
    (row,) = rows_of(scripted, ["agent"], talk)

    said = iter(CALLS)

    class Repeats(Instant):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            self.replies = [talk.reply(next(said))]
            return await super().generate(request)

    policy = PolicyPlayer(talk, Repeats(talk, [""]), Sampling(max_tokens=99))
    played = await play_group(sums, Task(), {"agent": policy}, id="g", size=1)
    turns = played.episodes[0].turns
    assert row.ids.tolist() == [i for t in turns for i in (*t.prompt_ids, *t.completion_ids)]
    assert "Change the sign." in talk.tokenizer.decode(row.ids)


async def test_the_loss_is_on_replies_and_their_end_of_turn() -> None:
    (one,) = await games(1)
    (row,) = rows_of(one, ["agent"], chat())
    learned = row.ids[row.loss_mask].tolist()
    end = chat().stop_ids[0]
    texts = [chat().text(part) for part in split_after(learned, end)]
    assert texts == [turn.text for turn in one.turns]
    (everything,) = rows_of(one, ["agent"], chat(), loss_on_all=True)
    assert everything.n_loss == len(row.ids) - 1  # nothing predicts the first id


def split_after(ids: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        parts[-1].append(i)
        if i == end:
            parts.append([])
    assert parts[-1] == []
    return parts[:-1]


def test_what_branches_share_is_learned_once() -> None:
    def turn(text: str, name: str = "", after: int = 0, *, empty: bool = False) -> Turn:
        origin = Origin("", after, empty) if after else None
        return Turn("agent", (user("?"),), text, "stop", conversation=name, origin=origin)

    turns = [turn("a"), turn("b"), turn("c", "/1", 1), turn("d", "/2", 2), turn("e", "/3", 2)]
    turns.append(turn("f", "/4", 2, empty=True))
    one = Episode("g/0", "e", Task(), 0, tuple(turns), {"agent": {}}, {"agent": 1.0})
    for whole in (False, True):
        rows = rows_of(one, ["agent"], chat(), loss_on_all=whole)
        learned = [re.findall(r"\b[a-f]\b", chat().text(row.ids[row.loss_mask])) for row in rows]
        assert learned == [["a", "c"], ["b", "d"], ["e"], ["f"]]
        read = [re.findall(r"\b[a-f]\b", chat().text(row.ids)) for row in rows]
        assert read == [["a", "c"], ["a", "b", "d"], ["a", "b", "e"], ["f"]]


# --- the data file -------------------------------------------------------------------------------


async def test_rows_of_a_file(tmp_path: Path) -> None:
    played = await games(6)
    failed = Episode("f", "tictactoe", Task(), 0, (), failure=Failure("env", "broke"))
    write_episodes(tmp_path / "d.jsonl", [*played, failed])
    rows = load_rows(config(tmp_path / "d.jsonl"), chat())
    assert [row.id for row in rows] == [f"{e.id}/agent/0" for e in played]
    assert all(row.n_loss > 0 for row in rows)


async def test_only_the_seats_of_the_policy_are_learned(tmp_path: Path) -> None:
    env = load_env("tictactoe_versus")
    players = {seat: ScriptedPlayer(env.players["random"]) for seat in env.seats}
    group = await play_group(env, env.tasks(seed=1, n=1)[0], players, id="g", size=1)
    write_episodes(tmp_path / "d.jsonl", group.episodes)
    seats = {"x": "policy", "o": "player:optimal"}
    both = load_rows(config(tmp_path / "d.jsonl", env={"name": "tictactoe_versus"}), chat())
    named = {"name": "tictactoe_versus", "seats": seats}
    one = load_rows(config(tmp_path / "d.jsonl", env=named), chat())
    assert sorted(row.id for row in both) == ["g/0/o/0", "g/0/x/0"]
    assert [row.id for row in one] == ["g/0/x/0"]
    wrong = {"name": "tictactoe_versus", "seats": {"y": "policy"}}
    with pytest.raises(ConfigError, match=r"env.seats.y: .* has no such seat"):
        load_rows(config(tmp_path / "d.jsonl", env=wrong), chat())


async def test_a_conversation_too_long_for_the_model_is_named(tmp_path: Path) -> None:
    write_episodes(tmp_path / "d.jsonl", await games(1))
    with pytest.raises(DataError, match=r"d\.jsonl: g0/0/agent/0 has \d+ ids.*positions for 20"):
        load_rows(config(tmp_path / "d.jsonl"), chat(), longest=20)
    with pytest.raises(DataError, match=r"a conversation can have 20; .*raise engine\.max_len"):
        load_rows(config(tmp_path / "d.jsonl", engine={"max_len": 20}), chat(), longest=20)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("", "no reply to learn from"),
        ("\n{\n", r"d\.jsonl:2: not valid JSON"),
        ('{"id": "a"}\n', r"d\.jsonl:1: an episode needs the key"),
    ],
)
def test_a_bad_file_names_file_and_line(tmp_path: Path, lines: str, complaint: str) -> None:
    (tmp_path / "d.jsonl").write_text(lines)
    with pytest.raises(DataError, match=complaint):
        load_rows(config(tmp_path / "d.jsonl"), chat())


def test_no_data_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rayrl synth"):
        load_rows(config(""), chat())
    with pytest.raises(DataError, match=r"none\.jsonl"):
        load_rows(config(tmp_path / "none.jsonl"), chat())


def test_rows_survive_the_file(tmp_path: Path) -> None:
    """What synth writes is text only: a scripted episode has no ids in its file."""
    one = Episode(
        "e",
        "g",
        Task(),
        0,
        (Turn("agent", (user("a"),), "ok", "stop"),),
        {"agent": {"s": 1.0}},
        {"agent": 1.0},
    )
    write_episodes(tmp_path / "d.jsonl", [one])
    assert "prompt_ids" not in json.loads((tmp_path / "d.jsonl").read_text())["turns"][0]
    (row,) = load_rows(config(tmp_path / "d.jsonl"), chat())
    (direct,) = rows_of(one, ["agent"], chat())
    assert row.ids.tolist() == direct.ids.tolist()


# --- chats ---------------------------------------------------------------------------------------

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2?"}]
SAID = {"role": "assistant", "content": "3"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def write_chats(file: Path, *rows: Any) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_a_chat_becomes_what_the_same_episode_becomes(tmp_path: Path) -> None:
    more = [{"role": "user", "content": [{"type": "text", "text": "And 2 + 2?"}]}, SAID]
    file = write_chats(tmp_path / "d.jsonl", {"messages": [*ASKED, SAID, *more], "id": 7})
    turns = (
        Turn("agent", (system("Be brief."), user("1 + 2?")), "3", "stop"),
        Turn("agent", (user("And 2 + 2?"),), "3", "stop"),
    )
    (wanted,) = rows_of(Episode("e", "g", Task(), 0, turns), ["agent"], chat())
    (row,) = load_rows(config(file), chat())
    assert row.ids.tolist() == wanted.ids.tolist()
    assert row.loss_mask.tolist() == wanted.loss_mask.tolist()
    assert row.id == f"{file}:1"
    (everything,) = load_rows(config(file, sft={"data": str(file), "loss_on": "all"}), chat())
    assert everything.n_loss == len(row.ids) - 1


def test_a_chat_with_tools(tmp_path: Path) -> None:
    called = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    call = {"id": "c1", "type": "function", "function": called}
    talk = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        SAID,
    ]
    file = write_chats(tmp_path / "d.jsonl", {"messages": talk, "tools": [TOOL]})
    talker = Chat(build_tokenizer(HERMES))
    (row,) = load_rows(config(file), talker)
    text = talker.tokenizer.decode(row.ids[row.loss_mask])
    assert format_call("add", {"a": 1, "b": 2}) in text
    assert "<tool_response>" in talker.tokenizer.decode(row.ids)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"message": []},
            r"d\.jsonl:2: there is no column 'messages', only message\. Did you mean",
        ),
        ({"messages": "hi"}, r"d\.jsonl:2: column 'messages' must be a list of messages, got \"hi"),
        ({"messages": []}, r"d\.jsonl:2: column 'messages' must be a list of messages"),
        ({"messages": ASKED}, r"d\.jsonl:2: column 'messages' must end with a reply"),
        ({"messages": [SAID]}, r"d\.jsonl:2: .*message 1 is a reply to nothing"),
        ({"messages": [*ASKED, SAID, SAID]}, r"message 4 is a reply to nothing"),
        ({"messages": [{"role": "bot", "content": ""}]}, r"message 1 must have a role \(system,"),
        ({"messages": [{"role": "user"}]}, r"message 1 must have text as its content"),
        (
            {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            r"message 3: tool call 1 must have a function with a name",
        ),
        ({"messages": [{**SAID, "tool_calls": 5}]}, r"message 1: its tool_calls must be a list"),
        ({"messages": [{**SAID, "tool_calls": {"name": "a"}}]}, "tool_calls must be a list, got"),
        (
            {"messages": [{**SAID, "tool_calls": [{"name": "a", "arguments": "{"}]}]},
            r"tool call 1: its arguments are not JSON",
        ),
        (
            {"messages": [{**SAID, "tool_calls": [{"name": "a", "arguments": [1]}]}]},
            r"tool call 1: its arguments must be an object",
        ),
        ({"messages": [*ASKED, SAID], "tools": [add.__name__]}, r"d\.jsonl:2: column 'tools' must"),
    ],
)
def test_bad_chats_name_file_and_line(tmp_path: Path, row: Any, complaint: str) -> None:
    file = write_chats(tmp_path / "d.jsonl", {"messages": [*ASKED, SAID]}, row)
    with pytest.raises(DataError, match=complaint):
        load_rows(config(file), chat())


def test_a_chat_too_long_for_the_model_is_named(tmp_path: Path) -> None:
    file = write_chats(tmp_path / "d.jsonl", {"messages": [*ASKED, SAID]})
    with pytest.raises(DataError, match=r"d\.jsonl:1 has \d+ ids.*positions for 5"):
        load_rows(config(file), chat(), longest=5)


# --- the loop ------------------------------------------------------------------------------------


class Stopped(BaseException):
    """What kill -9 looks like from inside."""


@pytest.fixture
def learner_here(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The plain learner in this process; `dies` is after how many steps it takes the run down."""
    fate = {"dies": 10**9, "steps": 0, "plays": 10**9, "exports": 10**9, "pushed": -1, "awake": 0}

    class Here:
        def __init__(self, cfg: Config, total: int) -> None:
            from rayrl.learner.reference import ReferenceLearner

            self.learner = ReferenceLearner(cfg, cfg.model.path, total_steps=total)

        async def sft_step(self, batch: Batch) -> dict[str, float]:
            if fate["steps"] >= fate["dies"]:
                raise Stopped
            assert not fate["awake"]
            fate["steps"] += 1
            return self.learner.sft_step(batch.rows, batch.totals)

        async def save(self, folder: Path) -> None:
            self.learner.save(folder)

        async def load(self, folder: Path) -> None:
            self.learner.load(folder)

        async def export(self, folder: Path) -> None:
            if not fate["exports"]:
                raise Stopped
            fate["exports"] -= 1
            self.learner.export(folder)

    class Weights:
        """Pushes are counted; replicas take none beside the learner's work."""

        def reset(self) -> None: ...

        async def push(self, version: int) -> None:
            assert version > fate["pushed"]
            fate.update(pushed=version, awake=1)

        async def sleep_replicas(self) -> None:
            fate["awake"] = 0

    @asynccontextmanager
    async def open_here(cfg: Config, total: int) -> AsyncIterator[Here]:
        yield Here(cfg, total)

    @asynccontextmanager
    async def open_playing(
        cfg: Config, total: int
    ) -> AsyncIterator[tuple[Replicas, Here, Weights]]:
        fate["pushed"] = -1
        replicas = Replicas(stop_after=fate["plays"], score=lambda version, k: k + min(version, 4))
        yield replicas, Here(cfg, total), Weights()

    monkeypatch.setattr(sft, "open_learners", open_here)
    monkeypatch.setattr(sft, "open_cluster", open_playing)
    return fate


def written(run: Path) -> tuple[bytes, list[dict[str, float]]]:
    """The model, and the metrics without times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    untimed = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]
    return (run / "model" / "model.safetensors").read_bytes(), untimed


async def test_a_killed_run_ends_as_if_it_had_not_stopped(
    tmp_path: Path, learner_here: dict[str, int]
) -> None:
    write_episodes(tmp_path / "d.jsonl", await games(6))
    model = save_tiny_model(tmp_path / "model")

    def cfg(name: str) -> Config:
        return config(
            tmp_path / "d.jsonl",
            run={"dir": str(tmp_path / name), "name": "same", "checkpoint_every": 2},
            model={"path": str(model)},
            learner={"kind": "reference", "lr": 0.01, "schedule": "cosine"},
            sft={"data": str(tmp_path / "d.jsonl"), "steps": 7, "batch_size": 4},
        )

    async def whole(name: str) -> None:
        with RunDir(tmp_path / name, cfg(name)) as folder:
            await sft._fine_tune(cfg(name), folder)

    await whole("unbroken")
    learner_here.update(steps=0, dies=5)  # after the checkpoint of step 4
    with pytest.raises(Stopped):
        await whole("killed")
    learner_here.update(steps=0, dies=10**9)
    await whole("killed")
    assert learner_here["steps"] == 3  # steps 4, 5 and 6

    weights, rows = written(tmp_path / "unbroken")
    assert written(tmp_path / "killed") == (weights, rows)
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert weights != (model / "model.safetensors").read_bytes()
    assert (tmp_path / "killed" / "model" / "tokenizer.json").is_file()


async def test_evaluations_between_updates(tmp_path: Path, learner_here: dict[str, int]) -> None:
    """Each version up to 4 wins more in every task: 6 and 8 make two without progress, of 20.

    Killed in the evaluation of version 4, in step 6 and while it writes the model, it ends as if it
    had not been.
    """
    write_episodes(tmp_path / "d.jsonl", await games(6))
    model = save_tiny_model(tmp_path / "model")

    async def whole(name: str, dies: int = 10**9, plays: int = 10**9, exports: int = 10**9) -> None:
        learner_here.update(steps=0, dies=dies, plays=plays, exports=exports)
        cfg = config(
            tmp_path / "d.jsonl",
            run={"dir": str(tmp_path / name), "name": "same", "keep_best": "eval/win"},
            model={"path": str(model)},
            learner={"kind": "reference", "lr": 0.01},
            eval={"every": 2, "episodes": 4, "exhaustive": False},
            sft={
                "data": str(tmp_path / "d.jsonl"),
                "steps": 20,
                "batch_size": 4,
                "stop_when": "eval/win not improved for 2",
            },
        )
        cfg = replace(cfg, run=replace(cfg.run, checkpoint_every=3))
        with RunDir(tmp_path / name, cfg, verb="sft") as folder:
            await sft._fine_tune(cfg, folder)

    await whole("unbroken")
    with pytest.raises(InfraError):
        await whole("killed", plays=4 + 4 + 2)
    assert learner_here["steps"] == 4
    with pytest.raises(Stopped):
        await whole("killed", dies=3)  # goes on after the checkpoint of step 3
    with pytest.raises(Stopped):
        await whole("killed", exports=0)
    assert learner_here["steps"] == 2
    await whole("killed")
    assert learner_here["steps"] == 0

    weights, rows = written(tmp_path / "unbroken")
    assert written(tmp_path / "killed") == (weights, rows)
    assert [row.get("eval/win") for row in rows] == [None, 3.5, None, 5.5, None, 5.5, None, 5.5]
    assert (rows[0]["eval_start/win"], rows[3]["eval/win/gain"]) == (1.5, 4.0)
    for run in ("unbroken", "killed"):
        result = json.loads((tmp_path / run / "result.json").read_text())
        assert (result["steps"], result["stopped"]) == (8, True)
        assert result["best"] == {"model": "model_best", "version": 4, "eval/win": 5.5}
    best = [tmp_path / run / "model_best" / "model.safetensors" for run in ("unbroken", "killed")]
    assert best[0].read_bytes() == best[1].read_bytes() != weights
