"""What actors need where they begin.

It does not import Serve, which takes half a second: the learner's ranks and the small actors beside
the driver have no use for it.
"""

from __future__ import annotations

import gc
import os

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["beside_driver", "import_variables", "prepare_process"]

GC_THRESHOLD = 50_000  # new objects before a garbage collection


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Schedule the driver's small actors on its node, so that losing other nodes spares them."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def prepare_process(threads: int) -> None:
    """Prepare an actor's process for `threads` compute threads before it imports torch.

    Idle OpenMP threads sleep instead of spinning, because processes share the cores of a small
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
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
