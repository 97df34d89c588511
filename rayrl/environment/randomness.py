"""Per-episode versions of Python's and NumPy's module-level random generators.

Games written to be played one at a time draw from `random.random()`, `random.choice`,
`np.random.rand` and so on. With hundreds of live episodes on one event loop they would all draw
from one stream, in an order that depends on which reply arrives first. Inside
`with EpisodeRandom(seed):` these functions draw from generators of that episode alone, which are
created from its seed on first use. Elsewhere they draw from the process's generators as usual.

A context variable identifies the running episode, so this also works in coroutines, tasks and
callbacks that the code starts, and in `asyncio.to_thread`. It does not work for:

- threads without a copy of the context: `threading.Thread`, `loop.run_in_executor`;
- references to `random.random`, `getrandbits`, `seed`, `getstate` or `setstate`, or to any function
  of `np.random`, stored anywhere but in a module's global variable (a class attribute, a default
  argument, a closure) before the first episode of the process;
- separate generators: `random.Random()`, `np.random.default_rng()`, those of compiled code.
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
"""The episode whose generators the running code draws from; None: the process's generators."""


class EpisodeRandom:
    """The module-level generators of an episode; code inside the `with` block draws from them.

    Args:
        seed: parts of the seed, as for `derive_seed`.
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

    # `setdefault`, because two threads of an episode may create a generator at the same time

    @property
    def python(self) -> random.Random:
        """Generator that `random.*` draws from."""
        generator: random.Random | None = self.__dict__.get("_python")
        if generator is None:
            new = random.Random(derive_seed(*self._seed, "python"))
            generator = self.__dict__.setdefault("_python", new)
        return generator

    @property
    def numpy(self) -> Any:
        """The `np.random.RandomState` that `np.random.*` draws from."""
        generator = self.__dict__.get("_numpy")
        if generator is None:
            new = sys.modules["numpy.random"].RandomState(derive_seed(*self._seed, "numpy") >> 31)
            generator = self.__dict__.setdefault("_numpy", new)
        return generator


_installed = False
_installing = threading.Lock()


def _install() -> None:
    """Make the module-level functions look up the running episode.

    The process's own random numbers do not change. Most functions of `random` call methods of a
    hidden instance, so changing its class redirects them. The others, and those of NumPy, are
    replaced in every module that has them, e.g. by `from random import random`.
    """
    global _installed
    with _installing:
        if not _installed:
            _replace_functions()
            _installed = True


def _replace_functions() -> None:
    import numpy.random.mtrand as mtrand  # NumPy 2 loads it lazily, possibly inside an episode

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


# those that draw without calling another method of the hidden instance
_PYTHON_FUNCTIONS = ("random", "getrandbits", "seed", "getstate", "setstate")


class _PythonRandom(random.Random):
    """The class of `random`'s hidden instance, which holds the process's state."""

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
        """The second of the two numbers that `gauss` draws together."""
        own = EPISODE.get()
        value: float | None = (
            self.__dict__["gauss_next"] if own is None else own.python.gauss_next  # type: ignore[attr-defined]
        )
        return value

    @gauss_next.setter
    def gauss_next(self, value: float | None) -> None:
        own = EPISODE.get()
        (self if own is None else own.python).__dict__["gauss_next"] = value

    def __reduce__(self) -> tuple[Any, ...]:  # a copy is an ordinary generator
        return random.Random, (), self.getstate()


def _numpy_functions(mtrand: Any) -> list[tuple[Any, Any]]:
    """Return the objects of NumPy's legacy generator to replace, each with its replacement.

    The functions are methods of `mtrand._rand`, which SciPy and others also use as the default
    generator.
    """
    process = mtrand._rand

    def current() -> Any:
        own = EPISODE.get()
        return process if own is None else own.numpy

    def method(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(mtrand.RandomState, name))
        def call(self: object, *args: Any, **keywords: Any) -> Any:
            return getattr(current(), name)(*args, **keywords)

        return call

    public = [
        name for name, value in inspect.getmembers(mtrand.RandomState, callable) if name[0] != "_"
    ]
    own = [*public, "__getstate__", "__setstate__", "__reduce__", "__repr__", "__str__"]
    members: dict[str, Any] = {name: method(name) for name in own}
    members["_bit_generator"] = property(lambda self: current()._bit_generator)
    hidden = type("RandomState", (mtrand.RandomState,), members)()

    def get_bit_generator() -> Any:
        return current()._bit_generator

    def set_bit_generator(bitgen: Any) -> None:
        current().__init__(bitgen)

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
