"""For all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import rayrl.cluster  # noqa: F401  # sets what Ray reads when it is imported, before a test imports it

if TYPE_CHECKING:
    from rayrl.cluster.session import Session


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


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """A local Ray, for all tests of a module."""
    from rayrl.cluster.session import open_session
    from rayrl.config import from_dict

    with open_session(from_dict({}).cluster) as session:
        yield session
