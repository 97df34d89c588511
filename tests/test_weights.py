from __future__ import annotations

import numpy as np
import pytest
import torch

from rayrl.errors import DataError
from rayrl.weights import Entry, checksum, flatten, unflatten


def test_layout_by_hand() -> None:
    flat, manifest = flatten(
        [("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([[3]], dtype=torch.int8))]
    )
    assert manifest.entries == (Entry("a", "float32", (2,), 0), Entry("b", "int8", (1, 1), 64))
    assert manifest.nbytes == flat.nbytes == 128
    assert flat[:8].view(np.float32).tolist() == [1.0, 2.0]
    assert flat[8:64].sum() == 0
    assert flat[64] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_roundtrip_is_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "w": (torch.randn(3, 5) * 100).to(dtype),
        "t": torch.arange(6).reshape(2, 3).T.to(dtype),  # not contiguous
        "scalar": torch.tensor(7).to(dtype),
        "none": torch.empty(0, 4, dtype=dtype),
    }
    flat, manifest = flatten(tensors)
    back = unflatten(flat, manifest)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == dtype


def test_tied_parameters_appear_once() -> None:
    shared = torch.randn(4, 2)
    _, manifest = flatten({"embed": shared, "view": shared[:2], "head": shared})
    assert manifest.names() == ("embed", "view")


def test_read_only_buffers_are_fine() -> None:
    flat, manifest = flatten({"a": torch.ones(3)})
    flat.flags.writeable = False
    assert torch.equal(unflatten(flat, manifest)["a"], torch.ones(3))


def test_checksum_sees_every_bit() -> None:
    flat, manifest = flatten({"a": torch.zeros(1000)})
    before = checksum(flat)
    assert before == checksum(flat.copy())
    flat[3999] ^= 1
    assert checksum(flat) != before
    assert checksum(np.zeros(0, np.uint8)) == "e4a6a0577479b2b4"
    with pytest.raises(DataError, match="does not belong to its manifest"):
        unflatten(flat[:-64], manifest)
