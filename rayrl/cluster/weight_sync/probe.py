"""Check that replicas compute the learner's model.

A checksum proves which bytes arrived. An engine may still compute another model from them: it
packs, fuses and shards what it loads, and vLLM 0.32 on a CPU once took unpacked experts for packed
ones. So each replica completes a few prompts on the path that rollouts use, and the learner scores
the sampled ids. The mean |difference| of their logprobs estimates the divergence of the two
distributions, and is at least as large in expectation, whatever was sampled.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from ray.serve.handle import DeploymentHandle

from rayrl.cluster.actors import ACTOR_DIED
from rayrl.cluster.weight_sync.transports import ask_all
from rayrl.config import Config
from rayrl.errors import ConfigError, InfraError, NumericsError, RunFailed
from rayrl.learner.batch import Trajectory, supervised_row
from rayrl.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Probe", "Scorer", "mean_difference", "probe_requests", "tolerance"]

PROMPTS = (3, 11, 23, 38)  # lengths in ids: below and above vLLM's KV blocks (16 or 32)
TOKENS = 8  # sampled per prompt
SAMPLING = Sampling(max_tokens=TOKENS)  # the model's own distribution, whatever a run samples
# Nats. In fp32 the engines differ from the learner by 1e-7 to 3e-4 on a CPU; on a GPU in TF32, with
# 10 bits of mantissa, expect a few thousandths.
EXACT = 0.02
# With 8 or 11 bits of mantissa on either side a logit of 16 is off by up to 0.06 from rounding
# alone, most of all at unlikely ids, which probes sample: a random Qwen3-MoE in bf16 on vLLM
# differs by 0.06 from fp32. Wrongly packed experts differed by 2.3.
ROUNDED = 0.3
RESUME = (
    "Other replicas or earlier versions were right. Episodes since the last comparison cannot be "
    "trusted. Run the same command again to resume from the last checkpoint with new replicas, and "
    "set cluster.check_pushes=1 to compare after every push."
)


class Scorer(Protocol):
    """The learner as a probe uses it; `LearnerGroup` implements it."""

    async def describe(self) -> tuple[str, int]:
        """Return the model's architecture and the size of its vocabulary."""
        ...

    async def logprobs(self, rows: Sequence[Trajectory]) -> Sequence[NDArray[np.float32]]:
        """Return (T,) logprobs per row at temperature 1, 0 where the loss is masked."""
        ...


def tolerance(config: Config) -> float:
    """Largest mean |difference| of logprobs in nats that rounding explains."""
    engine = config.engine.dtype
    if config.engine.kind == "embedded" and engine == "auto":
        engine = "float32"
    return EXACT if engine == config.learner.dtype == "float32" else ROUNDED


