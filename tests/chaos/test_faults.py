"""A process of a run is killed while it goes on; the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rayrl.rollout.records import Records
from rayrl.rollout.resume import TurnLog
from rayrl.run.files import read_jsonl
from tests.runs import (
    ENVS,
    PROGRAMS,
    RANKS,
    STEPS,
    Going,
    command,
    episodes,
    figures,
    rows,
    scraps,
    train,
    weights,
)

pytestmark = pytest.mark.slow

MOMENTS = Path(__file__).parent / "moments"
TWO = ["cluster.replicas=2", "cluster.env_workers=2"]


def workers(driver: int, title: str) -> list[psutil.Process]:
    """The run's processes that Ray calls so: forked from ours, which no other run is meanwhile."""
    found = []
    with suppress(psutil.NoSuchProcess):  # the run is over
        since = psutil.Process(driver).create_time()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                words = " ".join(process.cmdline())
                if words.startswith(f"ray::{title}") and process.create_time() >= since:
                    found.append(process)
    return found


def at(flag: Path, *moments: str) -> dict[str, str]:
    """Variables with which a process is killed at each of the moments that `moments/` knows."""
    path = os.pathsep.join([str(MOMENTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"PYTHONPATH": path, "KILL_AT": ",".join(moments), "KILL_FLAG": str(flag)}
    return {**os.environ, **env}


def assert_same(folder: Path, calm: Path) -> None:
    """No update, episode or version is another than those of a run that was left alone."""
    assert weights(folder) == weights(calm)
    assert episodes(folder) == episodes(calm), "the same games, each with its version"
    assert [row["step"] for row in figures(folder)] == list(range(STEPS))
    assert scraps(folder) == []


def test_whatever_is_killed_it_ends_as_if_uninterrupted(
    tiny: Path, calm: Path, tmp_path: Path
) -> None:
    """The learner again and again, which ends the run; resumed, a replica in a push, a worker, and
    a replica that plays. Every token was made with the weights that its episode claims."""
    folder = tmp_path / "run"
    line = command(tiny, folder, *TWO, "learner.restarts=1")
    with Going(line) as run:
        run.until(lambda: rows(folder) >= 3)
        while run.process.poll() is None:
            for process in workers(run.process.pid, "LearnerRank"):
                process.kill()
            time.sleep(0.05)
        assert run.wait() == 1, run.said
    assert "a learner process died" in run.said
    assert "Run the same command again" in run.said
    with Going(line, at(tmp_path / "killed", "load")) as run:
        run.until(lambda: rows(folder) >= 6)
        workers(run.process.pid, "EnvWorker")[0].kill()
        run.until(lambda: rows(folder) >= 9)
        workers(run.process.pid, "ServeReplica")[0].kill()
        assert run.wait() == 0, run.said
    assert (tmp_path / "killed-load").exists(), "the moment never came"
    assert "Traceback" not in run.said
    assert all(row["mismatch/max"] < 1e-4 for row in figures(folder))
    assert_same(folder, calm)


def test_with_two_ranks_and_streamed_weights_it_ends_as_if_uninterrupted(
    tiny: Path, calm_ranks: Path, tmp_path: Path
) -> None:
    """A replica is killed in a push; then a rank that has its gradients, for which another waits.

    The checkpoint of step 2 is the last before the second.
    """
    folder = tmp_path / "run"
    line = command(tiny, folder, *TWO, *RANKS, "cluster.sync=gloo")
    with Going(line, at(tmp_path / "killed", "receive", "update")) as run:
        assert run.wait() == 0, run.said
    for moment in ("receive", "update"):
        assert (tmp_path / f"killed-{moment}").exists(), "the moment never came"
    assert "a learner process died; restarting it from step 2" in run.said
    assert "Traceback" not in run.said
    assert_same(folder, calm_ranks)


@pytest.mark.parametrize(
    "env", [[f"env.name={ENVS}:team"], [f"env.name={PROGRAMS}:asks", "env.args.file=team"]]
)
def test_branches_survive_a_kill_after_each_turn(
    env: list[str], tiny: Path, tmp_path: Path
) -> None:
    """Of the worker, by the environment or by a program that it runs.

    Which of two parts is recorded first is chance; all else is as if nothing had been.
    """
    calm, folder, killed = tmp_path / "calm", tmp_path / "run", tmp_path / "killed"
    killed.mkdir()
    settings = [*env, "train.steps=8", "train.groups=1", "train.group_size=2"]
    train(tiny, calm, *settings)
    train(tiny, folder, *settings, env={**os.environ, "TEAM_KILLED": str(killed)})
    assert len(list(killed.iterdir())) == 7
    steps = figures(folder)
    assert all(row["branches"] == 4 for row in steps)
    assert all(row["turns"] == 7 for row in steps)
    assert not any(row["turns/replay_mismatches"] for row in steps)
    assert sum(row["turns/replayed"] for row in read_jsonl(folder / "metrics.jsonl")) >= 7
    assert all(row["mismatch/max"] < 1e-4 for row in [*steps, *figures(calm)])
    assert weights(folder) == weights(calm)
    there, here = episodes(calm), episodes(folder)
    for episode in [one for step in (*there.values(), *here.values()) for one in step]:
        episode["turns"].sort(key=lambda turn: (turn.get("conversation", ""), turn["offset"]))
    assert here == there


def test_an_environment_that_hangs_in_c_code_loses_its_process_only(
    tiny: Path, tmp_path: Path
) -> None:
    """Number 3 comes in steps 1 and 2; its four episodes then have every place there is."""
    folder = tmp_path / "run"
    more = ["env.args.fault=stuck", "env.isolated=true", "env.deadline_s=25"]
    more += ["env.failure_budget=0.5", "cluster.concurrency=4", "train.steps=3"]
    train(tiny, folder, *more)
    steps = figures(folder)
    assert [row["failures/env"] for row in steps] == [0, 4, 4]
    assert [row["groups/dropped"] for row in steps] == [0, 1, 1]
    assert [row["episodes"] for row in steps] == [16, 12, 12], "what came after had its places"
    last = episodes(folder)["step_000002.jsonl"]
    failed = [episode["failure"]["message"] for episode in last if "failure" in episode]
    assert len(failed) == 4
    assert all("did not end within 25 s" in message for message in failed)


@pytest.mark.parametrize("lag", [0, 1])
def test_neither_turns_nor_steps_are_lost_with_the_driver(
    lag: int, tiny: Path, calm: Path, tmp_path: Path
) -> None:
    """Half of the fourth batch's episodes are in their second turn when it is killed.

    There is no checkpoint yet: the steps before are learned again from what was played.
    """
    folder, closed = tmp_path / "run", tmp_path / "closed"
    line = command(tiny, folder, f"train.max_lag={lag}", "run.checkpoint_every=5")
    with Going(line, {**os.environ, "TALK_CLOSED": str(closed)}) as run:
        run.until(lambda: closed.is_file() and closed.stat().st_size == 8 * (1 + lag))
        log = folder / "groups" / "turns.log"
        run.until(lambda: recorded(log, tmp_path).count(1) >= 8 * (1 + lag))
        before = episodes(folder)
        assert len(before) == 3
        run.process.kill()
    assert not (folder / "model").exists()
    with Going(line) as run:
        assert run.wait() == 0, run.said
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not any(row["turns/replay_mismatches"] for row in steps)
    again = sum(row["turns/replayed"] for row in steps)
    after = episodes(folder)
    assert {step: after[step] for step in before} == before
    ids = [episode["id"].split("/")[0].split("~")[0] for step in after.values() for episode in step]
    assert sorted(set(ids)) == sorted(f"{s}-{k}" for s in range(STEPS) for k in range(4))
    assert all(ids.count(name) == 4 for name in set(ids)), "a group has four episodes"
    if lag:  # some may have become too old before their batch was closed, and are played again
        assert again > 0
        assert max(row["lag/max"] for row in steps) == 1, "it played while it learned"
    else:
        assert again >= 8, "and those of others that had not ended"
        assert figures(folder) == figures(calm)
        assert_same(folder, calm)
    assert scraps(folder) == []


def recorded(file: Path, scratch: Path) -> list[int]:
    """How many turns a recorder has written down of each episode whose group has not ended.

    It may be writing: what is read is a copy, whose torn end is cut off.
    """
    log = TurnLog()
    records = Records(Path(shutil.copy(file, scratch / "turns.copy")))
    for turns, over in records.read():
        for episode, attempt, turn in turns:
            log.add(episode, attempt, turn)
        for group in over:
            log.remove(group)
    records.close()
    return [len(begun.turns) for begun in log.partial_episodes(list(log.groups)).values()]
