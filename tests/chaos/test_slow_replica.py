"""A replica becomes slow and recovers: requests move away from it, and come back."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rayrl.cluster.open import worker_imports
from rayrl.cluster.serving.inference_client import BatchingClient, ServeReplicas
from rayrl.cluster.serving.replica import deploy, undeploy
from rayrl.cluster.session import open_session
from rayrl.config import from_dict
from rayrl.engine import open_engine
from rayrl.types import Completion, Request, Sampling

pytestmark = pytest.mark.slow

APP = "test-slow"
TURNS = 4
SLOW_S = 1.0  # a turn of the model takes some milliseconds


class SometimesSlowEngine:
    """A real engine that waits before it answers, in one of the replicas, while `slow` is there.

    It notes for each answer whose it is, in a file for each replica.
    """

    def __init__(self, engine: Any, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        try:
            (folder / "chosen").symlink_to(str(os.getpid()))
            self._chosen = True
        except FileExistsError:
            self._chosen = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: Request) -> Completion:
        if self._chosen and (self._folder / "slow").exists():
            await asyncio.sleep(SLOW_S)
        answer: Completion = await self._engine.generate(request)
        with (self._folder / f"{'chosen' if self._chosen else 'other'}.log").open("a") as log:
            log.write(f"{request.session}\n")
        return answer


def open_sometimes_slow(model: Path, config: Any, folder: Path) -> SometimesSlowEngine:
    return SometimesSlowEngine(open_engine(model, config), folder)


class Players:
    """Sixteen play conversations of four turns, one after the other."""

    def __init__(self, client: BatchingClient) -> None:
        self.client = client
        self.answers: dict[str, list[tuple[int, ...]]] = {}

    async def play(self, phase: str, each: int = 4) -> None:
        await asyncio.gather(*(self._one(phase, k, each) for k in range(16)))

    async def _one(self, phase: str, k: int, each: int) -> None:
        for n in range(each):
            session, ids = f"{phase}-{k}-{n}", (1, 2, 3 + k)
            said = []
            for turn in range(TURNS):
                seed = 100 * k + 10 * n + turn  # the same in every phase
                answer = await self.client.generate(
                    Request(session, ids, Sampling(max_tokens=8), seed=seed)
                )
                said.append(answer.ids)
                ids = (*ids, *answer.ids, 5)
            self.answers[session] = said
            self.client.release([session])


def share(folder: Path, phase: str) -> float:
    """What the chosen replica has answered of a phase."""
    found = Counter[str]()
    for who in ("chosen", "other"):
        log = folder / f"{who}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        found[who] = sum(line.startswith(f"{phase}-") for line in lines)
    return found["chosen"] / found.total()


async def play_until(
    players: Players, folder: Path, phase: str, fits: Callable[[float], bool]
) -> None:
    """Until the chosen replica has answered a share of requests that fits."""
    for k in itertools.count():
        await players.play(f"{phase}{k}", each=1)
        if fits(share(folder, f"{phase}{k}")):
            break
        await asyncio.sleep(0.5)


async def test_requests_leave_a_slow_replica_and_come_back(tiny: Path, tmp_path: Path) -> None:
    config = from_dict(
        {"model": {"path": str(tiny)}, "engine": {"max_len": 256}, "cluster": {"replicas": 2}}
    )
    slow = tmp_path / "slow"
    with ExitStack() as stack:
        imports = worker_imports(config, engine=True)
        session = stack.enter_context(open_session(config.cluster, imports=imports))
        stack.callback(undeploy, APP)
        factory = partial(open_sometimes_slow, tiny, config.engine, tmp_path)
        await deploy(session, config, factory, app=APP, store=False)
        players = Players(BatchingClient(ServeReplicas(APP), count=2, deadline_s=600))
        # also what each costs once; and the machine may have other work, which slows one of them
        await play_until(players, tmp_path, "first", lambda share: 0.2 < share < 0.8)
        await players.play("calm")
        # conversations that are bound to it when it becomes slow
        early = asyncio.ensure_future(players.play("turning"))
        await asyncio.sleep(0)
        slow.touch()
        await early
        await players.play("slow")
        slow.unlink()
        await play_until(players, tmp_path, "again", lambda share: share > 0.3)  # found by a probe
        await players.play("well")
    assert share(tmp_path, "slow") < 0.2
    of_phase = {
        phase: [said for name, said in sorted(players.answers.items()) if name.startswith(phase)]
        for phase in ("calm-", "turning-", "slow-", "well-")
    }
    assert all(len(said) == 64 for said in of_phase.values()), "every conversation has ended"
    assert all(said == of_phase["calm-"] for said in of_phase.values()), "whoever answered"