def probe_requests(vocabulary: int, version: int) -> list[Request]:
    """Build the probe's requests, the same for every replica and push.

    Args:
        vocabulary: number of the model's ids. Prompts use the middle half: control tokens, and
            those of images, are at the ends.
        version: minimum version of the weights.
    """
    rng = random.Random(0)
    ids = range(vocabulary // 4, max(3 * vocabulary // 4, vocabulary // 4 + 1))
    return [
        Request(
            session=f"rayrl-probe-{n}",
            prompt_ids=tuple(rng.choice(ids) for _ in range(n)),
            sampling=SAMPLING,
            seed=n,
            min_version=version,
        )
        for n in PROMPTS
    ]


def mean_difference(
    answers: Sequence[Completion], scored: Sequence[NDArray[np.float32]]
) -> tuple[float, int]:
    """Compare the engine's logprobs with the learner's.

    Args:
        answers: completions of `probe_requests`.
        scored: logprobs of the same rows by `Scorer.logprobs`.

    Returns:
        Mean |difference| in nats, and the number of ids compared.
    """
    gaps = [
        abs(float(theirs) - float(ours))
        for answer, row in zip(answers, scored, strict=True)
        for theirs, ours in zip(
            answer.rollout_logprobs, row[len(row) - len(answer.ids) :], strict=True
        )
    ]
    return (sum(gaps) / len(gaps) if gaps else 0.0), len(gaps)


class Probe:
    """Compare replicas with the learner after a push when a comparison is due.

    It is due at a run's first push, at the first push to a new replica, and every
    `cluster.check_pushes` pushes.
    """

    def __init__(self, config: Config, learner: Scorer, handle: DeploymentHandle) -> None:
        self._config = config
        self._learner = learner
        self._handle = handle
        self._pushes = 0
        self._checked: set[str] = set()  # replicas that have computed the learner's model

    async def check(self, version: int, replicas: Collection[str]) -> None:
        """Raise if a replica computes another model than the learner after the push of `version`.

        A replica that dies meanwhile, or is too busy to answer, is compared at the next push.

        Raises:
            ConfigError: at a run's first push all replicas do: the engine does not support weights
                of this architecture.
            RunFailed: a replica does.
            InfraError: at a run's first push no replica answered.
            NumericsError: the learner's logprobs are not finite.
        """
        every, count = self._config.cluster.check_pushes, self._pushes
        self._pushes += 1
        if self._checked.issuperset(replicas) and not (every and count % every == 0):
            return
        architecture, vocabulary = await self._learner.describe()
        requests = probe_requests(vocabulary, version)
        answers = await self._answers(requests)
        rows = [
            supervised_row(
                (*request.prompt_ids, *answer.ids),
                [False] * len(request.prompt_ids) + [True] * len(answer.ids),
            )
            for replica in answers
            for request, answer in zip(requests, answers[replica], strict=True)
        ]
        scored = await self._learner.logprobs(rows)
        if not all(np.isfinite(row).all() for row in scored):
            raise NumericsError(
                f"the learner's log-probabilities are not finite; version {version} of its weights "
                "has diverged. Resume from an earlier checkpoint with a lower learner.lr."
            )
        limit = tolerance(self._config)
        wrong: dict[str, tuple[float, int]] = {}
        for k, (replica, own) in enumerate(answers.items()):
            difference, ids = mean_difference(own, scored[k * len(own) : (k + 1) * len(own)])
            if not difference <= limit:  # also NaN
                wrong[replica] = difference, ids
        if wrong:
            text = self._explain(version, architecture, wrong, len(answers))
            if not self._checked and len(wrong) == len(answers):
                raise ConfigError(text + self._remedy(architecture))
            raise RunFailed(text + RESUME)
        self._checked.update(answers)

    async def _answers(self, requests: Sequence[Request]) -> Mapping[str, Sequence[Completion]]:
        """Return the completions by replica, of the replicas that answer in time."""
        limit_s = self._config.cluster.push_deadline_s
        try:
            async with asyncio.timeout(limit_s):
                results = await ask_all(self._handle, "probe", requests)
        except (TimeoutError, InfraError) as error:
            results = [error]
        found: dict[str, Sequence[Completion]] = {}
        missing: list[str] = []
        for result in results:
            if isinstance(result, (TimeoutError, InfraError, *ACTOR_DIED)):
                missing.append(f"{type(result).__name__}: {result}")
            elif isinstance(result, BaseException):
                raise getattr(result, "cause", None) or result
            else:
                found |= [result]
        if not found and not self._checked:
            raise InfraError(
                f"no replica has completed the prompts that confirm a push within {limit_s:g} s "
                f"(cluster.push_deadline_s): {'; '.join(missing)}"
            )
        return found

    def _explain(
        self, version: int, architecture: str, wrong: Mapping[str, tuple[float, int]], n: int
    ) -> str:
        replica, (difference, ids) = max(wrong.items(), key=lambda item: item[1])
        return (
            f"engine.kind={self._config.engine.kind}: {len(wrong)} of {n} replicas compute another "
            f"model than the learner, although version {version} of the weights "
            f"({architecture}) arrived intact. The log-probabilities of {ids} ids that replica "
            f"{replica} sampled differ from the learner's by {difference:.3g} nats on average, and "
            f"rounding explains at most {tolerance(self._config):g}. "
        )

    def _remedy(self, architecture: str) -> str:
        """Advice for an engine that never computed the learner's model."""
        config = self._config
        options = ["engine=embedded" if config.engine.kind == "vllm" else "engine=vllm"]
        if config.cluster.sync == "adapters":
            options.insert(0, "cluster.sync=object_store, which pushes whole weights")
        if tolerance(config) == ROUNDED:
            options.append(
                "engine.dtype=float32 and learner.dtype=float32, if the difference is small"
            )
        return f"This engine does not support {architecture}; choose {', or '.join(options)}."
