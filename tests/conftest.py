"""For all tests: each worker's own folders, the order of tests, and models to read."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

import rayrl.cluster  # noqa: F401  # sets what Ray reads when it is imported, before a test imports it
from tests.apart import Shared, own_folders
from tests.runs import RANKS, train

if TYPE_CHECKING:
    from rayrl.cluster.session import Session

# The same examples every time, however slow the machine. --hypothesis-profile=default draws others.
settings.load_profile("ci")
# A seventh of the time of imports and of tests went to garbage collection. What is there when all
# tests have been collected is no garbage.
gc.set_threshold(500_000, 20, 100)
# Before torch is imported: tests run beside each other, and threads that wait would spin.
os.environ["OMP_NUM_THREADS"] = "1"
ALONE = ("tests/chaos/", "tests/e2e/")  # whose tests take a minute or more each
SLOW = (  # they start other programs, or play many runs one after the other
    "tests/cluster/test_fork_server.py",
    "tests/commands/test_recipe.py",
    "tests/commands/test_replay.py",
    "tests/commands/test_submit.py",
    "tests/environment/schemes/test_openenv.py",
    "tests/learner/test_export.py",
    "tests/learner/test_learner_memory.py",
    "tests/report/test_browser.py",
    "tests/rollout/mcp/",
    "tests/rollout/programs/",
    "tests/rollout/sandbox/test_escapes.py",
    "tests/rollout/test_subprocess_env.py",
    "tests/run/sampling/test_difficulty.py",
    "tests/run/test_damage.py",
    "tests/weights/test_broadcast.py",
)
remove_own_folders = own_folders()


def pytest_configure(config: pytest.Config) -> None:
    """In each of several workers, let all runs be forked from one child that imports everything."""
    if hasattr(config, "workerinput") and sys.platform == "linux":
        from rayrl.cluster.actors import import_variables
        from rayrl.cluster.fork_server import WARM, ForkServer

        folder = Path(tempfile.gettempdir())
        warm = ForkServer(folder, all_imports(), import_variables(threads=1))
        os.environ[WARM] = str(warm.path)
        config.add_cleanup(warm.stop)


def all_imports() -> list[str]:
    """What the processes of any run are forked with."""
    from rayrl.cluster.open import worker_imports
    from rayrl.config import from_dict

    every = from_dict({"learner": {"kind": "deepspeed"}, "cluster": {"fork_workers": True}})
    return worker_imports(every, engine=True, learner=True)


def pytest_unconfigure() -> None:
    remove_own_folders()


def file_or_run(nodeid: str) -> str:
    """What one worker is given at a time."""
    return nodeid if nodeid.startswith(ALONE) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, which share what is made for a module; whole runs singly."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return file_or_run(nodeid)

        def remove_node(self, node: Any) -> str | None:
            # Of a worker that died, what it had done would be given to the others: they wait for
            # the end of a file in which there is nothing to do, and the tests never end.
            files = self.assigned_work[node]
            for file in [file for file, done in files.items() if all(done.values())]:
                del files[file]
            return super().remove_node(node)

    return ByFile(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what needs Ray as slow, and `SLOW`."""
    needs_ray = "session" in item.fixturenames  # type: ignore[attr-defined]
    if needs_ray or item.nodeid.startswith(SLOW):
        item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put quick tests between slow ones, which wait much, and at the end, which they fill."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(file_or_run(item.nodeid), []).append(item)
    slow, quick = [], []
    for file in files.values():
        is_slow = any(item.get_closest_marker("slow") for item in file)
        (slow if is_slow else quick).append(file)
    if not slow:
        return
    between = len(quick) * 3 // (4 * len(slow))
    order = []
    for k, file in enumerate(slow):
        order += [file, *quick[k * between : (k + 1) * between]]
    items[:] = itertools.chain(*order, *quick[len(slow) * between :])


def pytest_collection_finish() -> None:
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries count what is left at the end, and complain


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Makes folders that all workers read."""
    own = tmp_path_factory.getbasetemp()
    return Shared(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes on one thread, so that sums have one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some thousand parameters, to be read only."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def calm(tiny: Path, shared: Shared) -> Path:
    """The folder of a run that was left alone, in a home of its own, to be read only."""

    def make(folder: Path) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_")}
        folder.mkdir()
        train(tiny, folder / "run", env={**env, "HOME": str(folder)})

    return shared("calm", make) / "run"


@pytest.fixture(scope="session")
def calm_ranks(tiny: Path, shared: Shared) -> Path:
    """The same with two learner ranks."""
    return shared("calm-ranks", lambda folder: train(tiny, folder, *RANKS))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """A local Ray, for all tests of a module."""
    from rayrl.cluster.session import open_session
    from rayrl.config import ClusterConfig

    with open_session(ClusterConfig(), imports=all_imports()) as session:
        yield session
