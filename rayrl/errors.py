"""Every error rayrl raises on purpose.

RayrlError
├── ConfigError      a key or value is wrong; names the key, the value and what to do
├── DataError        a file is malformed; names the file and the line
├── EnvError         an environment's own code went wrong; recorded, counted against a budget
├── InfraError       a process, connection or deadline failed; retried with the same task and seed
│   └── StaleWeights a replica could not reach the version a request asked for
├── Refused          a server will not answer one conversation; recorded, and not asked again
├── NumericsError    a loss, gradient or logprob that cannot be trained on
└── RunFailed        the run stops; what is on disk can be resumed
    └── LearnerLost  a learner process died; a training run starts it again from its checkpoint
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
    "described",
    "did_you_mean",
    "message_of",
    "shown",
    "traceback_of",
]


class RayrlError(Exception):
    """Base of all errors raised on purpose; the CLI prints these without a traceback."""


class ConfigError(RayrlError):
    """A configuration key or value is wrong."""


class DataError(RayrlError):
    """A file does not hold what it should."""


class EnvError(RayrlError):
    """An environment raised, hung past its deadline or returned scores that cannot be used."""


class InfraError(RayrlError):
    """Something around the episode failed: a replica, a connection, a deadline. Retried."""


class StaleWeights(InfraError):
    """A replica holds older weights than a request allows and could not fetch newer ones."""


class Refused(RayrlError):
    """A server refuses one conversation (its length, its content) and answers others."""


class NumericsError(RayrlError):
    """A number that must be finite is not."""


class RunFailed(RayrlError):
    """The run cannot go on; the message says why and how to resume."""


class LearnerLost(RunFailed):
    """A learner process died."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or an empty string if none is near."""
    near = difflib.get_close_matches(word[:200], list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


MOST_MESSAGE = 4_000  # characters that are kept of what somebody else's code says
MOST_TRACEBACK = 20_000


def clip(text: str, most: int = MOST_MESSAGE) -> str:
    """`text` in at most `most` characters (100 or more): a longer one without its middle."""
    if len(text) <= most:
        return text
    kept = most - 60  # the rest is for saying so
    head = kept * 2 // 3
    left_out = len(text) - kept
    return f"{text[:head]} … [{left_out:,} characters left out] … {text[head - kept :]}"


def message_of(error: BaseException) -> str:
    """The message of an exception that somebody else's code raised, clipped.

    Its `__str__` is their code as well, and may raise whatever it likes.
    """
    return _written(str, error)


def described(error: BaseException) -> str:
    """Type and message of an exception that somebody else's code raised, clipped."""
    message = message_of(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def shown(value: object, most: int = 1_000) -> str:
    """`repr` of a value of somebody else's, which may raise as well; clipped."""
    return _written(repr, value, most)


def _written(how: Callable[[object], str], value: object, most: int = MOST_MESSAGE) -> str:
    try:
        return clip(how(value), most)
    except KeyboardInterrupt:
        raise
    except BaseException as broken:
        kind, own = type(value).__name__, type(broken).__name__
        return f"<{kind}, whose __{how.__name__}__ raised {own}>"


def traceback_of(error: BaseException) -> str:
    """An exception with its traceback, clipped."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as broken:  # a SyntaxError with attributes of their own making, for one
        text = f"{described(error)}\n(its traceback raised {type(broken).__name__})\n"
    return clip(text, MOST_TRACEBACK)
