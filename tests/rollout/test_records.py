"""Record files: damage is cut off or reported, and nothing in a file is executed."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.errors import DataError
from rayrl.rollout.records import (
    Records,
    group_from_bytes,
    group_to_bytes,
    pack,
    turn_from_bytes,
    turn_to_bytes,
    unpack,
)
from rayrl.run.group_log import GroupLog, Played
from rayrl.types import (
    Episode,
    Failure,
    Group,
    Message,
    Origin,
    Task,
    ToolCall,
    Turn,
    Usage,
    VersionSpan,
)

WRITTEN = [["first", 1], {"second": b"\0" * 30}, ["third", None]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    records = Records(tmp_path / "some.log")
    for one in WRITTEN:
        records.add(one)
    records.close()
    return records.file


@pytest.fixture
def ends(tmp_path: Path) -> list[int]:
    """Offsets at which the records end."""
    records = Records(tmp_path / "other.log")
    found = []
    for one in WRITTEN:
        records.add(one)
        found.append(records.size)
    records.close()
    return found


def read(file: Path) -> list[Any]:
    records = Records(file)
    try:
        return records.read()
    finally:
        records.close()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize(
    "tail", [b"\0" * 4096, b"\0", b"garbage", b"rec\x01", b"rec\x01\0\0\0\1\0\0\0\0x", b"\xff" * 99]
)
def test_data_after_the_last_intact_record_is_cut_off(
    file: Path, tail: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole + tail)
    assert read(file) == WRITTEN
    assert file.read_bytes() == whole
    assert f"some.log: the last {len(tail)} bytes" in capsys.readouterr().err
    assert read(file) == WRITTEN
    assert capsys.readouterr().err == ""


def test_every_truncation_and_flipped_bit_is_detected(file: Path, ends: list[int]) -> None:
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at])
        assert read(file) == WRITTEN[: sum(end <= at for end in ends)]
        file.write_bytes(flipped(whole, at))
        damaged = sum(end <= at for end in ends)
        if damaged == len(ends) - 1:  # the last one
            assert read(file) == WRITTEN[:-1]
        else:
            begin = ends[damaged - 1] if damaged else 0
            with pytest.raises(DataError, match=f"some.log, byte {begin}: .*remove the file"):
                read(file)
            assert len(file.read_bytes()) == len(whole), "an error changes nothing"


class _Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["step_000000.log", "turns.log"])
def test_a_pickle_is_not_read(tmp_path: Path, name: str) -> None:
    run = tmp_path / "was-run"
    body = pickle.dumps(_Evil(run), pickle.HIGHEST_PROTOCOL)
    (tmp_path / name).write_bytes(struct.pack(">I", len(body)) + body)
    log = GroupLog(tmp_path)
    with pytest.raises(DataError, match=f"{name}, byte 0: a pickle"):
        log.read(0) if name != "turns.log" else read(log.turns)
    log.close()
    assert not run.exists()


def test_a_record_of_another_structure_is_reported(tmp_path: Path) -> None:
    records = Records(tmp_path / "step_000000.log")
    records.add(["played", 0, pack({"not": "a group"})])
    records.close()
    log = GroupLog(tmp_path)
    with pytest.raises(DataError, match=r"step_000000.log: .*remove the file"):
        log.read(0)
    log.close()


def everything() -> Turn:
    call = ToolCall("c", "add", {"x": 10**40, "y": [1.5, None, {"z": float("inf")}]})
    prompt = (Message("assistant", "hm \ud83d", (call,)), Message("tool", "é", (), "c"))
    spans = (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2))
    tools = ({"function": {"name": "add", "parameters": {"required": ["x"]}}},)
    usage = Usage(2, 1, 30, 4, None, 6)
    sampled = (3, 4), (-0.1, -1e-300)
    return Turn(
        *("a", prompt, "t", "stop", 3, (1, 2), *sampled, spans, "s", tools, usage, 1e9, 2.5),
        *("c", Origin("", 1, 2), 0.7),
    )


def test_a_turn_and_a_group_round_trip() -> None:
    turn = everything()
    assert turn_from_bytes(turn_to_bytes(turn)) == turn
    assert turn_from_bytes(turn_to_bytes(turn)).began == turn.began
    failed = Failure("env", "why", "where")
    task = Task(seed=2**63 - 1)
    episodes = (
        Episode(
            "g/0",
            "e",
            task,
            0,
            (turn, turn),
            {"a": {"s": 0.5}},
            {"a": 0.5},
            replayed=2,
            facts={"n": 10**40},
        ),
        Episode(
            "g/1", "e", Task(seed=2), 1, (), failure=failed, retried_usage=Usage(), seconds=2.5
        ),
    )
    group = Group("g", task, episodes, ("a", "b"))
    back = group_from_bytes(group_to_bytes(group))
    assert back == group
    assert [one.replayed for one in back.episodes] == [2, 0]
    assert back.episodes[1].seconds == 2.5


numbers = st.integers(0, 2**40)


@settings(max_examples=60)
@given(
    text=st.text(st.characters(codec=None)),
    ids=st.lists(numbers),
    logprobs=st.lists(st.floats(allow_nan=False)),
    arguments=st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    ),
)
def test_any_turn_round_trips(
    text: str, ids: list[int], logprobs: list[float], arguments: dict[str, Any]
) -> None:
    said = (Message("assistant", text, (ToolCall(text, "f", arguments),)),)
    turn = Turn("a", said, text, "length", 0, tuple(ids), tuple(ids), tuple(logprobs))
    assert turn_from_bytes(turn_to_bytes(turn)) == turn


def test_plain_data_round_trips() -> None:
    data = {"a": [1, 2.5, None, True, b"\xff", "\ud83d"], 3: {}}
    assert unpack(pack(data)) == data


@pytest.fixture
def log(tmp_path: Path) -> Iterator[GroupLog]:
    one = GroupLog(tmp_path)
    yield one
    one.close()


def test_a_group_log_that_ends_with_zeros(log: GroupLog, tmp_path: Path) -> None:
    """After a power cut the file has its new size, but its last page is not on disk."""
    first = Played(0, Group("0-0", Task(seed=1), ()))
    log.begin(0, [first])
    with (tmp_path / "step_000000.log").open("ab") as out:
        out.write(b"\0" * 4096)
    assert log.read(0) == [first]
    log.add(first)
    assert log.read(0) == [first, first]


def test_groups_that_were_logged_before_episodes_had_facts() -> None:
    group = Group("g", Task(seed=1), (Episode("g/0", "e", Task(seed=1), 0, (), seed=7),))
    name, task, seats, episodes = unpack(group_to_bytes(group))
    assert group_from_bytes(pack([name, task, seats, [one[:-1] for one in episodes]])) == group


def test_turns_that_were_logged_before_conversations_branched() -> None:
    turn = Turn("agent", (Message("user", "a"),), "b", "stop", 3, (1,), (2,), (-0.5,), state="s")
    values = [*unpack(turn_to_bytes(turn))]
    assert turn_from_bytes(pack(values[:14])) == turn
    assert turn_from_bytes(pack(values[:16])) == turn, "nor had a temperature"
