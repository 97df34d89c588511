"""Attention in C++ against float64, and against itself with other tokens, threads and vectors."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrl.native import Contexts, Unavailable, attend, attend_trie, lanes, library, missing
from rayrl.native import attention as native

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"{missing()}")


@pytest.fixture(scope="module")
def fewer_lanes(tmp_path_factory):
    """The library as on a CPU without AVX512."""
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has the shorter vectors anyway")
    file = tmp_path_factory.mktemp("native") / "other.so"
    library.compile_to(file, library.find_compiler(), "-mno-avx512f")
    return ctypes.CDLL(str(file))


@pytest.fixture(params=["native", "avx2"])
def vectors(request, monkeypatch):
    """The library with vectors of either length."""
    if request.param == "avx2":
        other = request.getfixturevalue("fewer_lanes")
        monkeypatch.setattr(native, "load", lambda: other)
        assert other.rayrl_lanes() == 8
    lanes.cache_clear()
    yield
    lanes.cache_clear()


def random_contexts(rng, conversations, columns, table):
    """Tokens of conversations that share rows of a table; several in turn of some of them."""
    rows = rng.integers(0, table, (conversations, columns))
    slots, positions = [], []
    for slot in rng.permutation(conversations):
        first = int(rng.integers(0, columns))
        last = min(columns, first + int(rng.choice([1, 1, 3, 40])))
        slots += [slot] * (last - first)
        positions += range(first, last)
    return Contexts.of(rows, np.array(slots), np.array(positions))


def plain(contexts, query, keys, values, scale):
    """Token by token, in float64."""
    out = []
    group = query.shape[1] // keys.shape[1]
    for t, (slot, position) in enumerate(zip(contexts.slots, contexts.positions, strict=True)):
        seen = torch.from_numpy(contexts.rows[slot, : position + 1].astype(np.int64))
        k, v = (x[seen].double().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("hd,nhd->hn", query[t].double(), k) * scale
        out.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
    return torch.stack(out)


SHAPES = [  # heads, key heads, width, columns
    (4, 4, 16, 70),
    (9, 3, 64, 130),
    (8, 1, 80, 17),
    (2, 2, 128, 15),
    (6, 2, 48, 1),
    (5, 5, 112, 333),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_float64_and_has_the_same_bits_in_any_call(vectors, shape, dtype):
    heads, kv_heads, width, columns = shape
    rng = np.random.default_rng(columns)
    torch.manual_seed(columns)
    contexts = random_contexts(rng, 9, columns, 200)
    tokens = len(contexts.slots)
    query = torch.randn(tokens, heads, width) * 3
    keys, values = (torch.randn(200, kv_heads, width).to(dtype) for _ in range(2))
    scale = width**-0.5
    normalizers = torch.empty(tokens, heads)
    got = attend(contexts, query, keys, values, scale, 1, normalizers)
    want = plain(contexts, query, keys, values, scale)
    assert (got - want).abs().max() < 1e-5
    assert torch.equal(attend(contexts, query, keys, values, scale, 1), got)
    for t in rng.permutation(tokens)[:20]:  # each alone
        one = Contexts.of(contexts.rows, contexts.slots[t : t + 1], contexts.positions[t : t + 1])
        assert torch.equal(attend(one, query[t : t + 1], keys, values, scale, 1)[0], got[t])
    order = rng.permutation(tokens)  # in another order
    other = Contexts.of(contexts.rows, contexts.slots[order], contexts.positions[order])
    assert torch.equal(attend(other, query[order], keys, values, scale, 1), got[order])


def test_any_number_of_threads_gives_the_same_results(vectors, monkeypatch):
    monkeypatch.setattr(native, "THREAD_WORK", 1)
    rng = np.random.default_rng(0)
    contexts = random_contexts(rng, 9, 50, 100)
    query = torch.randn(len(contexts.slots), 6, 32)
    keys, values = torch.randn(100, 3, 32), torch.randn(100, 3, 32)
    one = attend(contexts, query, keys, values, 0.2, 1)
    for threads in (2, 3, 7, 1000):
        assert torch.equal(attend(contexts, query, keys, values, 0.2, threads), one)
    trie, (q, k, v) = path(rng, 30, 4, 2, 32, 32)

    def gradients(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        out = attend_trie(trie, q, k, v, 0.2)
        return out, torch.autograd.grad(out.square().sum(), (q, k, v))

    out, want = gradients(1)
    for threads in (2, 5, 1000):
        again, got = gradients(threads)
        assert torch.equal(again, out)
        assert torch.equal(got[0], want[0])
        for one, a, b in zip(gradients(threads)[1], got, want, strict=True):
            assert torch.equal(one, a)  # the same every time, but not that of one thread
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_scores_of_any_size_are_no_trouble(vectors):
    contexts = Contexts.of(np.arange(40)[None], np.zeros(40, int), np.arange(40))
    keys, values = torch.randn(40, 1, 16), torch.randn(40, 1, 16)
    for size in (0.0, 1e-30, 50.0, 1e4, 1e18):
        query = torch.randn(40, 1, 16) * size
        got = attend(contexts, query, keys, values, 1.0, 1)
        want = plain(contexts, query, keys, values, 1.0)
        assert got.isfinite().all()
        assert (got - want).abs().max() < 1e-3, size  # scores of 1e4 differ by 1e-3 in fp32
    assert torch.equal(got[0], values[0])  # which sees itself alone


def test_what_is_not_a_number_stays_with_those_who_see_it(vectors):
    contexts = Contexts.of(np.arange(40)[None], np.zeros(40, int), np.arange(40))
    query, keys, values = (torch.randn(40, 1, 16) for _ in range(3))
    clean = attend(contexts, query, keys, values, 1.0, 1)
    keys[20] = torch.nan
    values[20] = torch.nan
    got = attend(contexts, query, keys, values, 1.0, 1)
    assert torch.equal(got[:20], clean[:20])
    assert got[20:].isnan().all()


def path(rng, n, heads, kv_heads, width, value_width):
    """Contexts of a random trie of `n` tokens, and its queries, keys and values."""
    parent = [-1] + [int(rng.integers(max(0, i - 4), i)) for i in range(1, n)]
    rows, positions = np.zeros((n, n), int), np.zeros(n, int)
    for i in range(n):  # a conversation for each token
        chain = [i]
        while parent[chain[-1]] >= 0:
            chain.append(parent[chain[-1]])
        positions[i] = len(chain) - 1
        rows[i, : len(chain)] = chain[::-1]
    given = [
        torch.randn(n, h, d).requires_grad_()
        for h, d in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    ]
    return Contexts.of(rows, np.arange(n), positions), given


def row_of(rng, n, heads, kv_heads, width, value_width):
    """The same of a single row, whose tokens are worked on together."""
    _, given = path(rng, n, heads, kv_heads, width, value_width)
    return Contexts.of(np.arange(n)[None], np.zeros(n, int), np.arange(n)), given


@pytest.mark.parametrize("make", [path, row_of])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width"),
    [(4, 4, 32, 32), (6, 2, 64, 64), (3, 1, 16, 16), (4, 2, 12, 20), (2, 2, 96, 64), (1, 1, 1, 1)],
)
def test_gradients_are_those_of_float64(vectors, make, heads, kv_heads, width, value_width):
    rng = np.random.default_rng(width)
    torch.manual_seed(width)
    contexts, given = make(rng, 77, heads, kv_heads, width, value_width)
    of_out = torch.randn(77, heads, value_width)
    out = attend_trie(contexts, *given, scale=0.3)
    got = [out, *torch.autograd.grad(out, given, of_out)]
    exact = [x.detach().double().requires_grad_() for x in given]
    true = plain(contexts, *exact, 0.3)
    want = [true, *torch.autograd.grad(true, exact, of_out.double())]
    for a, b in zip(got, want, strict=True):
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-6 * max(1.0, float(b.abs().max()))


def test_no_tokens_and_strided_tensors(vectors):
    nothing = Contexts.of(np.zeros((0, 0)), np.zeros(0), np.zeros(0))
    keys = torch.randn(3, 1, 16)
    assert attend(nothing, torch.zeros(0, 1, 16), keys, keys, 1.0, 1).shape == (0, 1, 16)
    contexts, given = row_of(np.random.default_rng(0), 9, 2, 2, 16, 16)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    assert not turned[0].is_contiguous()
    assert torch.equal(
        attend_trie(contexts, *turned, scale=1.0), attend_trie(contexts, *given, 1.0)
    )
    with pytest.raises(ValueError, match="not contiguous"):
        attend(contexts, turned[0], keys, keys, 1.0, 1)


# Finding the library.


def found_with(tmp_path, **env):
    """What a new process finds, and how many compilers it ran."""
    script = (
        "from rayrl.native import library\n"
        "run, ran = library.subprocess.run, []\n"
        "library.subprocess.run = lambda *a, **k: (ran.append(a), run(*a, **k))[1]\n"
        "print(library.missing(), len(ran))"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **env}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_library_is_compiled_once(tmp_path):
    assert found_with(tmp_path) == "None 1"
    assert found_with(tmp_path) == "None 0"
    (kept,) = (tmp_path / "cache" / "rayrl").iterdir()
    assert kept.name.startswith("attention-")
    kept.write_text("no library")  # cut short, or of another system
    assert found_with(tmp_path) == "None 1"


def test_without_a_cache_each_process_compiles_for_itself(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    assert found_with(tmp_path) == "None 1"


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("false", "fails (1)"),
        ("no-such-compiler", "there is no C++ compiler (no-such-compiler)"),
    ],
)
def test_what_is_missing_is_said(tmp_path, compiler, says):
    assert says in found_with(tmp_path, CXX=compiler)


def test_a_missing_library_is_an_error_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(library, "_find", lambda: Unavailable("no compiler"))
    with pytest.raises(Unavailable, match="no compiler"):
        library.load()
    assert missing() == "no compiler"
