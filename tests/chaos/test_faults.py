"""A process of a run is killed while it goes on; the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rayrl.durable import TurnLog
from rayrl.records import Records
from tests.apart import Shared
from tests.runs import (
    ENVS,
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
LONG = ["train.steps=8", "sampling.max_tokens=48", "cluster.replicas=2", "cluster.env_hosts=2"]


@pytest.fixture(scope="session")
def unbroken(tiny: Path, shared: Shared) -> Path:
    return shared("unbroken-long", lambda folder: train(tiny, folder, *LONG))


def workers(driver: int, title: str) -> list[psutil.Process]:
    """The run's processes that Ray calls so."""
    found = []
    with suppress(psutil.NoSuchProcess):  # the run is over
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(f"ray::{title}"):
                    found.append(process)
    return found


def killing(tiny: Path, folder: Path, kill: Callable[[int], None], *more: str) -> Going:
    """A whole run, with `kill(driver)` after its third step."""
    with Going(command(tiny, folder, *LONG, *more)) as run:
        run.until(lambda: rows(folder) >= 3)
        kill(run.process.pid)
        run.wait()
    return run


def one(title: str) -> Callable[[int], None]:
    def kill(driver: int) -> None:
        os.kill(workers(driver, title)[0].pid, signal.SIGKILL)

    return kill


def test_an_env_host_is_killed(tiny: Path, unbroken: Path, tmp_path: Path) -> None:
    run = killing(tiny, tmp_path / "run", one("EnvHost"))
    assert run.process.returncode == 0, run.said
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("moment", "more"), [("load", []), ("receive", ["cluster.sync=gloo"])], ids=["flat", "streamed"]
)
def test_a_replica_is_killed_in_the_middle_of_a_push(
    moment: str, more: list[str], tiny: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = at(moment, tiny, tmp_path, *LONG, *more)
    assert_same(tmp_path / "run", unbroken)
    assert "Traceback" not in run.said


def test_a_learner_rank_is_killed_in_the_middle_of_an_update(tiny: Path, tmp_path: Path) -> None:
    """Rank 1 has its gradients; rank 0 waits for it. The checkpoint of step 2 is the last."""
    ranks = [*LONG, "learner.kind=deepspeed", "learner.world_size=2"]
    run = at("update", tiny, tmp_path, *ranks)
    assert "a learner process died; it starts again from step 2" in run.said
    train(tiny, tmp_path / "calm", *ranks)
    assert_same(tmp_path / "run", tmp_path / "calm")


def at(moment: str, tiny: Path, tmp_path: Path, *more: str) -> Going:
    """A whole run, with a process killed at a moment that `moments/` knows."""
    path = os.pathsep.join([str(MOMENTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    flag = tmp_path / "killed"
    env = {**os.environ, "PYTHONPATH": path, "KILL_AT": moment, "KILL_FLAG": str(flag)}
    with Going(command(tiny, tmp_path / "run", *more), env) as run:
        assert run.wait() == 0, run.said
    assert flag.exists(), "the moment never came"
    return run


def assert_same(folder: Path, calm: Path) -> None:
    """No update, episode or version is another than those of a run that was left alone."""
    assert weights(folder) == weights(calm)
    assert episodes(folder) == episodes(calm), "the same games, each with its version"
    assert [row["step"] for row in figures(folder)] == list(range(8))
    assert scraps(folder) == []


def test_a_learner_that_dies_again_and_again_ends_the_run(
    tiny: Path, unbroken: Path, tmp_path: Path
) -> None:
    def kill(driver: int) -> None:
        end = time.monotonic() + 300
        while psutil.pid_exists(driver) and time.monotonic() < end:
            for process in workers(driver, "LearnerRank"):
                process.kill()
            time.sleep(0.05)

    folder = tmp_path / "run"
    run = killing(tiny, folder, kill, "learner.restarts=1")
    assert run.process.returncode == 1
    assert "a learner process died" in run.said
    assert "Run the same command again" in run.said
    train(tiny, folder, *LONG, "learner.restarts=1")
    assert weights(folder) == weights(unbroken)


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
def test_no_turn_is_lost_with_the_driver(lag: int, tiny: Path, tmp_path: Path) -> None:
    """Half of the episodes are in their third turn when it is killed; two were said of each."""
    flag = tmp_path / "flag"
    waiting = tmp_path / "flag-waiting"
    more = [f"env.name={ENVS}:patient", f"env.args.flag={flag}", "train.steps=3"]
    more += [f"train.max_lag={lag}"]
    folder = tmp_path / "run"
    with Going(command(tiny, folder, *more)) as run:
        run.until(lambda: waiting.is_file() and waiting.stat().st_size == 8 * (1 + lag))
        log = folder / "groups" / "turns.log"
        run.until(lambda: sum(turns == 2 for turns in recorded(log, tmp_path)) >= 8 * (1 + lag))
        run.process.kill()
    flag.touch()
    train(tiny, folder, *more)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["turns/diverged"] for row in steps] == [0, 0, 0]
    again = sum(row["turns/replayed"] for row in steps)
    if lag:  # some may have become too old before their batch was closed, and are played again
        assert again > 0
    else:
        assert again >= 16, "and those of others that had not ended"
        train(tiny, tmp_path / "calm", *more)
        assert weights(folder) == weights(tmp_path / "calm")
        assert episodes(folder) == episodes(tmp_path / "calm")
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
            log.forget(group)
    records.close()
    return [len(begun.turns) for begun in log.begun(list(log.groups)).values()]


def test_with_a_lag_every_task_is_trained_on_once(tiny: Path, tmp_path: Path) -> None:
    """Killed with the driver and all: what was played before is not played again."""
    folder = tmp_path / "run"
    lag = ["train.max_lag=1", "run.checkpoint_every=5"]
    with Going(command(tiny, folder, *LONG, *lag)) as run:
        run.until(lambda: rows(folder) >= 3)
        before = trained_on(folder)
        run.process.kill()
    train(tiny, folder, *LONG, *lag, "run.episodes_every=1")
    after = list(episodes(folder).values())
    assert before[0] == [e["id"] for e in after[0]]
    ids = [e["id"].split("/")[0].split("~")[0] for step in after for e in step]
    assert sorted(set(ids)) == sorted(f"{s}-{k}" for s in range(8) for k in range(4))
    assert all(ids.count(name) == 4 for name in set(ids)), "a group has four episodes"
    assert all(row["lag/max"] <= 1 for row in figures(folder))
    assert any(row["lag/max"] == 1 for row in figures(folder)), "it played while it learned"


def trained_on(folder: Path) -> list[list[str]]:
    return [[e["id"] for e in step] for step in episodes(folder).values()]
