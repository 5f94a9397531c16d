"""The compiled CPU kernels against their references, which compute in float32 what the kernels round once."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aiolora.config import Environment
from aiolora.ops import build_native, native
from aiolora.ops.activation import silu_mul, silu_mul_op
from aiolora.ops.attention import attention, attention_op, rope_store, rope_store_op
from aiolora.ops.linear import whole_linear, whole_linear_op
from aiolora.ops.norm import add_norm, add_norm_op, rms_norm, rms_norm_op
from tests.ops.routing import adjusted, routing, tables, vectors

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here, or AIOLORA_NATIVE=0")

DTYPES = [torch.float32, torch.bfloat16]
MIXES = {
    "none": [-1] * 33,
    "one": [0] * 33,
    "all distinct": list(range(33)),
    "some none": [2, -1, 0, 2, -1, 1, 1, -1] * 5,
    "some in no tile": [2, -2, 0, 2, -1, 1, 1, -2] * 5,
    "zipf": [0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 4] * 3,
}


def assert_rounded_once(out: Tensor, expected: Tensor) -> None:
    """`out` is the float32 `expected` up to one rounding of its dtype and the order of summation."""
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 1.0
    rtol, atol = (1e-5, 2e-6 * scale) if out.dtype == torch.float32 else (2**-8, 1e-5 * scale)
    torch.testing.assert_close(out.float(), expected, rtol=rtol, atol=atol, equal_nan=True)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.float() if t.is_floating_point() else t for t in tensors]


def routed(mix: list[int], ranks: list[int]) -> list[Tensor]:
    """[perm, tiles, pages, scales, vector pages] of tokens with those of the adapters of `ranks`."""
    return routing(mix, *tables(ranks), 16)


def pool(ranks: list[int], slices: int, width: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a, b as views into bigger tensors, as the pool makes them, the last ranks of each last page zero."""
    total = sum(-(-rank // 8) for rank in ranks)
    a = torch.randn(total + 3, slices + 1, 8, width).to(dtype)[2:].transpose(0, 1)[:slices]
    b = torch.randn(total + 3, 2, 8, columns).to(dtype)[:, 1]
    a[:, :, 6:] = 0
    return a, b


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AIOLORA_NATIVE", "0")
    native.library.cache_clear()
    yield
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "columns"), [(7, 5), (1, 1), (64, 33), (80, 130), (576, 192)])
def test_a_plain_linear_is_the_product_for_every_number_of_tokens(dtype: torch.dtype, width: int, columns: int) -> None:
    weight = torch.randn(columns, width).to(dtype)
    for tokens in [*range(34), 49, 200]:
        x = torch.randn(tokens, width).to(dtype)
        out = whole_linear_op(x, weight, [], [])
        assert out.dtype == dtype
        assert out.shape == (tokens, columns)
        assert_rounded_once(out, x.float() @ weight.float().T)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_add_their_share_in_every_mix(dtype: torch.dtype, adapter_dtype: torch.dtype, mix: str) -> None:
    ranks = [0 if i % 6 > 3 else 1 + 7 * i % 64 for i in range(33)]  # some have vectors alone, some nothing
    for tokens, width, bounds in [(1, 7, [0, 5]), (8, 64, [0, 40, 57, 70]), (31, 80, [0, 3, 66]), (99, 33, [0, 64])]:
        columns, slices = bounds[-1], len(bounds) - 1
        rows = routed((3 * MIXES[mix])[:tokens], ranks)
        a, b = pool(ranks, slices, width, columns, adapter_dtype)
        v = vectors(len(ranks), columns)
        x, weight = torch.randn(tokens, width).to(dtype), torch.randn(columns, width).to(dtype)
        out = native.linear(x, weight, [a, b, v, *rows], [1, *bounds])
        assert out is not None
        assert_rounded_once(out, whole_linear(*wide(x, weight), wide(a, b, v, *rows), [1, *bounds]))


