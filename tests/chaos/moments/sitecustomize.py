"""Kills a process of a run at a certain moment: loaded by Python where PYTHONPATH has this folder.

KILL_AT names moments. A file beside KILL_FLAG, named after a moment, says that it has come, so that
it comes once:

- load: a replica is asked to take over version 7, or a later one, from the object store;
- receive: it has received the first of the buckets of version 3. The embedded engine takes no
  stream; here it is made to, so that learner, broadcast group and replicas are the real ones;
- update: learner rank 1 has the gradients of the fourth batch, and rank 0 waits for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

BUCKET = 16 << 10  # bytes: several for the smallest model


def die_once(moment: str) -> None:
    try:
        os.close(os.open(f"{os.environ['KILL_FLAG']}-{moment}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def at_load(module: Any) -> None:
    load = module.EmbeddedEngine.load_weights

    async def load_weights(self: Any, version: int, *rest: Any) -> str:
        if version >= 7:
            die_once("load")
        digest: str = await load(self, version, *rest)
        return digest

    module.EmbeddedEngine.load_weights = load_weights


def at_receive(module: Any) -> None:
    from rayrl.weights.broadcast import BroadcastGroup, receive
    from rayrl.weights.flat import flatten

    async def join(self: Any, rendezvous: Any, first_rank: int) -> None:
        self.group = BroadcastGroup(rendezvous, first_rank)

    async def take(self: Any, version: int, plan: Any) -> str:
        state: dict[str, Any] = {}

        def keep(pairs: Sequence[tuple[str, Any]]) -> None:
            if version == 3:
                assert len(plan) > 1
                die_once("receive")
            state.update(pairs)

        import asyncio

        digest = await asyncio.to_thread(receive, plan, self.group, keep)
        await self.load_weights(version, *flatten(state))
        return digest

    module.EmbeddedEngine.workers = 1
    module.EmbeddedEngine.join = join
    module.EmbeddedEngine.receive = take


def at_update(module: Any) -> None:
    update = module.DeepSpeedLearner._update

    def _update(self: Any, lr: float, *, finite: bool) -> float:
        if self.info.rank == 1 and self.steps == 3:
            die_once("update")
        norm: float = update(self, lr, finite=finite)
        return norm

    module.DeepSpeedLearner._update = _update


def small_buckets(module: Any) -> None:
    buckets = module.buckets
    module.buckets = lambda walk, limit: buckets(walk, min(limit, BUCKET))


def allowed(module: Any) -> None:
    module.check_sync = lambda config: None


AFTER_IMPORT: dict[str, dict[str, Callable[[Any], None]]] = {
    "load": {"rayrl.engine.embedded.engine": at_load},
    "receive": {
        "rayrl.engine.embedded.engine": at_receive,
        "rayrl.cluster.learner_group": small_buckets,
        "rayrl.config.sync": allowed,
    },
    "update": {"rayrl.learner.deepspeed": at_update},
}


class Finder(importlib.abc.MetaPathFinder):
    """Lets others find a module, and changes it when it is there."""

    def __init__(self, after: dict[str, Callable[[Any], None]]) -> None:
        self._after = dict(after)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        then = self._after.pop(name, None)  # and so it is not asked again below
        if then is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


after: dict[str, Callable[[Any], None]] = {}
for moment in filter(None, os.environ.get("KILL_AT", "").split(",")):
    after |= AFTER_IMPORT[moment]
if after:
    sys.meta_path.insert(0, Finder(after))
