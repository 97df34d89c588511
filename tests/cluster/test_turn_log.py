"""Turns of live episodes, and the file that brings them back to another process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from rayrl.cluster.workers import turn_log
from rayrl.cluster.workers.turn_log import RecordedTurns, Recorder
from rayrl.rollout.resume import PartialEpisode
from rayrl.types import Turn, VersionSpan

Make = Callable[[Path], Recorder]


@pytest.fixture
def recorders() -> Iterator[Make]:
    """Makes recorders, as other processes would: the files of all stay open until the end."""
    made: list[Recorder] = []

    def make(file: Path) -> Recorder:
        made.append(Recorder(file))
        return made[-1]

    yield make
    for one in made:
        if one._records is not None:
            one._records.close()


def turn(text: str, version: int = 0) -> Turn:
    return Turn("agent", (), text, "stop", versions=(VersionSpan(version, 0, 1),))


def remote(recorder: Recorder) -> Any:
    """As if it were an actor; dead once its `dead` is set."""
    actor = SimpleNamespace(dead=False)

    async def found(groups: list[str]) -> dict[str, PartialEpisode]:
        if actor.dead:
            raise RayActorError
        return recorder.partial_episodes(groups)

    async def groups() -> set[str]:
        return recorder.groups()

    actor.partial_episodes = SimpleNamespace(remote=found)
    actor.groups = SimpleNamespace(remote=groups)
    actor.discard = SimpleNamespace(remote=recorder.discard)
    return actor


def test_another_recorder_goes_on_with_what_has_not_ended(tmp_path: Path, recorders: Make) -> None:
    file = tmp_path / "groups" / "turns.log"
    first = recorders(file)
    first.add([("a/0", 0, turn("1")), ("b/0", 0, turn("2")), ("a/0", 0, turn("3"))])
    first.add([("a/0", 1, turn("1"))])  # begun again: what was of attempt 0 is void
    first.discard(["b"])
    second = recorders(file)
    assert second.groups() == {"a"}
    assert second.partial_episodes(["a", "b"]) == {"a/0": PartialEpisode((turn("1"),), attempt=2)}
    whole = file.stat().st_size
    with file.open("ab") as out:
        out.write(b"\0\0\1\0half")  # killed while it wrote
    third = recorders(file)
    assert third.partial_episodes(["a"]) == second.partial_episodes(["a"])
    assert file.stat().st_size == whole
    third.discard(["a"])
    assert file.stat().st_size == 0, "nothing is live"


def test_its_file_is_written_anew_without_what_has_ended(
    tmp_path: Path, recorders: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_log, "COMPACT_AT", 10_000)
    file = tmp_path / "turns.log"
    one = recorders(file)
    one.add([("long/0", 0, turn("stays"))])
    for k in range(100):
        one.add([(f"{k}/0", 0, turn("x" * 1000))])
        one.discard([str(k)])
        assert file.stat().st_size < 13_000
    assert recorders(file).partial_episodes(["long", "99"]) == {
        "long/0": PartialEpisode((turn("stays"),), attempt=1)
    }
    assert list(tmp_path.iterdir()) == [file]


def test_without_space_it_goes_on_in_memory(
    tmp_path: Path, recorders: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = recorders(tmp_path / "turns.log")
    one.add([("a/0", 0, turn("1"))])
    records = one._records
    assert records is not None

    def full(record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "add", full)
    one.add([("a/0", 0, turn("2"))])
    one.add([("a/0", 0, turn("3"))])
    assert [t.text for t in one.partial_episodes(["a"])["a/0"].turns] == ["1", "2", "3"]
    records.close()


async def test_episodes_resume_from_what_this_driver_and_an_earlier_one_have_recorded() -> None:
    recorder = Recorder()
    for name in ("old", "void"):
        recorder.add([(f"{name}/0", 0, turn("1", version=3)), (f"{name}/0", 0, turn("2", 4))])
    turns = RecordedTurns(actor := remote(recorder))
    await turns.open()
    turns.discard(["void"])
    recorder.add([("new/0", 0, turn("1", version=4)), ("fresh/0", 0, turn("1"))])
    groups = ["new", "old", "void", "fresh"]
    assert await turns.find(["new"], groups, version=3) == {
        "new/0": PartialEpisode((turn("1", 4),), attempt=1),
        "old/0": PartialEpisode((turn("1", 3),), attempt=1),  # no turn of newer weights
    }
    assert await turns.find([], groups, version=3) == {}, "they have begun with this driver"
    assert [*await turns.find(["old"], ["old"], version=4)] == ["old/0"]
    actor.dead = True
    assert await turns.find(["old"], ["old"], version=4) == {}, "it starts over"
