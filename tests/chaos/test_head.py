"""The head of a cluster is killed and started again while a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.apart import Shared
from tests.nodes import Nodes
from tests.runs import Going, command, rows, scraps, train, weights

pytestmark = pytest.mark.slow

PLACES = [
    "cluster.env_host_resources={rest: 1}",
    "cluster.replica_resources={rest: 1}",
    "cluster.learner_resources={rest: 1}",
]
STEPS = 16
MORE = ["sampling.max_tokens=48", f"train.steps={STEPS}", "cluster.env_hosts=2"]
HEAD, REST = {"head": 1}, {"rest": 9}
# a driver on the node that has this folder; without it Ray puts a driver on the head
ON = "import functools, ray, sys; ray.init = functools.partial(ray.init, _temp_dir={!r}); "
MAIN = "from rayrl.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="session")
def calm(tiny: Path, shared: Shared) -> Path:
    return shared("calm-head", lambda folder: train(tiny, folder, *MORE))


def test_a_head_that_remembers_is_missed_by_nobody(tiny: Path, calm: Path, tmp_path: Path) -> None:
    """Its state on a disk, it comes back to a run that cannot go on without it.

    That a run goes on meanwhile is not asserted: whatever a process of Ray calls for the first time
    waits for the head.
    """
    (tmp_path / "state").mkdir()
    nodes = Nodes(tmp_path, store=tmp_path / "state")
    try:
        nodes.add(HEAD)
        nodes.add(REST)
        folder = tmp_path / "run"
        line = command(tiny, folder, *MORE, *PLACES, f"cluster.address={nodes.address}")
        line[1:3] = ["-c", ON.format(str(nodes.temp(1))) + MAIN]
        with Going(line, nodes.env) as run:
            run.until(lambda: rows(folder) >= 3)
            assert "ServeController" in nodes.titles(0)
            assert {"EnvHost", "ServeReplica", "LearnerRank"} <= nodes.titles(1)
            nodes.kill(0)
            for title in ("EnvHost", "ServeReplica"):  # only a head can replace them
                nodes.find(1, title)[0].kill()
            run.until(lambda: "does not answer; waiting" in run.said)
            nodes.restart_head(HEAD)
            assert rows(folder) < STEPS
            assert run.wait() == 0, run.said
        assert "answers again" in run.said
        assert not nodes.titles(0) | nodes.titles(1), "an actor is left"
    finally:
        nodes.close()
    assert weights(folder) == weights(calm)
    assert scraps(folder) == []


def test_a_head_that_forgets_ends_the_run_which_is_resumed(
    nodes: Nodes, tiny: Path, calm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    nodes.env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "15"  # and not 60
    nodes.add(HEAD)
    nodes.add(REST)
    line = command(tiny, folder, *MORE, *PLACES, f"cluster.address={nodes.address}")
    with Going(line, nodes.env) as run:
        run.until(lambda: rows(folder) >= 3)
        nodes.kill(0)
        assert run.wait() == 1, run.said
    assert "the node of Ray that this program was on has died" in run.said
    assert f"run the same command again: it goes on from {folder}" in run.said
    assert nodes.started[1].wait(900) != 0, "with all that ran there: see nothing_is_left"
    nodes.restart_head(HEAD)
    nodes.add(REST)
    with Going(line, nodes.env) as run:
        assert run.wait() == 0, run.said
    assert weights(folder) == weights(calm)
    assert scraps(folder) == []
