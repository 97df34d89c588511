"""Translate vLLM's outputs, weight versions and errors to rayrl's types, and manifests to lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rayrl.errors import ConfigError, InfraError
from rayrl.types import Alternatives, Delta, Finish, VersionSpan
from rayrl.weights.flat import Entry, Manifest

__all__ = ["MISMATCH", "from_wire", "to_delta", "to_wire", "translate_errors", "version_spans"]

MISMATCH = "these weights do not match"
"""Marks the worker's error for another model's weights; only an error's text reaches the engine."""


@contextmanager
def translate_errors(session: str) -> Iterator[None]:
    """Raise vLLM's errors as ConfigError (the request's fault) or InfraError (the engine's)."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except VLLMClientError as error:
        raise ConfigError(f"session {session!r}: {error}") from error
    except (EngineDeadError, EngineGenerateError) as error:
        raise InfraError(f"vLLM failed: {error.__cause__ or error}") from error


def to_delta(output: Any, greedy: bool, top: int) -> Delta:
    """Convert a vLLM output, a delta or a whole completion.

    Args:
        greedy: report logprobs of 0, as greedy decoding has them.
        top: number of alternatives per id.
    """
    out = output.outputs[0]
    ids = tuple(int(i) for i in out.token_ids)
    logprobs = out.logprobs or ()  # per id a mapping with the sampled and the most probable ids
    finish: Finish | None = None
    if output.finished:
        finish = out.finish_reason if out.finish_reason in ("stop", "length") else "abort"
    return Delta(
        ids,
        tuple(
            0.0 if greedy else float(candidates[token].logprob)
            for token, candidates in zip(ids, logprobs, strict=True)
        ),
        finish,
        output.num_cached_tokens or 0,
        tuple(_alternatives(candidates, top) for candidates in logprobs) if top else (),
    )


def _alternatives(candidates: Any, top: int) -> Alternatives:
    ranked = sorted((c.rank, int(token), float(c.logprob)) for token, c in candidates.items())
    return tuple((token, logprob) for _, token, logprob in ranked[:top])


def version_spans(
    spans: Sequence[tuple[str, int, int]], first_version: int, n: int
) -> tuple[VersionSpan, ...]:
    """Convert vLLM's (version, start, end) spans over n ids.

    `first_version` stands for missing spans and for "default", vLLM's name of its initial weights.
    """
    if not n:
        return ()
    if not spans:
        return (VersionSpan(first_version, 0, n),)
    return tuple(
        VersionSpan(int(name) if name.isdigit() else first_version, start, end)
        for name, start, end in spans
    )


def to_wire(plan: Sequence[Manifest]) -> list[list[Any]]:
    """Convert manifests to lists."""
    return [
        [manifest.nbytes, [[e.name, e.dtype, list(e.shape), e.offset] for e in manifest.entries]]
        for manifest in plan
    ]


def from_wire(plan: list[list[Any]]) -> tuple[Manifest, ...]:
    """Convert the lists of `to_wire` back to manifests."""
    return tuple(
        Manifest(
            tuple(
                Entry(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in entries
            ),
            nbytes,
        )
        for nbytes, entries in plan
    )
