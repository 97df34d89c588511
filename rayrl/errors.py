"""Every error rayrl raises on purpose.

RayrlError
├── ConfigError      a key or value is wrong; names the key, the value and what to do
├── DataError        a file is malformed; names the file and the line
├── EnvError         an environment's own code went wrong; recorded, counted against a budget
├── InfraError       a process, connection or deadline failed; retried with the same task and seed
│   └── StaleWeights a replica could not reach the version a request asked for
├── NumericsError    a loss, gradient or logprob that cannot be trained on
└── RunFailed        the run stops; what is on disk can be resumed
    └── LearnerLost  a learner process died; a training run starts it again from its checkpoint
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "EnvError",
    "InfraError",
    "LearnerLost",
    "NumericsError",
    "RayrlError",
    "RunFailed",
    "StaleWeights",
    "did_you_mean",
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


class NumericsError(RayrlError):
    """A number that must be finite is not."""


class RunFailed(RayrlError):
    """The run cannot go on; the message says why and how to resume."""


class LearnerLost(RunFailed):
    """A learner process died."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