def test_a_row_of_a_linear_does_not_depend_on_its_batch_mates_or_threads() -> None:
    ranks = [1, 8, 20, 64, 33]
    adapters = [t % 5 for t in range(32)]
    a, b = pool(ranks, 2, 80, 70, torch.bfloat16)
    x, weight = torch.randn(32, 80).bfloat16(), torch.randn(70, 80).bfloat16()
    (pages, scales), v = tables(ranks), vectors(len(ranks), 70)

    def served(tokens: list[int]) -> Tensor:
        rows = routing([adapters[t] for t in tokens], pages, scales, 16)
        return whole_linear_op(x[tokens], weight, [a, b, v, *rows], [1, 0, 33, 70])

    together = served(list(range(32)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for tokens in [list(range(32)), [3], [3, 8, 13], list(range(7, 20))]:
        assert torch.equal(served(tokens), together[tokens])
    torch.set_num_threads(threads)


def test_only_the_listed_pages_are_read() -> None:
    ranks = [16, 8]
    a, b = pool(ranks, 1, 16, 32, torch.float32)
    pages, scales = tables(ranks)
    rows = routing([0, -1, 0], pages, scales, 16)
    for page in set(range(a.shape[1])) - set(pages[0, 1].tolist()):
        a[:, page], b[page] = torch.nan, torch.nan
    adapters = [a, b, vectors(2, 32), *rows]
    out = whole_linear_op(torch.randn(3, 16), torch.randn(32, 16), adapters, [1, 0, 32])
    assert out.isfinite().all()


@pytest.mark.parametrize("tile", [1, 2, 16])
def test_neighbouring_tiles_that_share_pages_stay_apart(tile: int) -> None:
    """As of an adapter at two weights, or alone and at the head of a mix."""
    pages, scales = tables([24, 24, 24, 8])
    pages[1, 1], scales[1] = pages[0, 1], scales[0]
    pages[1, 1, 2] = -1  # the first two of them
    pages[2, 1] = pages[1, 1]  # the same at other scales
    a, b = pool([24, 24, 24, 8], 2, 33, 40, torch.float32)
    x, weight = torch.randn(20, 33), torch.randn(40, 33)
    pages[3, 1], scales[3] = pages[0, 1], scales[0]  # the very same, behind other vectors
    v = vectors(4, 40)
    v[1, 0], v[1, 1] = 1, 0
    rows = routing([t % 4 for t in range(20)], pages, scales, tile)
    out = native.linear(x, weight, [a, b, v, *rows], [1, 0, 30, 40])
    assert out is not None
    exact = x @ weight.T
    for t in range(20):
        held = pages[t % 4, 1][pages[t % 4, 1] >= 0].long()
        for s, (low, high) in enumerate([(0, 30), (30, 40)]):
            for page, scale in zip(held.tolist(), scales[t % 4, 1].tolist()):
                exact[t, low:high] += scale * (x[t] @ a[s, page].T) @ b[page, :, low:high]
    exact = adjusted(exact, [t % 4 for t in range(20)], v)
    assert_rounded_once(out, exact)


def test_tiles_that_list_more_tokens_than_there_are_go_to_the_reference() -> None:
    a, b = pool([8], 1, 16, 32, torch.float32)
    perm, *by_tile = routed([0, 0, 0], [8])
    twice = [a, b, vectors(1, 32), perm, *(torch.cat((x, x)) for x in by_tile)]
    x, weight = torch.randn(3, 16), torch.randn(32, 16)
    assert native.linear(x, weight, twice, [1, 0, 32]) is None


@pytest.mark.parametrize("what", ["half", "strided", "long", "ragged adapter"])
def test_what_the_kernel_does_not_serve_goes_to_the_reference(what: str) -> None:
    x, weight, adapters, where = torch.randn(4, 16), torch.randn(32, 16), [], []
    if what == "half":
        x, weight = x.half(), weight.half()
    elif what == "strided":
        weight = torch.randn(16, 32).T
    elif what == "long":
        x = torch.randn(native.MAX_TOKENS + 1, 16)
    else:
        a, b = pool([8], 1, 16, 32, torch.float32)
        a = a.transpose(2, 3).contiguous().transpose(2, 3)
        adapters, where = [a, b, vectors(1, 32), *routed([0] * 4, [8])], [1, 0, 32]
    assert native.linear(x, weight, adapters, where) is None
    assert torch.equal(whole_linear_op(x, weight, adapters, where), whole_linear(x, weight, adapters, where))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 576, 600])
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_norms_match_their_references(dtype: torch.dtype, width: int, tokens: int) -> None:
    y, residual = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    assert_rounded_once(rms_norm_op(y, weight, 1e-5), rms_norm(*wide(y, weight), 1e-5))
    for term in (None, bias):
        normed, total = add_norm_op(y, term, [], [], residual, weight, 1e-5)
        assert_rounded_once(total, residual.float() + y.float() + (0 if term is None else term.float()))
        assert_rounded_once(normed, rms_norm(*wide(total, weight), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (3, 64), (2, 1536), (40, 1000)])
