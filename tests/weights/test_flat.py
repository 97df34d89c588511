from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrl.errors import DataError
from rayrl.weights.flat import (
    Entry,
    buckets,
    checksum,
    flatten,
    layout,
    read_checksum,
    unflatten,
)


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


def test_checksum_by_hand() -> None:
    """One word x: the only block is x * key 0, padded with zeros."""
    key = int.from_bytes(hashlib.blake2b(b"\0\0").digest()[:8], "little") | 1
    digest = hashlib.blake2b((4).to_bytes(8, "little"), digest_size=8)
    digest.update((7 * key % 2**64).to_bytes(8, "little"))
    assert checksum(np.array([7, 0, 0, 0], np.uint8)) == digest.hexdigest()


@pytest.mark.parametrize("n", [0, 3, 64, 32_768, 32_769, 9_000_003])
def test_checksum_is_the_same_for_arrays_and_tensors_and_depends_on_every_bit(n: int) -> None:
    flat = np.random.default_rng(0).integers(0, 256, n, np.uint8)
    before = checksum(flat)
    assert before == checksum(torch.from_numpy(flat.copy()))
    assert before != checksum(np.append(flat, np.uint8(0)))
    for at in {0, n // 2, n - 1} if n else ():
        flat[at] ^= 128
        assert checksum(flat) != before
        flat[at] ^= 128
    if n > 40_000:
        for low, high in ((0, 4), (0, 32_768)):  # swap two words, then two blocks
            flat[[low, high]] = flat[[high, low]]
            assert checksum(flat) != before


@pytest.mark.parametrize("n", [0, 1, 32_768, 32_769, 1 << 23, (1 << 23) + 5, (1 << 24) + 32_768])
def test_a_file_has_the_checksum_of_its_bytes(n: int, tmp_path: Path) -> None:
    flat = np.random.default_rng(n).integers(0, 256, n, np.uint8)
    (tmp_path / "file").write_bytes(flat.tobytes())
    assert read_checksum(tmp_path / "file") == (n, checksum(flat))


def test_a_buffer_of_another_length_is_refused() -> None:
    flat, manifest = flatten({"a": torch.zeros(1000)})
    with pytest.raises(DataError, match="does not match its manifest"):
        unflatten(flat[:-64], manifest)


def test_buckets_by_hand() -> None:
    """Sizes 64, 128 (for 65), 192 and 64 bytes into buckets of 192."""
    sizes = {"a": 64, "b": 65, "c": 192, "d": 1}
    tensors = [(name, torch.uint8, (size,)) for name, size in sizes.items()]
    plan = buckets(tensors, 192)
    assert [manifest.names() for manifest in plan] == [("a", "b"), ("c",), ("d",)]
    assert [manifest.nbytes for manifest in plan] == [192, 192, 64]
    assert [e.offset for e in plan[0].entries] == [0, 64]
    assert [manifest.names() for manifest in buckets(tensors, 1)] == [
        ("a",),
        ("b",),
        ("c",),
        ("d",),
    ]
    assert buckets(tensors, 9999) == (layout(tensors),)
    assert buckets([], 192) == ()
