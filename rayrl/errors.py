"""Every error rayrl raises on purpose.

RayrlError
├── ConfigError      a key or value is wrong; names the key, the value and what to do
├── DataError        a file is malformed; names the file and the line
├── EnvError         an environment's own code failed; recorded, counted against a budget
├── InfraError       a process, connection or deadline failed; retried with the same task and seed
│   └── StaleWeights a replica could not reach the version a request asked for
├── Refused          a server refuses one conversation; recorded, not retried
├── NumericsError    a loss, gradient or logprob is unusable for training
└── RunFailed        the run stops; it can be resumed from what is on disk
    └── LearnerLost  a learner process died; a training run restarts it from its checkpoint
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "EnvError",
    "InfraError",
    "LearnerLost",
    "NumericsError",
    "RayrlError",
    "Refused",
    "RunFailed",
    "StaleWeights",
    "clip",
    "describe_error",
    "did_you_mean",
    "error_message",
    "format_traceback",
    "safe_repr",
]


class RayrlError(Exception):
    """Base of all errors raised on purpose; the CLI prints these without a traceback."""


class ConfigError(RayrlError):
    """A configuration key or value is wrong."""


class DataError(RayrlError):
    """A file is malformed."""


class EnvError(RayrlError):
    """An environment raised, hung past its deadline or returned unusable scores."""


class InfraError(RayrlError):
    """Infrastructure around an episode failed: a replica, a connection, a deadline. Retried."""


class StaleWeights(InfraError):
    """A replica holds older weights than a request allows and could not fetch newer ones."""


class Refused(RayrlError):
    """A server refuses one conversation (its length or content) but answers others."""


class NumericsError(RayrlError):
    """A number that must be finite is not."""


class RunFailed(RayrlError):
    """The run cannot go on; the message says why and how to resume."""


class LearnerLost(RunFailed):
    """A learner process died."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `known`, or "" if none is close."""
    near = difflib.get_close_matches(word[:200], list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


MAX_MESSAGE = 4_000  # characters recorded of a message from third-party code
MAX_TRACEBACK = 20_000


def clip(text: str, limit: int = MAX_MESSAGE) -> str:
    """Shorten `text` to at most `limit` characters (100 or more) by cutting out its middle."""
    if len(text) <= limit:
        return text
    kept = limit - 60  # leaves room for the note about the cut
    head = kept * 2 // 3
    omitted = len(text) - kept
    return f"{text[:head]} … [{omitted:,} characters left out] … {text[head - kept :]}"


def error_message(error: BaseException) -> str:
    """Return the clipped message of an exception from third-party code.

    Its `__str__` is third-party code too and may itself raise.
    """
    return _call_safely(str, error)


def describe_error(error: BaseException) -> str:
    """Return the type and clipped message of an exception from third-party code."""
    message = error_message(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def safe_repr(value: object, limit: int = 1_000) -> str:
    """Return the clipped `repr` of any value, even if its `__repr__` raises."""
    return _call_safely(repr, value, limit)


def _call_safely(convert: Callable[[object], str], value: object, limit: int = MAX_MESSAGE) -> str:
    try:
        return clip(convert(value), limit)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kind, raised = type(value).__name__, type(error).__name__
        return f"<{kind}, whose __{convert.__name__}__ raised {raised}>"


def format_traceback(error: BaseException) -> str:
    """Return an exception with its traceback, clipped."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as failure:  # e.g. a SyntaxError with invalid attributes
        text = f"{describe_error(error)}\n(its traceback raised {type(failure).__name__})\n"
    return clip(text, MAX_TRACEBACK)
