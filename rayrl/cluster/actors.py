"""Where actors and tasks begin and end: what a process needs, and how Ray says that it is gone.

It does not import Serve, which takes half a second: the learner's ranks and the small actors beside
the driver have no use for it.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = [
    "ACTOR_DIED",
    "beside_driver",
    "import_variables",
    "kill_actor",
    "on_failure",
    "prepare_process",
]

GC_THRESHOLD = 50_000  # new objects before a garbage collection
ACTOR_DIED = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
"""Died, or killed by Ray because its node had no memory left (which is an error of its own)."""


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Schedule the driver's small actors on its node, so that losing other nodes spares them."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def prepare_process(threads: int) -> None:
    """Prepare an actor's process for `threads` compute threads before it imports torch.

    Idle OpenMP threads soon sleep instead of spinning, because processes share the cores of a small
    machine. This is not a `runtime_env`, for which Ray would restart every process.

    Garbage is collected less often: it took a quarter of the time of importing torch and
    transformers, and with thousands of live episodes a tenth of the time of turns
    (benchmarks/many_live.py).
    """
    gc.set_threshold(GC_THRESHOLD, 10, 10)
    os.environ.update(import_variables(threads))


def import_variables(threads: int) -> dict[str, str]:
    """Environment variables that torch and transformers read when they are imported."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        # Spinning for some 50 us between operations makes a step of SmolLM2 on two threads a fifth
        # faster than waking a thread for each; longer slows down whoever shares the cores.
        "GOMP_SPINCOUNT": "2000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def kill_actor(actor: Any) -> None:
    """End an actor, if it is there."""
    with suppress(Exception):  # it may be dead already
        ray.kill(actor)


def on_failure(call: Callable[[BaseException], None]) -> Callable[[asyncio.Task[Any]], None]:
    """A done callback of tasks that passes on what they raised; being cancelled is no failure."""

    def done(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            call(error)

    return done
