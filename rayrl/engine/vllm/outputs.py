"""What vLLM says, in our terms: outputs as deltas, version spans, errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rayrl.errors import ConfigError, InfraError
from rayrl.types import Alternatives, Delta, Finish, VersionSpan

__all__ = ["delta", "errors_as_ours", "version_spans"]


@contextmanager
def errors_as_ours(session: str) -> Iterator[None]:
    """vLLM's errors become ConfigError (the request) or InfraError (the engine)."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except VLLMClientError as error:
        raise ConfigError(f"session {session!r}: {error}") from error
    except (EngineDeadError, EngineGenerateError) as error:
        raise InfraError(f"vLLM failed: {error.__cause__ or error}") from error


def delta(output: Any, greedy: bool, top: int) -> Delta:
    """An output of vLLM's, whole or a part."""
    out = output.outputs[0]
    ids = tuple(int(i) for i in out.token_ids)
    choices = out.logprobs or ()  # one mapping per id: the sampled one, and the most probable
    finish: Finish | None = None
    if output.finished:
        finish = out.finish_reason if out.finish_reason in ("stop", "length") else "abort"
    return Delta(
        ids,
        tuple(
            0.0 if greedy else float(here[token].logprob)
            for token, here in zip(ids, choices, strict=True)
        ),
        finish,
        output.num_cached_tokens or 0,
        tuple(_alternatives(here, top) for here in choices) if top else (),
    )


def _alternatives(here: Any, top: int) -> Alternatives:
    ranked = sorted((one.rank, int(token), float(one.logprob)) for token, one in here.items())
    return tuple((token, logprob) for _, token, logprob in ranked[:top])


def version_spans(
    found: Sequence[tuple[str, int, int]], began: int, n: int
) -> tuple[VersionSpan, ...]:
    """vLLM's spans; it calls the weights it was started with "default"."""
    if not n:
        return ()
    if not found:
        return (VersionSpan(began, 0, n),)
    return tuple(
        VersionSpan(int(name) if name.isdigit() else began, start, end)
        for name, start, end in found
    )
