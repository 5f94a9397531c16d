"""From a file's tensors to rank pages: every element of every page, and what no page may hold."""

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aiolora.errors import AdapterFormatError
from aiolora.lora import paging
from aiolora.lora.layout import Kind, Layout, Target
from aiolora.lora.paging import Filling, Module, Pages, fill
from aiolora.lora.tensorfile import Entry, TensorFile
from aiolora.ops import native
from aiolora.ops.linear import RANKS_PER_PAGE

KINDS = (Kind("q+k+v", 2, 24, (0, 40, 48, 56)), Kind("o", 2, 40, (0, 24)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layout_of(dtype: torch.dtype) -> Layout:
    targets = {
        f"{layer}.{name}": Target(kind, layer, index, torch.empty(high - low, shape.inputs, device="meta"))
        for kind, shape in enumerate(KINDS)
        for layer in range(shape.layers)
        for index, (name, (low, high)) in enumerate(zip(shape.name.split("+"), pairwise(shape.bounds)))
    }
    return Layout(KINDS, targets, dtype)


def stored(folder: Path, tensors: dict[str, Tensor]) -> TensorFile:
    save_file(tensors, folder / "tensors")
    return TensorFile.open("adapter", folder / "tensors")


def pages_of(
    folder: Path, layout: Layout, ranks: dict[str, int], tensors: dict[str, Tensor], ratios: dict[str, float]
) -> tuple[Pages, Pages]:
    counts: dict[int, int] = {}
    for name, rank in ranks.items():
        kind = layout.targets[name].kind
        counts[kind] = max(counts.get(kind, 0), -(-rank // RANKS_PER_PAGE))
    with stored(folder, tensors) as file:
        modules = [
            Module(file.entries[f"{name}.A"], file.entries[f"{name}.B"], layout.targets[name], ratios.get(name, 1.0))
            for name in ranks
        ]
        a_pages, b_pages, _ = fill(file, Filling(layout, modules, counts), pinned=False)
    return a_pages, b_pages


def factors(layout: Layout, ranks: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for name, rank in ranks.items():
        target = layout.targets[name]
        tensors[f"{name}.A"] = torch.randn(rank, target.inputs).to(dtype)
        tensors[f"{name}.B"] = torch.randn(target.outputs, rank).to(dtype)
    return tensors


@pytest.fixture(params=["compiled", "numpy"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are laid out by each of the two ways that there are."""
    if request.param == "numpy":
        monkeypatch.setattr(paging, "lay_out", lambda *args: None)
    elif native.library() is None:
        pytest.skip("no C compiler here, or AIOLORA_NATIVE=0")


@pytest.fixture
def dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN."""
    original = paging._empty

    def empty(*args: object, **kwargs: object) -> tuple[Pages, Pages]:
        made = original(*args, **kwargs)  # type: ignore[arg-type]
        for pages in made:
            for page in [page for some in pages.values() for page in some]:
                page.fill_(torch.nan)
        return made

    monkeypatch.setattr(paging, "_empty", empty)


@pytest.mark.usefixtures("dirty", "each_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("file_dtype", [*DTYPES, torch.float64, torch.float8_e4m3fn], ids=str)
def test_every_element_of_every_page_is_the_adapters_or_zero(
    dtype: torch.dtype, file_dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layout, rng = layout_of(dtype), random.Random(0)
    for number in range(6):
        names = rng.sample(sorted(layout.targets), rng.randrange(1, len(layout.targets) + 1))
        ranks = {name: rng.choice((1, 5, 8, 13, 16, 24)) for name in names}
        ratios = {name: 0.5 for name in names if rng.random() < 0.3}
        tensors = factors(layout, ranks, file_dtype)
        folder = tmp_path / str(number)
        folder.mkdir()
        a_pages, b_pages = pages_of(folder, layout, ranks, tensors, ratios)
        for kind, shape in enumerate(KINDS):
            members = {name: target for name, target in layout.targets.items() if target.kind == kind and name in ranks}
            if not members:
                assert kind not in a_pages
                continue
            most = RANKS_PER_PAGE * -(-max(ranks[name] for name in members) // RANKS_PER_PAGE)
            a = torch.zeros(shape.layers, shape.slices, most, shape.inputs, dtype=dtype)
            b = torch.zeros(shape.layers, most, shape.bounds[-1], dtype=dtype)
            for name, target in members.items():
                low, high = shape.bounds[target.slice : target.slice + 2]
                a[target.layer, target.slice, : ranks[name]] = tensors[f"{name}.A"].to(dtype)
                scaled = tensors[f"{name}.B"].to(torch.float64) * ratios.get(name, 1.0)
                b[target.layer, : ranks[name], low:high] = scaled.to(torch.float32).to(dtype).T
            torch.testing.assert_close(torch.cat(a_pages[kind], 2), a, rtol=0, atol=0)
            torch.testing.assert_close(torch.cat(b_pages[kind], 1), b, rtol=0, atol=0)


@pytest.mark.usefixtures("dirty", "each_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("file_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "rank"),
    [(5003, 4099, 20), (1 << 16, 3, 2), (3, 1 << 16, 1), (2, 3, 16391)],
    ids=["several pages", "a rank of A is long", "B is long", "a row of B is long"],
)
def test_a_tensor_that_is_read_in_pieces_is_whole_in_its_pages_and_in_its_sha256(
    inputs: int, outputs: int, rank: int, file_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weight = torch.empty(outputs, inputs, device="meta")
    layout = Layout((Kind("q", 1, inputs, (0, outputs)),), {"q": Target(0, 0, 0, weight)}, dtype)
    a, b = torch.randn(rank, inputs).to(file_dtype), torch.randn(outputs, rank).to(file_dtype)
    with stored(tmp_path, {"A": a, "B": b}) as file:
        modules = [Module(file.entries["A"], file.entries["B"], layout.targets["q"], 0.5)]
        filling = Filling(layout, modules, {0: -(-rank // RANKS_PER_PAGE)})
        (a_pages,), (b_pages,), sha256 = map(list, map(dict.values, fill(file, filling, pinned=False)))
    a_all, b_all = torch.cat(a_pages, 2)[0, 0], torch.cat(b_pages, 1)[0]
    assert torch.equal(a_all[:rank], a.to(dtype))
    assert torch.equal(b_all[:rank], (b.float() * 0.5).to(dtype).T)
    assert not a_all[rank:].count_nonzero()
    assert not b_all[rank:].count_nonzero()
    assert sorted(sha256) == sorted(hashlib.sha256(one.view(torch.uint8).numpy()).hexdigest() for one in (a, b))


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_what_is_not_finite_in_the_dtype_of_the_pages_is_refused_and_the_largest_finite_is_not(
    factor: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    layout, ranks = layout_of(dtype), {"0.q": 8, "1.o": 8}
    limits = torch.finfo(dtype)
    fine = (limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -0.0)
    for value in fine:
        tensors = factors(layout, ranks, dtype)
        tensors[f"1.o.{factor}"][3, 5] = value
        pages_of(tmp_path, layout, ranks, tensors, {})
    sources = [(dtype, value) for value in (torch.inf, -torch.inf, torch.nan)]
    sources += [(torch.float64, value) for value in (1e39, -1e39)]
    for file_dtype, value in sources:
        tensors = factors(layout, ranks, file_dtype)
        tensors[f"1.o.{factor}"][3, 5] = value
        with pytest.raises(AdapterFormatError, match=rf"1\.o\.{factor} .*not finite floats in {dtype}"):
            pages_of(tmp_path, layout, ranks, tensors, {"1.o": 0.5})
    tensors = factors(layout, ranks, dtype)
    tensors[f"1.o.{factor}"] = torch.copysign(torch.full_like(tensors[f"1.o.{factor}"], torch.nan), torch.tensor(-1.0))
    with pytest.raises(AdapterFormatError, match="not finite"):
        pages_of(tmp_path, layout, ranks, tensors, {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("file_dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("each_way")
def test_every_value_is_rounded_as_torch_rounds_it(dtype: torch.dtype, file_dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32)
    halves = torch.cat([bits.to(torch.int16).view(half).float() for half in (torch.float16, torch.bfloat16)])
    between = (halves.view(torch.int32) + torch.tensor([[-1], [0], [1], [1 << 12], [1 << 15]])).reshape(-1)
    values = between.to(torch.int32).view(torch.float32).to(file_dtype)
    values = values[torch.isfinite(values.to(dtype))]
    values = values[: len(values) // 24 * 24].reshape(-1, 24)
    layout = Layout((Kind("q", 1, 24, (0, 1)),), {"0.q": Target(0, 0, 0, torch.empty(1, 24, device="meta"))}, dtype)
    tensors = {"0.q.A": values, "0.q.B": torch.zeros(1, len(values), dtype=file_dtype)}
    a_pages, _ = pages_of(tmp_path, layout, {"0.q": len(values)}, tensors, {})
    torch.testing.assert_close(torch.cat(a_pages[0], 2)[0, 0, : len(values)], values.to(dtype), rtol=0, atol=0)


@pytest.mark.usefixtures("each_way")
def test_adapters_that_are_read_side_by_side_do_not_mix(tmp_path: Path) -> None:
    layout, ranks = layout_of(torch.float32), {"0.q": 8, "1.o": 8}

    def first_values(number: int) -> set[float]:
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = {
            name: torch.full_like(tensor, number) for name, tensor in factors(layout, ranks, torch.float32).items()
        }
        a_pages, b_pages = pages_of(folder, layout, ranks, tensors, {})
        found = a_pages[0][0][0, 0], b_pages[0][0][0, :, :40], a_pages[1][0][1, 0], b_pages[1][0][1]
        return {value for part in found for value in part.unique().tolist()}

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(first_values, range(1, 41))) == [{float(number)} for number in range(1, 41)]


@pytest.mark.usefixtures("each_way")
def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    layout, ranks = layout_of(torch.float32), {"0.q": 8, "1.q": 8}
    with stored(tmp_path, factors(layout, ranks, torch.float32)) as file:
        os.truncate(tmp_path / "tensors", (tmp_path / "tensors").stat().st_size // 2)
        modules = [Module(file.entries[f"{n}.A"], file.entries[f"{n}.B"], layout.targets[n], 1.0) for n in ranks]
        with pytest.raises(AdapterFormatError, match="has become shorter"):
            fill(file, Filling(layout, modules, {0: 1}), pinned=False)


ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (ENTRY, 3),
        (ENTRY, 5),
        (ENTRY.replace("[0,4]", "[4,8]"), 8),
        (ENTRY + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}', 6),
        (ENTRY + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}', 12),
        (ENTRY.replace("[0,4]", "[4,0]"), 4),
        (ENTRY.replace("[0,4]", "[0,4,8]"), 4),
        (ENTRY.replace("[0,4]", "[-4,0]"), 4),
        (ENTRY.replace("[0,4]", "[0.0,4.0]"), 4),
        (ENTRY.replace("[0,4]", "[false,4]"), 4),
        (ENTRY.replace("[1]", "[2]"), 4),
        (ENTRY.replace("[1]", "[-1]"), 4),
        (ENTRY.replace("[1]", "[true]"), 4),
        (ENTRY.replace("[1]", "1"), 4),
        (ENTRY.replace("[1]", "[-1,-1]"), 4),
        (ENTRY.replace("[1]", "[0,1e999]"), 4),
        (ENTRY.replace("[1]", "[" + "1," * 99 + "1]"), 4),
        (ENTRY.replace('"F32"', '["F32"]'), 4),
        (ENTRY.replace('"F32"', "null"), 4),
        (ENTRY.replace('"dtype":"F32",', ""), 4),
        (ENTRY.replace('"shape":[1],', ""), 4),
        ('"a":{}', 0),
        ('"a":[["dtype","F32"],["shape",[1]],["data_offsets",[0,4]]]', 4),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(header: str, body: int, tmp_path: Path) -> None:
    data = f"{{{header}}}".encode()
    (tmp_path / "tensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(body))
    with (
        TensorFile.open("adapter", tmp_path / "tensors") as file,
        pytest.raises(AdapterFormatError, match="truncated or malformed"),
    ):
        assert not file.entries


def test_a_header_may_hold_metadata_and_tensors_of_no_elements_in_any_order(tmp_path: Path) -> None:
    empty = '"{}":{{"dtype":"F16","shape":[0,7],"data_offsets":[{},{}]}}'
    entries = ['"__metadata__":{"format":"pt"}', empty.format("end", 4, 4), ENTRY, empty.format("start", 0, 0)]
    data = ("{" + ",".join(entries) + "}   ").encode()
    (tmp_path / "tensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    with TensorFile.open("adapter", tmp_path / "tensors") as file:
        assert file.entries["a"] == Entry("a", torch.float32, (1,), 8 + len(data), 4)
        assert {name: entry.nbytes for name, entry in file.entries.items()} == {"start": 0, "a": 4, "end": 0}
