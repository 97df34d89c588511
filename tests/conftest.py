"""For all tests."""

from collections.abc import Iterator

import pytest

import rayrl.cluster  # noqa: F401  # sets what Ray reads when it is imported, before a test imports it


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes on one thread, so that sums have one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