def test_the_activation_matches_its_reference(dtype: torch.dtype, tokens: int, width: int) -> None:
    y, bias = (6 * torch.randn(tokens, 2 * width)).to(dtype), torch.randn(2 * width).to(dtype)
    for term in (None, bias):
        expected = silu_mul(y.float(), None if term is None else term.float(), [], [])
        assert_rounded_once(silu_mul_op(y, term, [], []), expected)


def test_the_activation_of_extreme_gates_is_finite_zero_or_the_gate() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.5, -87.0, 0.0, 87.0, 89.0, 1e30, torch.inf, torch.nan]])
    out = silu_mul_op(torch.cat((gate, torch.ones_like(gate)), 1), None, [], [])
    torch.testing.assert_close(out, torch.nn.functional.silu(gate), rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("head_dim", [6, 64, 80])
def test_rotation_and_store_match_their_reference(
    dtype: torch.dtype, normed: bool, index: torch.dtype, head_dim: int
) -> None:
    tokens, heads, groups = 65, 6, 2
    y, bias = torch.randn(tokens, 10 * head_dim).to(dtype), torch.randn(10 * head_dim).to(dtype)
    norms = [torch.rand(head_dim).to(dtype), torch.rand(head_dim).to(dtype)] if normed else [None, None]
    cos_sin = torch.randn(128, head_dim)
    positions = torch.randint(0, 128, (tokens,), dtype=index)
    slots = torch.randperm(80)[:tokens].to(index)
    slots[[0, 7]] = -1
    for term in (None, bias):
        caches = [torch.ones(10, 8, groups, head_dim, dtype=dtype) for _ in range(2)]
        expected_caches = wide(*caches)
        q = rope_store_op(y, term, [], [], *norms, 1e-6, cos_sin, positions, slots, *caches, heads)
        wide_norms = wide(*norms) if normed else norms
        wide_bias = None if term is None else term.float()
        expected = rope_store(
            y.float(), wide_bias, [], [], *wide_norms, 1e-6, cos_sin, positions, slots, *expected_caches, heads
        )
        assert q.dtype == dtype
        assert_rounded_once(q, expected)
        for cache, expected_cache in zip(caches, expected_caches):
            assert_rounded_once(cache, expected_cache)


def paged(lengths: list[int], queries: list[int], heads: int, groups: int, dtype: torch.dtype, dim: int = 64) -> list:
    page_size = 16
    counts = [-(-length // page_size) for length in lengths]
    free = torch.randperm(sum(counts) + 2).tolist()
    tables = torch.full((len(lengths), max(counts) + 1), 10**6, dtype=torch.int32)
    for b, count in enumerate(counts):
        tables[b, :count] = torch.tensor([free.pop() for _ in range(count)])
    caches = [torch.randn(sum(counts) + 2, page_size, groups, dim).to(dtype) for _ in range(2)]
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(sum(queries), heads, dim).to(dtype)
    return [q, *caches, tables, torch.tensor(lengths, dtype=torch.int32), starts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 5, 300])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(9, 3, 64), (4, 4, 80), (8, 1, 16), (7, 1, 128)])
def test_attention_of_few_queries_matches_its_reference(
    dtype: torch.dtype, window: int, heads: int, groups: int, dim: int
) -> None:
    case = paged([1, 17, 256, 3, 700, 257, 9], [1, 1, 2, 3, 1, 8, 0], heads, groups, dtype, dim)
    out = attention_op(*case, 0.125, window)
    assert_rounded_once(out, attention(*wide(*case), 0.125, window))


def test_long_and_short_sequences_of_one_batch_both_match() -> None:
    case = paged([40, 33, 20, 300], [40, 1, 9, 8], 6, 2, torch.float32)
    torch.testing.assert_close(attention_op(*case, 0.1, 0), attention(*case, 0.1, 0), rtol=1e-5, atol=1e-5)


