"""The real runner one step ahead: every answer is the one that it would have been without."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.engine.batch import logit_offsets
from aiolora.engine.runner import ModelRunner
from aiolora.engine.scheduler import Batch
from tests.conftest import ModelOf
from tests.tiny import ALL_LINEARS, VOCAB, make_adapter, prompt_ids

PROMPTS = [prompt_ids(number, 2 + 7 * number) for number in range(6)]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
CASES: dict[str, list[SamplingParams]] = {
    "greedy": [SamplingParams(**GREEDY)],
    "greedy to the end": [SamplingParams(temperature=0, max_tokens=60)],
    "seeded": [SamplingParams(temperature=1.5, seed=7, max_tokens=12)],
    "truncated": [SamplingParams(temperature=1.2, top_k=9, top_p=0.9, min_p=0.01, seed=3, max_tokens=12)],
    "penalties": [SamplingParams(repetition_penalty=1.6, presence_penalty=0.7, frequency_penalty=0.9, **GREEDY)],
    "biased": [SamplingParams(logit_bias={5: 4.0, 6: -9.0}, **GREEDY)],
    "min_tokens": [SamplingParams(temperature=2.0, seed=1, min_tokens=5, max_tokens=9, stop_token_ids=list(range(40)))],
    "logprobs": [SamplingParams(logprobs=VOCAB, **GREEDY)],
    "prompt_logprobs": [SamplingParams(prompt_logprobs=3, logprobs=2, **GREEDY)],
    "several answers": [SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=9)],
}
CASES["all at once"] = [params for name, (params,) in CASES.items() if name != "several answers"]
ENGINES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "in chunks": {"max_num_batched_tokens": 11, "max_num_seqs": 4},
    "preempting": {"max_num_seqs": 6, "max_model_len": 96, "pages": 7},
    "without a prefix cache": {"enable_prefix_caching": False},
}


@dataclass
class Watch:
    """What the launches of a runner were."""

    in_flight: int = 0  # tokens that a launch took from the one before
    penalised: int = 0
    batches: list[Batch] = field(default_factory=list)


@pytest.fixture(scope="module")
def adapters(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, base = tmp_path_factory.mktemp("adapters"), model_of("llama")
    return {
        "a": make_adapter(base, folder / "a", seed=1, r=5),
        "b": make_adapter(base, folder / "b", seed=2, r=20, target_modules=ALL_LINEARS),
    }


def serve(
    folder: Path, adapters: dict[str, Path], params: Sequence[SamplingParams], *, overlaps: bool, **args: Any
) -> tuple[list[RequestOutput], Watch, LLM]:
    """Two rounds of the same requests: the second finds prefixes that the first has left."""
    page_nbytes = 2 * 2 * 16 * 64 // 2 * 4  # k and v, 2 layers, 16 tokens, 2 of 4 heads of 16, float32
    if "pages" in args:
        args["kv_cache_memory"] = args.pop("pages") * page_nbytes
    llm = LLM(str(folder), dtype="float32", enable_lora=True, **args)
    loras = [LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)]
    engine = llm.engine._built.engine
    runner = engine._runner
    assert isinstance(runner, ModelRunner)
    assert not runner.overlaps, "on the CPU a step that was launched has been computed"
    runner.overlaps = overlaps
    watch = Watch()
    launch = runner.launch

    def watched(batch: Batch, look_for_masks: Callable[[Batch], None]) -> Any:
        watch.batches.append(batch)
        watch.in_flight += sum(run.start + run.count > len(run.seq.tokens) for run in batch.runs)
        return launch(batch, look_for_masks)

    runner.launch = watched  # type: ignore[method-assign]
    count = max(len(PROMPTS), len(params))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    wishes = [params[i % len(params)] for i in range(count)]
    mixes = [(None, loras[0], loras[1])[i % 3] for i in range(count)]
    outputs = []
    for _ in range(2):
        outputs += llm.generate(prompts, wishes, lora_request=mixes, use_tqdm=False)
    return outputs, watch, llm


def close(value: float) -> Any:
    return pytest.approx(value, abs=1e-4)  # steps are cut differently, and so are sums


def assert_same(ours: list[RequestOutput], theirs: list[RequestOutput]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        for a, b in zip(left.outputs, right.outputs, strict=True):
            assert a.token_ids == b.token_ids
            assert (a.text, a.finish_reason, a.stop_reason) == (b.text, b.finish_reason, b.stop_reason)
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert {i: one.logprob for i, one in x.items()} == {i: close(one.logprob) for i, one in y.items()}
        for x, y in zip(left.prompt_logprobs or [], right.prompt_logprobs or [], strict=True):
            assert {i: one.logprob for i, one in (x or {}).items()} == {
                i: close(one.logprob) for i, one in (y or {}).items()
            }


@pytest.mark.parametrize("case", CASES)
def test_one_step_ahead_every_answer_is_the_same(case: str, model_of: ModelOf, adapters: dict[str, Path]) -> None:
    folder = model_of("llama")
    expected, watch, _ = serve(folder, adapters, CASES[case], overlaps=False)
    assert watch.in_flight == 0
    ours, watch, _ = serve(folder, adapters, CASES[case], overlaps=True)
    assert watch.in_flight > 20
    assert_same(ours, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_step_ahead_in_engines_that_chunk_and_preempt(
    engine: str, model_of: ModelOf, adapters: dict[str, Path]
) -> None:
    folder, params = model_of("llama"), CASES["all at once"] + CASES["several answers"]
    expected, _, _ = serve(folder, adapters, params, overlaps=False, **ENGINES[engine])
    ours, watch, llm = serve(folder, adapters, params, overlaps=True, **ENGINES[engine])
    assert watch.in_flight > 20
    assert_same(ours, expected)
    snapshot = llm.engine._built.engine.snapshot()
    assert (snapshot.preemptions > 0) == (engine == "preempting")
    assert (snapshot.cached_tokens > 0) == (engine != "without a prefix cache")
    chunks = [run for batch in watch.batches for run in batch.runs if not run.samples]
    assert bool(chunks) == (engine == "in chunks")
    assert any(len(logit_offsets(run)) > 1 for batch in watch.batches for run in batch.runs)
