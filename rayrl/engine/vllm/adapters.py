"""Versions of a LoRA adapter that one vLLM serves over constant base weights.

vLLM sees each version as an adapter of its own: a request names the one it started with, the KV
cache is separate for each, and nothing stops while a new one loads. At most two are loaded, the
newest and one that earlier requests finish on.
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
from rayrl.engine.vllm.convert import to_wire
from rayrl.errors import InfraError
from rayrl.weights.flat import memory_dir, unflatten

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.weights.flat import Manifest

__all__ = ["FILE", "Adapters", "engine_args", "file_names"]

MAX_LOADED = 2
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's max_lora_rank can have
FILE = "adapter_model.safetensors"


def engine_args(config: LoraConfig) -> dict[str, Any]:
    """Return the arguments with which vLLM must be started to serve adapters of this rank."""
    return {
        "enable_lora": True,
        "max_lora_rank": next((rank for rank in RANKS if rank >= config.rank), config.rank),
        "max_loras": MAX_LOADED,
        "max_cpu_loras": MAX_LOADED,
    }


def file_names(manifest: Manifest) -> dict[str, str]:
    """Map the names in the learner's peft model to those in an adapter file."""
    return {name: name.replace(".default.", ".") for name in manifest.names()}


@dataclass(eq=False)
class _Loaded:
    """One version: its `LoRARequest` for vLLM, and the names of the requests that use it."""

    request: Any
    users: set[str] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Adapters:
    """Load adapter versions, and assign the newest to each request.

    Args:
        llm: vLLM's `AsyncLLM`, started with `engine_args`.
        config: rank and alpha of the adapters.
    """

    def __init__(self, llm: Any, config: LoraConfig) -> None:
        self._llm = llm
        self._config = config
        self._loaded: list[_Loaded] = []  # newest last
        self._count = 0

    @contextmanager
    def newest(self, name: str) -> Iterator[Any]:
        """Yield the newest version's `LoRARequest`, in use while request `name` is in flight.

        Yields None before the first is loaded: an untrained adapter changes nothing.
        """
        if not self._loaded:
            yield None
            return
        loaded = self._loaded[-1]
        loaded.users.add(name)
        try:
            yield loaded.request
        finally:
            loaded.users.discard(name)
            if not loaded.users:
                loaded.idle.set()

    async def load(self, version: int, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Load a version for later requests to use.

        If two are loaded already, waits until the older is no longer in use.

        Returns:
            The checksum of the adapter file as the workers read it.
        """
        from vllm.lora.request import LoRARequest

        while len(self._loaded) >= MAX_LOADED:
            oldest = self._loaded[0]
            while oldest.users:
                oldest.idle.clear()
                await oldest.idle.wait()
            await self._llm.remove_lora(oldest.request.lora_int_id)
            self._loaded.remove(oldest)
        self._count += 1  # a new id for vLLM even if a version is pushed twice
        folder = tempfile.mkdtemp(prefix="rayrl-weights-", dir=memory_dir())
        try:
            await asyncio.to_thread(self._write, Path(folder), flat, manifest)
            request = LoRARequest(f"{version}.{self._count}", self._count, folder)
            if not await self._llm.add_lora(request):
                raise InfraError(f"vLLM did not take the adapter of version {version}")
            args = (folder, to_wire([manifest]))
            digest, *others = await self._llm.collective_rpc("rayrl_adapter_checksum", args=args)
        finally:  # vLLM has it in memory, and never evicts it for a third
            await asyncio.to_thread(shutil.rmtree, folder)
        if any(other != digest for other in others):
            raise InfraError(f"workers loaded different adapters: {[digest, *others]}")
        self._loaded.append(_Loaded(request))
        return str(digest)

    async def abort_older(self) -> None:
        """Abort the requests in flight on any version but the newest."""
        names = [name for loaded in self._loaded[:-1] for name in loaded.users]
        if names:
            await self._llm.abort(names)

    def _write(self, folder: Path, flat: NDArray[np.uint8], manifest: Manifest) -> None:
        """Write the adapter as peft saves it."""
        from safetensors.torch import save_file

        names = file_names(manifest)
        tensors = {names[name]: tensor for name, tensor in unflatten(flat, manifest).items()}
        save_file(tensors, folder / FILE)
        settings = {
            "peft_type": "LORA",
            "r": self._config.rank,
            "lora_alpha": self._config.alpha,
            "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))
