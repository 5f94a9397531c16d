"""The embedded model and its real adapters against transformers + PEFT (tests/data/reference.json), in float32.

Greedy tokens must be identical and log-probabilities within 1e-3, however the work is cut into steps.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.errors import AdapterUnsupportedError
from aiolora.ops import native

ROOT = Path(__file__).parent
ADAPTERS = {
    "sql": ROOT.parent / "examples/adapters/sql",
    "json": ROOT.parent / "examples/adapters/json",
    "pirate": ROOT.parent / "examples/adapters/pirate",
    "dora": ROOT.parent / "examples/adapters/dora",
    "e-r1": ROOT / "data/adapters/e-r1",
    "e-rspat": ROOT / "data/adapters/e-rspat",
    "e-bias": ROOT / "data/adapters/e-bias",
}
REFERENCE = json.loads((ROOT / "data/reference.json").read_text())
PROMPTS = {prompt["name"]: prompt["input_ids"] for prompt in REFERENCE["prompts"]}
CASES = [(model, prompt) for prompt in PROMPTS for model in ("base", *ADAPTERS)]


def lora(name: str) -> LoRARequest | None:
    return LoRARequest(name, list(ADAPTERS).index(name) + 1, str(ADAPTERS[name])) if name in ADAPTERS else None


def engine(**args: Any) -> LLM:
    return LLM("smollm2-135m", **{"dtype": "float32", "enable_lora": True, "max_model_len": 512} | args)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return engine()


def ask(llm: LLM, cases: list[tuple[str, str]], *, prompt_logprobs: int | None = None) -> list[RequestOutput]:
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=5, prompt_logprobs=prompt_logprobs)
    prompts = [{"prompt_token_ids": PROMPTS[prompt]} for _, prompt in cases]
    return llm.generate(prompts, params, lora_request=[lora(model) for model, _ in cases], use_tqdm=False)


def check(cases: list[tuple[str, str]], outputs: list[RequestOutput]) -> None:
    for (model, prompt), output in zip(cases, outputs):
        wanted, answer = REFERENCE["outputs"][model][prompt], output.outputs[0]
        assert answer.token_ids == wanted["token_ids"], f"{model} on {prompt}"
        assert answer.finish_reason == wanted["finish"]
        assert answer.text == wanted["text"]
        assert answer.logprobs is not None
        for token, logprob, top, top5 in zip(answer.token_ids, wanted["logprobs"], answer.logprobs, wanted["top5"]):
            assert top[token].logprob == pytest.approx(logprob, abs=1e-3)
            for other, value in top5:
                assert top[other].logprob == pytest.approx(value, abs=1e-3)
        if output.prompt_logprobs is not None:
            got = [
                top[token].logprob
                for top, token in zip(output.prompt_logprobs[1:], PROMPTS[prompt][1:])
                if top is not None
            ]
            assert got == pytest.approx(wanted["prompt_logprobs"], abs=1e-3)


@pytest.mark.parametrize("model", ["base", *ADAPTERS])
def test_reference_each_model_alone(llm: LLM, model: str) -> None:
    for prompt in PROMPTS:
        check([(model, prompt)], ask(llm, [(model, prompt)]))


def test_reference_all_models_in_one_mixed_batch_with_a_cold_then_a_warm_prefix_cache() -> None:
    llm = engine()
    check(CASES, ask(llm, CASES))
    cold = llm.engine.snapshot().cached_tokens
    check(CASES, ask(llm, CASES))
    warm = llm.engine.snapshot().cached_tokens - cold
    assert warm == sum((len(PROMPTS[prompt]) - 1) // 16 * 16 for _, prompt in CASES), "every full page is found again"


def test_reference_prompt_logprobs_are_computed_behind_a_warm_prefix_cache(llm: LLM) -> None:
    cases = [(model, prompt) for model in ("base", "sql") for prompt in PROMPTS]
    check(cases, ask(llm, cases))
    check(cases, ask(llm, cases, prompt_logprobs=0))


def test_reference_without_a_prefix_cache() -> None:
    llm = engine(enable_prefix_caching=False)
    check(CASES, ask(llm, CASES))
    assert llm.engine.snapshot().cached_tokens == 0


def test_reference_with_prompts_cut_into_chunks_of_7_tokens() -> None:
    llm = engine(max_num_batched_tokens=7, max_num_seqs=7, enable_prefix_caching=False)
    cases = [(model, prompt) for model, prompt in CASES if prompt != "long"] + [("sql", "long")]
    check(cases, ask(llm, cases))


def test_reference_with_so_few_kv_pages_that_sequences_are_preempted() -> None:
    page = 2 * 30 * 16 * 3 * 64 * 4
    llm = engine(max_model_len=320, kv_cache_memory=page * 40)
    check(CASES, ask(llm, CASES))
    assert llm.engine.snapshot().preemptions > 0


def test_reference_with_one_adapter_at_a_time() -> None:
    llm = engine(max_loras=1, max_cpu_loras=2)
    cases = [case for case in CASES if case[1] in ("sql", "cat")]
    check(cases, ask(llm, cases))


def test_reference_by_the_pytorch_ops_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    llm = engine()
    cases = [case for case in CASES if case[1] in ("france", "sql", "unicode")]
    check(cases, ask(llm, cases))


def test_reference_an_adapter_of_a_head_is_refused_by_name(llm: LLM) -> None:
    request = LoRARequest("upper", 99, str(ROOT / "data/adapters/upper"))
    with pytest.raises(AdapterUnsupportedError, match="lm_head") as refused:
        llm.generate("x", SamplingParams(max_tokens=1), lora_request=request, use_tqdm=False)
    assert refused.value.adapter == "upper"
