"""Time of a weight push, relative to copies of the same bytes.

    python benchmarks/weight_push.py --model DIR [--dtype bfloat16] [--pushes 6]

A learner's process holds the model of a Hugging Face directory, and a push is that of training:
rank 0 puts a flat buffer into Ray's object store, and vLLM replicas on the CPU load it and confirm
version and checksum. After every push the same bytes are copied once per replica (`memcpy`, into
allocated memory), so that both see the same load of the machine. Prints as JSON the median seconds
of each part, and the ratio of push to copies. The first push, to new memory, is separate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from rayrl.cluster.actors import prepare_process
from rayrl.cluster.serving.replica import deploy, undeploy
from rayrl.cluster.session import open_session
from rayrl.cluster.weight_sync.push import WeightSync, open_store
from rayrl.cluster.weight_sync.transports import ObjectStore
from rayrl.cluster.weight_sync.weight_store import Published
from rayrl.config import from_dict
from rayrl.engine import open_engine
from rayrl.weights.flat import checksum, layout, put


class Rank:
    """A learner's rank 0 that does not learn."""

    def __init__(self, model: str, dtype: str) -> None:
        prepare_process(1)
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._weights = dict(loaded.named_parameters())  # tied weights once
        self._flat = np.zeros(0, np.uint8)

    def publish(self, version: int) -> tuple[Published, dict[str, float]]:
        """Like `LearnerRank.publish`; also return the seconds of its parts."""
        import ray
        import torch

        times = [time.perf_counter()]
        manifest = layout((n, w.dtype, tuple(w.shape)) for n, w in self._weights.items())
        if len(self._flat) != manifest.nbytes:
            self._flat = np.zeros(manifest.nbytes, np.uint8)
        with torch.no_grad():
            for entry, weight in zip(manifest.entries, self._weights.values(), strict=True):
                put(self._flat, entry, weight)
        times.append(time.perf_counter())
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(checksum, self._flat)
            published = Published(version, (ray.put(self._flat),), manifest, digest.result())
        times.append(time.perf_counter())
        parts = zip(("flatten", "put and checksum"), times, times[1:], strict=False)
        return published, {name: after - before for name, before, after in parts}

    def copy(self, times: int) -> float:
        """Copy the buffer `times` times into allocated memory and return the seconds."""
        target = np.ones_like(self._flat)
        began = time.perf_counter()
        for _ in range(times):
            np.copyto(target, self._flat)
        return time.perf_counter() - began


async def pushes(args: argparse.Namespace) -> list[dict[str, float]]:
    """Return the seconds of the parts of every push."""
    import ray  # after rayrl.cluster, which configures it

    config = from_dict(
        {
            "engine": {"kind": "vllm", "dtype": args.dtype, "max_len": 256, "max_live": 8},
            "cluster": {
                "replicas": args.replicas,
                "object_store_gb": args.object_store_gb,
                "push_deadline_s": 300.0,
            },
        }
    )
    rows: list[dict[str, float]] = []
    with ExitStack() as stack:
        session = stack.enter_context(open_session(config.cluster))
        store = open_store(session)
        stack.callback(ray.kill, store)
        rank = ray.remote(num_cpus=0)(Rank).remote(args.model, args.dtype)
        engine = partial(open_engine, args.model, config.engine)
        stack.callback(undeploy, "weight-push")
        handle = await deploy(session, config, engine, app="weight-push", store=True)

        async def publish(version: int) -> Published:
            published, parts = await rank.publish.remote(version)
            rows.append(parts)
            return published

        weights = WeightSync(ObjectStore(publish, store, handle), store, handle, 300.0)
        for version in range(1, args.pushes + 1):
            began = time.perf_counter()
            await weights.push(version)
            took = time.perf_counter() - began
            memcpy = await rank.copy.remote(args.replicas)
            rows[-1]["load"] = took - sum(rows[-1].values())
            rows[-1] |= {"push": took, "memcpy": memcpy, "push/memcpy": took / memcpy}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--pushes", type=int, default=6)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--object-store-gb", type=float, default=2.5)
    args = parser.parse_args()
    first, *rows = asyncio.run(pushes(args))

    def rounded(row: dict[str, Any]) -> dict[str, float]:
        return {name: round(value, 3) for name, value in row.items()}

    settings = {"dtype": args.dtype, "replicas": args.replicas}
    print(json.dumps({**settings, "first": rounded(first)}))
    middle = {name: statistics.median(row[name] for row in rows) for name in first}
    print(json.dumps({**settings, "pushes": len(rows), **rounded(middle)}))


if __name__ == "__main__":
    main()