def test_attention_of_a_sequence_does_not_depend_on_the_others() -> None:
    q, k, v, tables, lengths, starts = paged([300, 520, 40], [1, 1, 1], 6, 2, torch.bfloat16)
    together = attention_op(q, k, v, tables, lengths, starts, 0.125, 0)
    for b in range(3):
        alone = attention_op(q[b : b + 1], k, v, tables[b : b + 1], lengths[b : b + 1], starts[:2], 0.125, 0)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_propagate(dtype: torch.dtype, bad: float) -> None:
    x, weight = torch.randn(3, 70).to(dtype), torch.rand(40, 70).to(dtype) + 0.1
    x[1, 69] = bad
    out = whole_linear_op(x, weight, [], [])
    assert not out[1].isfinite().any()
    assert out[[0, 2]].isfinite().all()
    assert rms_norm_op(x, weight[0], 1e-5)[1].isnan().any()
    assert not silu_mul_op(x, None, [], [])[1].isfinite().all()
    q, k, v, *rest = paged([300, 20], [1, 1], 4, 2, dtype)
    q[0, 1, 3] = bad
    seen = attention_op(q, k, v, *rest, 0.125, 0)
    assert seen[0, 64:128].isnan().all()
    assert seen[1].isfinite().all()


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_library_every_op_gives_the_reference(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 16).to(dtype), torch.randn(32, 16).to(dtype)
    norm = torch.rand(16).to(dtype)
    assert native.library() is None
    assert not native.serves(dtype, x.device)

    def same(op: Callable[..., Tensor], reference: Callable[..., Tensor], *args: object) -> None:
        torch.testing.assert_close(op(*args), reference(*args), rtol=0, atol=0)

    a, b = pool([8, 3], 1, 16, 32, dtype)
    same(whole_linear_op, whole_linear, x, weight, [a, b, vectors(2, 32), *routed([1, -1, 0], [8, 3])], [1, 0, 32])
    same(rms_norm_op, rms_norm, x, norm, 1e-5)
    same(add_norm_op, add_norm, x, None, [], [], x, norm, 1e-5)
    same(silu_mul_op, silu_mul, x, None, [], [])
    same(attention_op, attention, *paged([20, 30], [1, 2], 4, 2, dtype), 0.125, 0)
    caches = [torch.zeros(2, 4, 1, 4, dtype=dtype) for _ in range(2)]
    indices = torch.tensor([0, 5, -1])
    rest = [None, None, 1e-5, torch.randn(9, 4), indices.abs(), indices, *caches, 2]
    same(rope_store_op, rope_store, x, None, [], [], *rest)


def test_it_serves_float32_and_bfloat16_on_the_cpu_only() -> None:
    assert native.serves(torch.float32, torch.device("cpu"))
    assert native.serves(torch.bfloat16, torch.device("cpu"))
    assert not native.serves(torch.float16, torch.device("cpu"))
    assert not native.serves(torch.bfloat16, torch.device("cuda"))


def test_a_compiler_that_fails_means_the_references(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("AIOLORA_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    assert native.library() is None
    monkeypatch.undo()
    native.library.cache_clear()
    assert native.library() is not None


@pytest.mark.parametrize("name", ["linear.c", "vectors.h"])
def test_a_change_in_any_source_gives_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """The compiler stands in: it gives no macros and links an empty file."""
    fake = tmp_path / "cc"
    fake.write_text("""#!/bin/sh
case "$*" in *-dM*) ;; *) while [ "$1" != -o ]; do shift; done; : > "$2";; esac
""")
    fake.chmod(0o755)
    sources = tmp_path / "csrc"
    shutil.copytree(build_native.SOURCES, sources)
    monkeypatch.setattr(build_native, "SOURCES", sources)
    first = build_native.built(str(fake), (), tmp_path)
    assert build_native.built(str(fake), (), tmp_path) == first
    with (sources / name).open("a") as source:
        source.write("/* other */\n")
    assert build_native.built(str(fake), (), tmp_path) != first


def test_importing_the_ops_compiles_nothing_and_processes_may_compile_at_once(tmp_path: Path) -> None:
    """A compiler that only copies what the cache already has stands in, so that this takes no seconds."""
    made = sorted(Environment.read().cache.joinpath("native").glob("*.so"), key=lambda p: p.stat().st_mtime)[-1]
    fake = tmp_path / "cc"
    script = f"""#!/bin/sh
case "$*" in *-dM*) echo macros;; *)
    while [ "$1" != -o ]; do shift; done
    sleep 0.2; cp {made} "$2";;
esac
"""
    fake.write_text(script)
    fake.chmod(0o755)
    code = (
        "import aiolora.ops.attention, sys, pathlib; from aiolora.ops import native;"
        f"print(pathlib.Path({str(tmp_path / 'cache')!r}).exists(), native.library() is not None)"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "AIOLORA_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    together = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0].strip() for process in together)
    assert said[0] == "False True"  # (is the cache there after the import, is there a library after asking)
    assert said[1].endswith(" True")
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 1
