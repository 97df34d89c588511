"""The head of a cluster is killed and started again while a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nodes import Nodes
from tests.runs import STEPS, Going, command, rows, scraps, train, weights

pytestmark = pytest.mark.slow

PLACES = [
    "cluster.env_worker_resources={rest: 1}",
    "cluster.replica_resources={rest: 1}",
    "cluster.learner_resources={rest: 1}",
    "cluster.env_workers=2",
]
HEAD, REST = {"head": 1}, {"rest": 9}
# a driver on the node that has this folder; without it Ray puts a driver on the head
ON = "import functools, ray, sys; ray.init = functools.partial(ray.init, _temp_dir={!r}); "
MAIN = "from rayrl.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_head_that_remembers_is_waited_for_and_a_lost_cluster_ends_the_run(
    tiny: Path, calm: Path, tmp_path: Path
) -> None:
    """The head comes back to a run that cannot go on without it; then nothing is left of either.

    That a run goes on meanwhile is not asserted: whatever a process of Ray calls for the first time
    waits for the head.
    """
    (tmp_path / "state").mkdir()
    nodes = Nodes(tmp_path, store=tmp_path / "state")
    try:
        nodes.add(HEAD)
        nodes.add(REST)
        folder = tmp_path / "run"
        line = command(tiny, folder, *PLACES, f"cluster.address={nodes.address}")
        line[1:3] = ["-c", ON.format(str(nodes.temp(1))) + MAIN]
        with Going(line, nodes.env) as run:
            run.until(lambda: rows(folder) >= 3)
            assert "ServeController" in nodes.titles(0)
            assert {"EnvWorker", "ServeReplica", "LearnerRank"} <= nodes.titles(1)
            nodes.kill(0)
            for title in ("EnvWorker", "ServeReplica"):  # only a head can replace them
                nodes.find(1, title)[0].kill()
            run.until(lambda: "does not answer; waiting" in run.said)
            nodes.restart_head(HEAD)
            before = rows(folder)
            assert before < STEPS
            run.until(lambda: "answers again" in run.said and rows(folder) > before)
            nodes.kill(0)
            nodes.kill(1)
            assert run.wait() == 1, run.said
        assert "the Ray node that this program ran on has died" in run.said
        assert f"run the same command again: it resumes from {folder}" in run.said
    finally:
        nodes.close()
    train(tiny, folder)
    assert weights(folder) == weights(calm)
    assert scraps(folder) == []
