"""Steps with adapters of embedding, head and norms among steps without: graphs, the packer's numbers, who pays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from aiolora import LLM, LoRARequest, SamplingParams
from aiolora.engine.batch import Bucket, Packer, mixes_of_logits
from aiolora.engine.runner import ModelRunner
from aiolora.engine.scheduler import Batch, Scheduled
from aiolora.engine.sequence import Sequence as Answer
from aiolora.lora.kinds import PageKinds, Room
from aiolora.lora.layout import EMBEDDING, HEAD, NORMS
from aiolora.lora.residency import Residency
from aiolora.types import AdapterVersion, BlockSpan, Mix, Prompt, Request, SitePages
from tests.conftest import ModelOf
from tests.engine.test_overlap import assert_same
from tests.engine.test_packing import EagerGraphs
from tests.lora.fidelity import train
from tests.tiny import load_hf, prompt_ids

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 5},
    "head": {"r": 12, "target_modules": ["q_proj", "lm_head"]},
    "rows of the head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 5, 9]},
    "norms": {"modules_to_save": ["input_layernorm"]},
}
IN_GRAPHS = ("plain", "head", "rows of the head")


@pytest.fixture(scope="module")
def folders(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base, root = load_hf(model_of("llama")), tmp_path_factory.mktemp("ends")
    for number, config in enumerate(CONFIGS.values()):
        train(base, config, root / str(number), seed=number)
    return {name: root / str(number) for number, name in enumerate(CONFIGS)}


def served(base: Path, folders: dict[str, Path], *, graphs: bool) -> tuple[ModelRunner, LLM]:
    llm = LLM(str(base), dtype="float32", enable_lora=True, max_lora_rank=16, max_num_seqs=8)
    for number, (name, folder) in enumerate(folders.items(), 1):
        llm.engine.add_lora(LoRARequest(name, number, str(folder)))
    runner = llm.engine._built.engine._runner
    assert isinstance(runner, ModelRunner)
    runner.overlaps = graphs
    if graphs:
        shapes = [(1, 1), (4, 4), (8, 8), (40, 4), (200, 8)]
        buckets = [Bucket(*shape, *capacity) for shape in shapes for capacity in ((0, 0), (shape[1], 2))]
        parts = runner._model, runner._cache, runner._packer, runner._in_flight.tokens
        runner._graphs = EagerGraphs(*parts, buckets, max_pages=16)
        runner._graphs.capture()
    return runner, llm


def answers(llm: LLM, mixes: list[str | None], params: SamplingParams) -> list[Any]:
    prompts: list[Prompt] = [prompt_ids(number, 3 + 5 * number) for number in range(len(mixes))]
    return llm.generate(prompts, params, lora_request=mixes, use_tqdm=False)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=7, ignore_eos=True),
        SamplingParams(temperature=1.2, seed=3, max_tokens=7, logprobs=3, presence_penalty=1.0, ignore_eos=True),
    ],
    ids=["greedy", "sampled"],
)
def test_a_graph_ends_before_the_head_and_steps_that_change_the_trunk_have_none(
    params: SamplingParams, model_of: ModelOf, folders: dict[str, Path]
) -> None:
    runner, llm = served(model_of("llama"), folders, graphs=True)
    _, eager = served(model_of("llama"), folders, graphs=False)
    graphs = runner._graphs
    assert isinstance(graphs, EagerGraphs)
    for mixes, in_graphs in (
        ([None, *IN_GRAPHS], True),
        ([None, "plain"], True),
        (["head"], True),
        (["embedding", "plain", None], False),
        (["tokens", "rows of the head"], False),
        (["norms", None], False),
        ([None], True),
    ):
        graphs.replayed.clear()
        assert_same(answers(llm, mixes, params), answers(eager, mixes, params))
        assert bool(graphs.replayed) is in_graphs, mixes
    assert len({bucket.tokens for bucket in graphs.replayed}) > 1, "prompts and single tokens"


def test_whoever_changes_no_end_pays_for_none(model_of: ModelOf, folders: dict[str, Path]) -> None:
    runner, llm = served(model_of("llama"), folders, graphs=False)
    heads, steps = [], []
    head, pack = runner._packer.head, runner._packer.pack

    def watched_head(*args: Any) -> Any:
        heads.append(head(*args))
        return heads[-1]

    def watched_pack(*args: Any) -> Any:
        steps.append(pack(*args))
        return steps[-1]

    runner._packer.head, runner._packer.pack = watched_head, watched_pack  # type: ignore[method-assign]
    answers(llm, [None, "plain"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=1))
    assert heads
    assert all(one is None for one in heads)
    assert not any(step.embeds or step.own_embeddings or step.own_norms for step in steps)


# ---- the packer's numbers ----

PAGES = PageKinds(3, embedding=1, head=2)


def version(number: int, pages: dict[int, int], *spans: BlockSpan) -> AdapterVersion:
    sites = [SitePages(kind, count, 1.0) for kind, count in pages.items()]
    if spans:
        sites.append(SitePages(PAGES.blocks, sum(span.high - span.low for span in spans), 1.0))
    return AdapterVersion(number, f"a{number}", f"{number:064x}", "folder", 8, tuple(sites), 0, blocks=spans)


def test_rows_of_their_own_are_found_by_each_position_of_their_mix_alone() -> None:
    residency: Residency[None] = Residency(PAGES, Room(9, 9, 9, 9), max_host=9)
    rows = torch.zeros(9, 128, 4)
    packer = Packer(page_size=4, kinds=PAGES, residency=residency, device="cpu", rows=rows)
    versions = [
        version(0, {0: 1}),
        version(1, {0: 1}, BlockSpan(EMBEDDING, 1, 3), BlockSpan(HEAD, 0, 1), BlockSpan(NORMS, 0, 1)),
        version(2, {0: 1, 2: 2}, BlockSpan(HEAD, 2, 3)),
    ]
    for one in versions:
        residency.store(one, None)
        assert residency.place(one) is not None
        residency.landed(one)
    mixes = [Mix(((one, 1.0),)) for one in versions]
    runs = []
    for mix, count in ((mixes[0], 1), (mixes[2], 1), (None, 1), (mixes[1], 3), (mixes[2], 2)):
        request = Request(id="", prompt_token_ids=(5,) * count, params=SamplingParams(), mix=mix)
        seq = Answer(request, 0, seed=0, number=0, max_length=9)
        seq.pages.append(len(runs))
        runs.append(Scheduled(seq, 0, count, True))
    batch = Batch(runs)
    routes = packer.routes(batch)
    assert routes is not None
    assert mixes_of_logits(batch, routes) == [0, 1, -1, 2, 1]  # by their first run
    own = residency.pages(versions[1])[PAGES.blocks]
    step = packer.pack(batch, routes)
    assert step.own_embeddings is not None
    assert step.own_norms is not None
    assert step.embeds is False
    _, table, owners = step.own_embeddings
    assert table.tolist() == [[-1] * 3, [-1] * 3, [-1, own[0], own[1]], [-1] * 3]
    assert owners.tolist() == [0, 1, 3, 2, 2, 2, 1, 1]
    assert step.own_norms.tokens.tolist() == [3, 4, 5]
    assert step.own_norms.pages.tolist() == [[own[3]]] * 3
    head = packer.head(batch, routes, slice(None))
    assert head is not None
    assert head.low_rank
    assert head.own is not None
    _, table, owners = head.own
    other = residency.pages(versions[2])[PAGES.blocks]
    assert table.tolist() == [[-1] * 3, [-1, -1, other[0]], [own[2], -1, -1], [-1] * 3]
    assert owners.tolist() == [3, 1, 3, 2, 1]
    assert sorted(head.routing.perm.tolist()) == [0, 1, 2, 3, 4]
    of_positions = head.routing.pages[head.routing.owners.long(), PAGES.head].tolist()
    mine = residency.pages(versions[2])[PAGES.head]
    assert of_positions == [[-1, -1], mine, [-1, -1], [-1, -1], mine]
    assert packer.head(batch, routes, slice(1)) is None
    assert packer.head(batch, packer.routes(Batch([runs[0], runs[2]])), slice(None)) is None


def test_logits_before_an_invocation_are_the_bases() -> None:
    residency: Residency[None] = Residency(PAGES, Room(9, 9, 9, 9), max_host=9)
    packer = Packer(page_size=4, kinds=PAGES, residency=residency, device="cpu", rows=torch.zeros(9, 128, 4))
    sleeper = version(1, {0: 1, 2: 1, PAGES.vectors_of(2): 1})
    sleeper = AdapterVersion(**{**structs.asdict(sleeper), "invocation": (7, 8)})
    residency.store(sleeper, None)
    assert residency.place(sleeper) is not None
    residency.landed(sleeper)
    params = SamplingParams(prompt_logprobs=0)
    request = Request(id="", prompt_token_ids=(5, 5, 5, 7, 8, 5), params=params, mix=Mix(((sleeper, 1.0),)))
    seq = Answer(request, 0, seed=0, number=0, max_length=9)
    seq.pages.extend((0, 1))
    batch = Batch([Scheduled(seq, 0, 6, True)])
    routes = packer.routes(batch)
    assert routes is not None
    assert mixes_of_logits(batch, routes) == [0, -1, -1, -1, 0, 0], "the sample, then the prompt's"
    head = packer.head(batch, routes, slice(None))
    assert head is not None
    (page,) = residency.pages(sleeper)[PAGES.vectors_of(2)]
    vectors = head.routing.vector_pages[head.routing.owners.long(), PAGES.head].tolist()
    assert vectors == [page, -1, -1, -1, page, page]
    assert packer.head(batch, routes, slice(1, 4)) is None
