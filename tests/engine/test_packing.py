"""A step's tensors: routing that covers every token once, padding that does nothing, one copy to the device."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from aiolora import LLM, LoRARequest, SamplingParams
from aiolora.engine import batch as batch_module
from aiolora.engine import warm_up as warm_up_module
from aiolora.engine.batch import Bucket, InFlight, Packer
from aiolora.engine.graphs import Outputs, StepGraphs
from aiolora.engine.plan import graph_buckets
from aiolora.engine.routes import Places
from aiolora.engine.runner import ModelRunner
from aiolora.engine.scheduler import Batch, Scheduled
from aiolora.engine.sequence import Sequence as Answer
from aiolora.engine.staging import Numbers, Staging, size_of
from aiolora.engine.warm_up import blank_step, sizes_of
from aiolora.lora.kinds import PageKinds, Room
from aiolora.lora.residency import Residency
from aiolora.models.inputs import StepInputs
from aiolora.ops.experts import APART, rows_of_tile
from aiolora.ops.linear import Routing
from aiolora.types import AdapterVersion, Mix, Prompt, Request, SitePages
from tests.conftest import ModelOf
from tests.engine.device import awake
from tests.engine.test_overlap import assert_same
from tests.tiny import ALL_LINEARS, make_adapter, prompt_ids

KINDS = 2
PAGE = 4
TILE = 16
INVOCATION = 90  # in no prompt by chance


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    for module in (batch_module, warm_up_module):
        monkeypatch.setattr(module, "tile_of", lambda tokens, device: TILE)


class Books:
    """Sequences and adapters that are nothing but their numbers."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.residency: Residency[None] = Residency(PageKinds(KINDS), Room(64, 16), max_host=64)
        self.packer = Packer(page_size=PAGE, kinds=PageKinds(KINDS), residency=self.residency, device="cpu")
        self.versions: list[AdapterVersion] = []

    def mix(self, *pages: tuple[int, ...], vectors: tuple[int, ...] = ()) -> Mix:
        """An adapter for each of `pages` (rank pages of each kind), together in one mix; `vectors`: kinds with some."""
        parts = []
        for counts in pages:
            number = len(self.versions)
            sites = tuple(SitePages(kind, count, 0.5 + number) for kind, count in enumerate(counts) if count)
            sites += tuple(SitePages(KINDS + kind, 1, 1.0) for kind in vectors)
            version = AdapterVersion(
                number, f"a{number}", f"{number:064x}", "folder", 8, sites, 0, additive=not vectors
            )
            self.versions.append(version)
            self.residency.store(version, None)
            assert self.residency.place(version) is not None
            self.residency.landed(version)
            parts.append((version, 1.0 if vectors else 1.0 + number))
        return Mix(tuple(parts))

    def sleeper(self) -> Mix:
        """An aLoRA."""
        ((version, _),) = self.mix((self.rng.randint(1, 4), 1)).parts
        return Mix(((msgspec.structs.replace(version, additive=False, invocation=(INVOCATION,)), 1.0),))

    def run(self, mix: Mix | None, start: int, count: int) -> Scheduled:
        """A part of a prompt that wakes an aLoRA anywhere or, seldom, nowhere."""
        tokens = [self.rng.randrange(90) for _ in range(start + count)]
        if self.rng.random() < 0.9:
            tokens[self.rng.randrange(len(tokens))] = INVOCATION
        request = Request(id="", prompt_token_ids=tuple(tokens), params=SamplingParams(), mix=mix)
        seq = Answer(request, 0, seed=0, number=0, max_length=999)
        seq.pages.extend(self.rng.sample(range(500), -(-(start + count) // PAGE)))
        return Scheduled(seq, start, count, True)


def packed(packer: Packer, runs: list[Scheduled], in_flight: InFlight | None = None) -> StepInputs:
    batch = Batch(runs)
    return packer.pack(batch, packer.routes(batch), in_flight)


def mixes_of(runs: Sequence[Scheduled]) -> list[Mix | None]:
    """Of each token of `runs`."""
    return [
        run.seq.mix if awake(run.seq.request, position) else None
        for run in runs
        for position in range(run.start, run.start + run.count)
    ]


def check_routing(books: Books, mixes: Sequence[Mix | None], routing: Routing) -> None:
    """`routing` says of every token of `mixes` [T] which pages, scales and vectors it takes, nothing of any other."""
    assert sorted(routing.perm.tolist()) == list(range(len(mixes)))
    assert routing.tile == TILE
    assert routing.owners.shape == routing.perm.shape
    assert routing.pages.shape == routing.scales.shape
    assert routing.pages.shape[:2] == (len(routing.tiles), KINDS)
    assert routing.pages.shape[2] % 2 == 0
    assert routing.vector_pages.shape == routing.pages.shape[:2]
    seen: list[int] = []
    items = set()
    bare = False
    for tile, (first, count) in enumerate(routing.tiles.tolist()):
        assert 0 <= count <= TILE
        if count == 0:
            assert routing.pages[tile].eq(-1).all()
            assert routing.vector_pages[tile].eq(-1).all()
            continue
        assert first == len(seen)
        tokens = routing.perm[first : first + count].tolist()
        seen += tokens
        assert routing.owners[tokens].eq(tile).all()
        mix = mixes[tokens[0]]
        assert all(mixes[token] == mix for token in tokens)
        assert mix is None or not bare, "tokens without an adapter come last"
        bare = bare or mix is None
        most = 0
        for kind in range(KINDS):
            wanted = [
                (page, site.scale * weight)
                for version, weight in (mix.parts if mix else ())
                for site in version.pages
                if site.kind == kind
                for page in books.residency.pages(version)[kind]
            ]
            pages, scales = routing.pages[tile, kind].tolist(), routing.scales[tile, kind].tolist()
            assert list(zip(pages, scales))[: len(wanted)] == wanted
            assert set(pages[len(wanted) :]) <= {-1}
            most = max(most, len(wanted))
            placed = [books.residency.pages(version) for version in (mix.versions if mix else ())]
            (vector,) = {page for pages in placed for page in pages.get(KINDS + kind, [])} or {-1}
            assert routing.vector_pages[tile, kind] == vector
        items |= {(tile, pair, first, count) for pair in range(-(-most // 2))}
    assert len(seen) == len(mixes)
    listed = [tuple(item) for item in routing.items.tolist() if item[0] >= 0]
    assert len(listed) == len(set(listed))
    assert set(listed) == items


@pytest.mark.parametrize("seed", range(25))
def test_routing_covers_every_token_once(seed: int) -> None:
    books = Books(seed)
    rng = books.rng
    mixes = [None, *(books.mix((rng.randint(1, 5), rng.randint(0, 3))) for _ in range(rng.randint(1, 4)))]
    mixes += [books.mix((1, 2), (3, 0)), books.sleeper(), books.sleeper()]
    mixes += [books.mix((rng.randint(1, 3), 0), vectors=kinds) for kinds in ((0,), (1,), (0, 1))]
    runs = [books.run(rng.choice(mixes), rng.randint(0, 9), rng.choice((1, 1, 1, 2, 30, 70))) for _ in range(12)]
    step = packed(books.packer, runs)
    of_token = mixes_of(runs)
    if step.routing is None:
        assert set(of_token) == {None}
    else:
        check_routing(books, of_token, step.routing)
    flat = [(run, position) for run in runs for position in range(run.start, run.start + run.count)]
    assert step.tokens.tolist() == [run.seq.tokens[position] for run, position in flat]
    assert step.positions.tolist() == [position for _, position in flat]
    assert step.slots.tolist() == [run.seq.pages[i // PAGE] * PAGE + i % PAGE for run, i in flat]
    for run, table in zip(runs, step.block_tables.tolist(), strict=True):
        assert table[: len(run.seq.pages)] == list(run.seq.pages)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_a_bucket_holds_whatever_mixes_its_tokens_have(seed: int, prompts: bool) -> None:
    books = Books(seed)
    rng = books.rng
    size, max_loras = rng.choice([(1, 4), (4, 1), (16, 3), (40, 2), (64, 8)])
    count = rng.randint(1, size)
    counts = [rng.randint(1, 9) if prompts else 1 for _ in range(count)]
    counts[-1] += prompts
    total = sum(counts)
    shape = (total + rng.choice((1, 50)), rng.randint(count, total)) if prompts else (size, size)
    bucket = Bucket(*shape, min(shape[0], max_loras), 4)
    mixes = [books.mix((rng.randint(1, 4), rng.randint(0, 4))) for _ in range(max_loras)]
    mixes[1:3] = [books.sleeper() for _ in mixes[1:3]]
    runs = [books.run(rng.choice([*mixes, None]), rng.randint(0, 20), number) for number in counts]
    runs[0] = books.run(mixes[0], 3, counts[0])
    routes = books.packer.routes(Batch(runs))
    assert bucket.fits(total, count, routes)
    assert not bucket.fits(total, count, None)
    assert Bucket(*shape).fits(total, count, None)
    assert not Bucket(*shape).fits(total, count, routes)
    assert not bucket.fits(shape[0] + 1, count, routes)
    assert not bucket.fits(total, shape[1] + 1, routes)
    assert not bucket.fits(2, 2 - (not prompts), routes), "single tokens and prompts are apart"
    in_flight = InFlight.none(1, "cpu")
    numbers = books.packer.lay_out(Batch(runs), routes, in_flight, bucket)
    empty = books.packer.lay_out(Batch(), None, in_flight, bucket)
    for name in numbers.keys() - {"block_tables"}:
        assert numbers[name].shape == empty[name].shape, "a bucket's sizes are fixed"
    for laid_out, step in ((numbers, runs), (empty, [])):
        step_inputs = batch_module.step_inputs(Staging("cpu").send(laid_out), in_flight.tokens, "cpu")
        assert step_inputs.routing is not None
        of_token = mixes_of(step)
        padding, idle = shape[0] - len(of_token), shape[1] - len(step)
        check_routing(books, of_token + [None] * padding, step_inputs.routing)
        assert step_inputs.slots[len(of_token) :].tolist() == [-1] * padding
        assert step_inputs.kv_lengths.tolist() == [run.start + run.count for run in step] + [0] * idle
        ends = list(accumulate(run.count for run in step))
        if prompts:
            assert step_inputs.query_starts.tolist() == [0, *ends] + [len(of_token)] * idle, "none but the runs' own"
            assert step_inputs.logits_at is not None
            assert step_inputs.logits_at.tolist() == [end - 1 for end in ends] + [0] * idle
        else:
            assert step_inputs.query_starts.tolist() == list(range(size + 1))
            assert step_inputs.logits_at is None


def test_runs_in_two_parts_take_no_more_tiles_than_a_bucket_has() -> None:
    """What comes before the invocations is one more group of tokens, however many runs it is of."""
    books = Books(0)
    runs = []
    for bare in (5, 6, 6):
        run = books.run(books.sleeper(), 0, bare + TILE + 1)
        run.seq.active_from = bare
        runs.append(run)
    bucket = Bucket(68, 4, 3, 4)
    routes = books.packer.routes(Batch(runs))
    assert routes is not None
    assert (routes.mixes, routes.counts) == ([-1, 0, -1, 1, -1, 2], [5, 17, 6, 17, 6, 17])
    assert bucket.fits(68, 3, routes)
    numbers = books.packer.lay_out(Batch(runs), routes, InFlight.none(1, "cpu"), bucket)
    assert sorted(numbers["tiles"][:, 1].tolist()) == [1] * 4 + [TILE] * 4, "every tile is used: the bound is exact"


def test_an_adapter_that_comes_back_to_other_pages_is_read_from_there() -> None:
    books = Books(0)
    here, other = books.mix((2, 1)), books.mix((3, 2))
    places = Places(PageKinds(KINDS), books.residency)
    (first, beside), (again,) = places.step([here, other]), places.step([here])
    assert again is first, "nothing moved"
    ((version, _),) = here.parts
    held = dict(books.residency.pages(version))
    assert books.residency.shelve(version)
    books.mix((1, 1))  # takes pages that were its own
    assert books.residency.revive(version)
    assert books.residency.place(version) is not None
    books.residency.landed(version)
    placed = books.residency.pages(version)
    assert placed != held
    (moved, still) = places.step([here, other])
    assert [moved.pages[0].tolist(), moved.pages[1, :1].tolist()] == [placed[0], placed[1]]
    assert still is not beside, "the step between was without it, so it was forgotten"
    assert np.array_equal(still.pages, beside.pages)


def test_a_mix_that_is_too_wide_fits_no_bucket() -> None:
    books = Books(0)
    routes = books.packer.routes(Batch([books.run(books.mix((2, 1), (3, 1)), 0, 1)]))
    assert not Bucket(4, 4, 4, 4).fits(1, 1, routes)
    assert Bucket(4, 4, 4, 6).fits(1, 1, routes)


def test_a_pending_token_is_a_row_of_the_step_before() -> None:
    books = Books(0)
    known, pending = books.run(None, 5, 1), books.run(None, 7, 1)
    pending.start = len(pending.seq.tokens)
    pending.seq.pages.append(33)
    in_flight = InFlight(torch.zeros(4, dtype=torch.int32), {pending.seq: 3, known.seq: 1})
    step = packed(books.packer, [known, pending], in_flight)
    assert step.tokens.tolist() == [known.seq.tokens[5], -4]
    assert step.previous is in_flight.tokens
    assert (in_flight.row(known), in_flight.row(pending)) == (-1, 3)


def test_fields_of_equal_shapes_lie_at_equal_addresses() -> None:
    staging, target = Staging("cpu"), torch.zeros(500, dtype=torch.int32)
    places = []
    for step in range(5):
        numbers: Numbers = {
            "a": np.arange(7, dtype=np.int32) + step,
            "b": np.array([[0.5, step]], dtype=np.float32),
            "c": np.arange(step + 1, dtype=np.int32),
        }
        tensors = staging.send_into(target, numbers)
        for name, tensor in tensors.items():
            assert np.array_equal(tensor.numpy(), numbers[name])
            assert (tensor.data_ptr() - target.data_ptr()) % 64 == 0
            assert tensor.data_ptr() < target.data_ptr() + 4 * size_of(numbers)
        places.append([tensor.data_ptr() for tensor in tensors.values()])
    assert all(place == places[0] for place in places)


def test_buckets_reach_from_one_sequence_to_the_most() -> None:
    for most in (1, 3, 5, 32, 200, 256, 300, 1000):
        buckets = [bucket for bucket in graph_buckets(most, 8192, 8, 4) if bucket.decodes]
        sizes = [bucket.tokens for bucket in buckets if not bucket.mixes]
        assert sizes == [bucket.tokens for bucket in buckets if bucket.mixes]
        assert (sizes[0], sizes[-1]) == (1, most)
        assert sizes == sorted(set(sizes))
        assert all(high - low <= 64 for low, high in pairwise(sizes))
        assert all(bucket.mixes == 0 for bucket in graph_buckets(most, 8192, 8, 0))
        prompts = [bucket for bucket in graph_buckets(most, 300, 8, 4) if not bucket.decodes]
        assert {bucket.tokens for bucket in prompts} == {32, 64, 128, 192, 256}
        assert all(0 < bucket.sequences <= min(most, bucket.tokens // 2) for bucket in prompts)
        assert len(set(prompts)) == len(prompts)


# ---- a whole engine whose steps are padded ----


class EagerGraphs(StepGraphs):
    """The steps that a GPU would replay, computed at once on inputs that a moment ago were garbage."""

    def capture(self) -> None:
        self._graphs = dict.fromkeys(self._buckets)  # type: ignore[arg-type]
        self.replayed: list[Bucket] = []

    def replay(self, bucket: Bucket, numbers: Numbers) -> Outputs:
        self.replayed.append(bucket)
        self._inputs._buffer.fill_(-(2**30))
        self._inputs._block_tables.fill_(-(2**30))
        return self._step(self._inputs.write(bucket, numbers))


@pytest.fixture(scope="module")
def adapters(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    folder, base = tmp_path_factory.mktemp("adapters"), model_of("llama")
    configs: list[dict[str, Any]] = [
        {"r": 5, "alora_invocation_tokens": [INVOCATION]},
        {"r": 20, "target_modules": ALL_LINEARS},
        {"r": 16},
    ]
    for number, config in enumerate(configs):
        make_adapter(base, folder / str(number), seed=number, **config)
    return [LoRARequest(str(number), number + 1, str(folder / str(number))) for number in range(3)]


def serve(folder: Path, adapters: list[LoRARequest], *, graphs: bool) -> tuple[list[Any], list[Bucket], int]:
    """Answers, the buckets of the steps that were replayed, and how many steps there were."""
    llm = LLM(
        str(folder),
        dtype="float32",
        enable_lora=True,
        max_loras=3,
        max_lora_rank=24,
        max_num_seqs=8,
        max_num_batched_tokens=48,
    )
    for adapter in adapters:
        llm.engine.add_lora(adapter)
    engine = llm.engine._built.engine
    runner = engine._runner
    assert isinstance(runner, ModelRunner)
    runner.overlaps = graphs
    eager: EagerGraphs | None = None
    if graphs:
        shapes = [(1, 1), (2, 2), (4, 4), (8, 8), (20, 2), (64, 6), (200, 8)]
        buckets = [Bucket(*shape, *capacity) for shape in shapes for capacity in ((0, 0), (min(shape[0], 3), 4))]
        parts = runner._model, runner._cache, runner._packer, runner._in_flight.tokens
        eager = EagerGraphs(*parts, buckets, max_pages=16)
        eager.capture()
        runner._graphs = eager
    mixes: list[Any] = [None, "0", "1", "2", {"1": 0.5, "2": 0.5}]  # the last takes 5 pages
    rng = random.Random(0)
    outputs: list[Any] = []
    for count in (1, 2, 3, 5, 8, 6, 1):
        loras = mixes if count == 5 else [rng.choice(mixes[: 1 if count == 2 else 4]) for _ in range(count)]
        parts = [prompt_ids(rng.randrange(99), rng.randint(1, 40)) for _ in range(count)]
        prompts: list[Prompt] = [[*part[:7], INVOCATION, *part[7:]] for part in parts]
        params = [
            SamplingParams(temperature=0, max_tokens=rng.randint(2, 9), ignore_eos=True),
            SamplingParams(temperature=0, max_tokens=6, logprobs=3, repetition_penalty=1.5),
            SamplingParams(temperature=1.5, seed=4, max_tokens=7),
        ]
        wishes = [params[0] if count != 6 else rng.choice(params) for _ in range(count)]
        outputs += llm.generate(prompts, wishes, lora_request=loras, use_tqdm=False)
    return outputs, eager.replayed if eager else [], engine.snapshot().steps


def test_padded_steps_give_the_answers_of_steps_without_padding(model_of: ModelOf, adapters: list[LoRARequest]) -> None:
    expected, _, _ = serve(model_of("llama"), adapters, graphs=False)
    ours, replayed, steps = serve(model_of("llama"), adapters, graphs=True)
    assert_same(ours, expected)
    assert {bucket.tokens for bucket in replayed} == {1, 2, 4, 8, 20, 64, 200}
    assert {bucket.mixes for bucket in replayed} >= {0, 3}
    assert steps / 2 < len(replayed) < steps - 6, "a mix of two adapters, and parts of prompts, run as they are"


@pytest.mark.parametrize("ends", [None, 0], ids=["room for the ends", "none"])
def test_warming_up_leaves_no_trace(model_of: ModelOf, ends: int | None) -> None:
    llm = LLM(str(model_of("llama")), dtype="float32", enable_lora=True, max_model_len=64, lora_ends_memory=ends)
    built = llm.engine._built
    runner = built.engine._runner
    assert isinstance(runner, ModelRunner)
    for layer in runner._cache.layers:
        layer.k.fill_(0.25)
        layer.v.fill_(torch.nan)
    seen: list[int] = []
    choose = runner._sampler.choose

    def watched(logits: Tensor, *rest: Any) -> Any:
        assert logits.isfinite().all()
        seen.append(len(logits))
        return choose(logits, *rest)

    runner._sampler.choose = watched  # type: ignore[method-assign]
    for layer in runner._cache.layers:
        layer.v[0].fill_(1.0)
    runner.warm_up(replace(built.plan, lora_pages=4), kinds=6)
    assert len(seen) == 21  # of 7 sizes
    for layer in runner._cache.layers:
        assert layer.k.eq(0.25).all()
        assert layer.v[1:].isnan().all()
        assert layer.v[0].eq(1.0).all()
    assert runner._in_flight.rows == {}
    assert runner._in_flight.tokens.eq(0).all()


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmoe"])
@pytest.mark.parametrize("most", [1, 40, 1024, 8192])
def test_warming_up_meets_every_way_in_which_kernels_cut_a_step(family: str, most: int, model_of: ModelOf) -> None:
    llm = LLM(str(model_of(family)), dtype="float32", max_num_batched_tokens=most, max_num_seqs=min(most, 256))
    built, model = llm.engine._built, llm.engine._built.engine._runner._model  # type: ignore[attr-defined]
    apart = {(linear.top_k, linear.experts) for _, linear in model.experts()}
    assert bool(apart) == (family != "llama")

    def way(tokens: int) -> object:
        few = next((size for size in (16, 32, 64, 256) if tokens <= size), None)
        return few, {(rows_of_tile(tokens, *one, "cuda"), tokens * one[0] > APART) for one in apart}

    met = sizes_of(built.plan, model)
    assert all(0 < count <= built.plan.max_model_len for counts in met for count in counts)
    ways = [way(sum(counts)) for counts in met]
    assert all(way(tokens) in ways for tokens in range(1, most + 1))


def test_tables_have_few_widths_however_many_adapters_a_mix_has() -> None:
    books = Books(0)
    packer = Packer(page_size=PAGE, kinds=PageKinds(KINDS), residency=books.residency, device="cpu", lora_pages=2)
    widths = []
    for counts in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 1), (4, 4), (9, 1)):
        mix = books.mix(counts)
        routing = packed(packer, [books.run(mix, 0, 20)]).routing
        assert routing is not None
        check_routing(books, [mix] * 20, routing)
        widths.append(routing.pages.shape[2])
    assert widths == [2, 2, 4, 4, 8, 4, 16]


def test_a_blank_step_is_of_the_shapes_of_a_real_one() -> None:
    books = Books(0)
    runs = [books.run(None, 0, 1), books.run(books.mix((3, 3)), 0, 20)]
    packer = Packer(page_size=PAGE, kinds=PageKinds(KINDS), residency=books.residency, device="cpu", lora_pages=8)
    real = packed(packer, runs)
    blank = blank_step((1, 20), num_logits=2, page_size=PAGE, device="cpu", kinds=KINDS, pages=8)
    for name in ("tokens", "positions", "slots", "block_tables", "kv_lengths", "query_starts", "logits_at"):
        assert getattr(blank, name).shape == getattr(real, name).shape
        assert getattr(blank, name).dtype == getattr(real, name).dtype == torch.int32
    assert blank.slots.eq(-1).all()
    assert blank.routing is not None
    assert real.routing is not None
    check_routing(books, [None] * 21, blank.routing)
    assert blank.routing.pages.shape[1:] == real.routing.pages.shape[1:]
    assert blank.routing.scales.dtype == real.routing.scales.dtype == torch.float32
    idle = blank_step((1, 20), num_logits=2, page_size=PAGE, device="cpu", kinds=KINDS, pages=8, idle=3).routing
    assert idle is not None
    check_routing(books, [None] * 21, idle)
    assert [len(table) - len(other) for table, other in zip(idle[:-1], blank.routing[:-1])] == [0, 3, 3, 3, 3, 3, 0]
    assert blank_step((3,), num_logits=1, page_size=PAGE, device="cpu").routing is None
