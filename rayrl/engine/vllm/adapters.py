"""Versions of a low-rank adapter that one vLLM serves, over weights that stay as they are.

A version is an adapter of vLLM's own: requests name the one they began with, keys and values are
cached apart for each, and nothing stops while a new one is loaded. Two are held at once, the newest
and one that earlier requests still end on.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrl.config import LoraConfig
from rayrl.engine.vllm.wire import to_wire
from rayrl.errors import InfraError
from rayrl.weights.flat import unflatten
from rayrl.weights.shared_memory import memory_dir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.weights.flat import Manifest

__all__ = ["FILE", "Adapters", "engine_args", "file_names"]

HELD = 2
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
FILE = "adapter_model.safetensors"


def engine_args(config: LoraConfig) -> dict[str, Any]:
    """What vLLM is started with, to take adapters of this rank."""
    rank = next((one for one in RANKS if one >= config.rank), config.rank)
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": HELD,
        "max_cpu_loras": HELD,
    }


def file_names(manifest: Manifest) -> dict[str, str]:
    """Names as an adapter's file has them, by those that the learner's peft model gives them."""
    return {name: name.replace(".default.", ".") for name in manifest.names()}


@dataclass(eq=False)
class _Held:
    """One version: its request for vLLM, and the names of requests that use it."""

    request: Any
    users: set[str] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Adapters:
    """Loads versions, and says which one a request gets.

    Args:
        llm: vLLM's `AsyncLLM`, started with `engine_args`.
        config: of the adapters that will come.
    """

    def __init__(self, llm: Any, config: LoraConfig) -> None:
        self._llm = llm
        self._config = config
        self._held: list[_Held] = []  # the newest last
        self._count = 0

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """The newest version, as vLLM is asked for it, while request `name` is in flight.

        None before the first was loaded: a new adapter changes nothing.
        """
        if not self._held:
            yield None
            return
        held = self._held[-1]
        held.users.add(name)
        try:
            yield held.request
        finally:
            held.users.discard(name)
            if not held.users:
                held.idle.set()

    async def load(self, version: int, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Load a version; requests that come from now on use it.

        Waits, where it would be the third, until the first is not used any more.

        Returns:
            The checksum of what the workers found in the file that they loaded it from.
        """
        from vllm.lora.request import LoRARequest

        while len(self._held) >= HELD:
            await self._forget(self._held[0])
        self._count += 1  # vLLM's ids are never used again, whatever version comes twice
        folder = tempfile.mkdtemp(prefix="rayrl-weights-", dir=memory_dir())
        try:
            await asyncio.to_thread(self._write, Path(folder), flat, manifest)
            request = LoRARequest(f"{version}.{self._count}", self._count, folder)
            if not await self._llm.add_lora(request):
                raise InfraError(f"vLLM did not take the adapter of version {version}")
            args = (folder, to_wire([manifest]))
            digest, *others = await self._llm.collective_rpc("rayrl_adapter_checksum", args=args)
        finally:  # it is held in memory now, and vLLM is never asked to hold a third
            await asyncio.to_thread(shutil.rmtree, folder)
        if any(other != digest for other in others):
            raise InfraError(f"workers hold different adapters: {[digest, *others]}")
        self._held.append(_Held(request))
        return str(digest)

    async def abort_older(self) -> None:
        """Stop what is in flight on any version but the newest."""
        names = [name for held in self._held[:-1] for name in held.users]
        if names:
            await self._llm.abort(names)

    async def _forget(self, held: _Held) -> None:
        while held.users:
            held.idle.clear()
            await held.idle.wait()
        await self._llm.remove_lora(held.request.lora_int_id)
        self._held.remove(held)

    def _write(self, folder: Path, flat: NDArray[np.uint8], manifest: Manifest) -> None:
        """An adapter as peft saves it."""
        from safetensors.torch import save_file

        names = file_names(manifest)
        tensors = {names[name]: one for name, one in unflatten(flat, manifest).items()}
        save_file(tensors, folder / FILE)
        settings = {
            "peft_type": "LORA",
            "r": self._config.rank,
            "lora_alpha": self._config.alpha,
            "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))
