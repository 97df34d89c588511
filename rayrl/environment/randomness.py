"""Python's and NumPy's module-level generators, one of each per episode.

Games that were written to be played one at a time draw from `random.random()`, `random.choice`,
`np.random.rand` and so on. With hundreds of live episodes on one event loop they would all draw
from one stream, in an order that depends on who answers first. Inside `with EpisodeRandom(seed):`
these functions draw from generators of that episode alone, which are made from its seed when they
are first used. Everywhere else they draw from the process's generators, as ever.

A context variable says whose code is running, so it is also right in coroutines, tasks and
callbacks that the code starts, and in `asyncio.to_thread`. What cannot be reached:

- a thread that gets no copy of the context: `threading.Thread`, `loop.run_in_executor`;
- `random.random`, `getrandbits`, `seed`, `getstate` or `setstate` of Python, or any function of
  `np.random`, that something other than a module's global variable (a class attribute, a default
  argument, a closure) took hold of before the first episode of the process;
- generators of their own: `random.Random()`, `np.random.default_rng()`, those of compiled code.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from rayrl.types import derive_seed

__all__ = ["EPISODE", "EpisodeRandom"]

EPISODE: ContextVar[EpisodeRandom | None] = ContextVar("rayrl_episode_random", default=None)
"""Whose generators the running code draws from; None: the process's."""


class EpisodeRandom:
    """The module-level generators of an episode, which code inside the `with` block draws from.

    Args:
        seed: whatever they depend on, as for `derive_seed`.
    """

    def __init__(self, *seed: object) -> None:
        self._seed = seed
        self._outer: EpisodeRandom | None = None

    def __enter__(self) -> None:
        if not _installed:
            _install()
        self._outer = EPISODE.get()
        EPISODE.set(self)

    def __exit__(self, *error: object) -> None:
        EPISODE.set(self._outer)

    # `setdefault`, because two threads of an episode may ask for the first time at once

    @property
    def python(self) -> random.Random:
        """What `random.*` draws from."""
        known: random.Random | None = self.__dict__.get("_python")
        if known is None:
            made = random.Random(derive_seed(*self._seed, "python"))
            known = self.__dict__.setdefault("_python", made)
        return known

    @property
    def numpy(self) -> Any:
        """The `np.random.RandomState` that `np.random.*` draws from."""
        known = self.__dict__.get("_numpy")
        if known is None:
            made = sys.modules["numpy.random"].RandomState(derive_seed(*self._seed, "numpy") >> 31)
            known = self.__dict__.setdefault("_numpy", made)
        return known


_installed = False
_installing = threading.Lock()


def _install() -> None:
    """Let the module-level functions ask whose code is running. No number of the process changes.

    Most functions of `random` call methods of a hidden instance, and follow when its class changes.
    The others are replaced, and so are those of NumPy, in every module that has them: also in those
    which did `from random import random` before.
    """
    global _installed
    with _installing:
        if not _installed:
            _replace_functions()
            _installed = True


def _replace_functions() -> None:
    import numpy.random.mtrand as mtrand  # NumPy 2 loads it at its first use, in an episode perhaps

    hidden: Any = random._inst
    hidden.__class__ = _PythonRandom
    replaced = [(getattr(random, name), getattr(hidden, name)) for name in _PYTHON_FUNCTIONS]
    replaced += _numpy_functions(mtrand)
    new = {id(old): new for old, new in replaced}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name, value in list(names.items()):
            if id(value) in new:
                names[name] = new[id(value)]


_PYTHON_FUNCTIONS = ("random", "getrandbits", "seed", "getstate", "setstate")  # not by a method


class _PythonRandom(random.Random):
    """The class of `random`'s hidden instance: its state is the process's, outside of episodes."""

    def random(self) -> float:
        own = EPISODE.get()
        return super().random() if own is None else own.python.random()

    def getrandbits(self, k: int, /) -> int:
        own = EPISODE.get()
        return super().getrandbits(k) if own is None else own.python.getrandbits(k)

    def seed(self, a: Any = None, version: int = 2) -> None:
        own = EPISODE.get()
        return super().seed(a, version) if own is None else own.python.seed(a, version)

    def getstate(self) -> tuple[Any, ...]:
        own = EPISODE.get()
        return super().getstate() if own is None else own.python.getstate()

    def setstate(self, state: tuple[Any, ...]) -> None:
        own = EPISODE.get()
        return super().setstate(state) if own is None else own.python.setstate(state)

    @property
    def gauss_next(self) -> float | None:
        """The second of the two numbers that `gauss` draws at once."""
        own = EPISODE.get()
        kept: float | None = (
            self.__dict__["gauss_next"] if own is None else own.python.gauss_next  # type: ignore[attr-defined]
        )
        return kept

    @gauss_next.setter
    def gauss_next(self, value: float | None) -> None:
        own = EPISODE.get()
        (self if own is None else own.python).__dict__["gauss_next"] = value

    def __reduce__(self) -> tuple[Any, ...]:  # a copy is a generator of its own
        return random.Random, (), self.getstate()


def _numpy_functions(mtrand: Any) -> list[tuple[Any, Any]]:
    """What is to be replaced in modules that use NumPy's legacy generator, and by what.

    `mtrand._rand` is what its functions are methods of, and what SciPy and others take for "no
    generator given".
    """
    process = mtrand._rand

    def now() -> Any:
        own = EPISODE.get()
        return process if own is None else own.numpy

    def method(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(mtrand.RandomState, name))
        def call(self: object, *args: Any, **keywords: Any) -> Any:
            return getattr(now(), name)(*args, **keywords)

        return call

    public = [
        name for name, value in inspect.getmembers(mtrand.RandomState, callable) if name[0] != "_"
    ]
    own = [*public, "__getstate__", "__setstate__", "__reduce__", "__repr__", "__str__"]
    members: dict[str, Any] = {name: method(name) for name in own}
    members["_bit_generator"] = property(lambda self: now()._bit_generator)
    hidden = type("RandomState", (mtrand.RandomState,), members)()

    def get_bit_generator() -> Any:
        return now()._bit_generator

    def set_bit_generator(bitgen: Any) -> None:
        now().__init__(bitgen)

    replaced = [
        (value, getattr(hidden, name))
        for name, value in vars(mtrand).items()
        if getattr(value, "__self__", None) is process
    ]
    return [
        *replaced,
        (process, hidden),
        (mtrand.get_bit_generator, functools.wraps(mtrand.get_bit_generator)(get_bit_generator)),
        (mtrand.set_bit_generator, functools.wraps(mtrand.set_bit_generator)(set_bit_generator)),
    ]
