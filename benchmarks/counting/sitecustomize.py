"""Log generated answers in every process that has this folder in PYTHONPATH; see chaos.py.

Each answer of the embedded engine becomes a line of the file in COUNT_ANSWERS: its time, a key of
the request (seed, weights version and hash of the prompt) and its number of tokens.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MODULE = "rayrl.engine.embedded.engine"


class Finder(importlib.abc.MetaPathFinder):
    """Let the other finders import the module, then wrap its engine."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                wrap(module.EmbeddedEngine)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def wrap(engine: Any) -> None:
    """Make `generate` write a line per answer."""
    generate = engine.generate

    @functools.wraps(generate)
    async def counted(self: Any, request: Any) -> Any:
        from ray import serve

        answer = await generate(self, request)
        app = serve.get_replica_context().app_name
        version = answer.versions[-1].version if answer.versions else -1
        key = f"{app} {request.seed} {version} {hash(request.prompt_ids)}"
        line = json.dumps({"at": time.time(), "key": key, "tokens": len(answer.ids)}) + "\n"
        write(line.encode())
        return answer

    engine.generate = counted


def write(line: bytes) -> None:
    """Append a line in one write, so that lines of several processes do not mix."""
    with open(os.environ["COUNT_ANSWERS"], "ab", buffering=0) as out:
        out.write(line)


if os.environ.get("COUNT_ANSWERS"):
    sys.meta_path.insert(0, Finder())
