"""One machine plays three nodes, each a raylet with its own object store; one of them is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nodes import NODES, PLACES, PLAYERS, Nodes
from tests.runs import RANKS, Going, command, episodes, rows, scraps, weights

pytestmark = pytest.mark.slow


def test_a_node_is_lost_and_another_comes(
    nodes: Nodes, tiny: Path, calm_ranks: Path, tmp_path: Path
) -> None:
    for resources in NODES:
        nodes.add(resources)
    folder = tmp_path / "run"
    words = [*RANKS, *PLACES, f"cluster.address={nodes.address}"]
    with Going(command(tiny, folder, *words), nodes.env) as run:
        run.until(lambda: rows(folder) >= 3)
        found = [nodes.titles(number) & PLAYERS for number in range(3)]
        nodes.kill(2)
        nodes.add(NODES[2])
        assert run.wait() == 0, run.said
    assert not any(nodes.titles(number) for number in (0, 1, 3)), "an actor is left"
    assert found == [
        {"ServeReplica", "LearnerRank"},
        {"EnvWorker", "ServeReplica"},
        {"EnvWorker", "LearnerRank"},
    ]
    assert weights(folder) == weights(calm_ranks), "as on one node, with none lost"
    assert episodes(folder) == episodes(calm_ranks)
    assert "a learner process died; restarting it from step" in run.said
    assert scraps(folder) == []
