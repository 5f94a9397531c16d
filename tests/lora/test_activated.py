"""Activated LoRA (aLoRA): PEFT's numbers on both sides of the invocation, on top of the base's prefix cache."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.engine.batch import num_bare
from aiolora.engine.scheduler import Batch
from aiolora.errors import RequestError
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.lora.fidelity import peft_logits
from tests.tiny import (
    ALL_LINEARS,
    VOCAB,
    everything,
    hf_logits,
    kernels,
    load_peft,
    make_adapter,
    make_model,
    prompt_ids,
    reconfigure,
    reported,
)

TOLERANCE = 1e-4
NEW = 4
PAGE = 16
FIRST, SECOND = [5, 6, 7], [8, 8]  # invocations
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 5, "target_modules": ["q_proj", "v_proj"]},
    "first": {"r": 8, "target_modules": ALL_LINEARS, "alora_invocation_tokens": FIRST},
    "second": {
        "r": 20,
        "use_rslora": True,
        "target_modules": ["k_proj", "down_proj"],
        "alora_invocation_tokens": SECOND,
    },
}
NAMES = [None, *ADAPTERS]


def some(seed: int, length: int) -> list[int]:
    """Tokens that are in no invocation."""
    return [9 + token % (VOCAB - 9) for token in prompt_ids(seed, length)]


PROMPTS: dict[str, list[int]] = {
    "in the middle": [*some(0, 20), *FIRST, *some(1, 9), *SECOND, *some(2, 15)],
    "at the start": [*FIRST, *some(3, 30)],
    "at the end": [*some(4, 37), *SECOND],
    "the whole prompt": FIRST,
    "where a page begins": [*some(5, 2 * PAGE), *FIRST, *some(6, 3)],
    "several times": [*some(7, 18), *FIRST, *some(8, 5), *FIRST, *some(9, 20), *FIRST, *some(10, 2)],
    "over itself": [*some(11, 12), 8, 8, 8, 8, *some(12, 10)],
    "nowhere": some(13, 40),
    "cut off": [*some(14, 21), *FIRST[:2]],
    "in pieces": [*some(15, 9), 5, 6, 5, 6, 8, 7, 8, *some(16, 9)],
}
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders_of(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    @cache
    def make(family: str) -> Folders:
        return adapters_for(model_of(family), tmp_path_factory.mktemp("adapters"))

    return make


def adapters_for(base: Path, root: Path) -> Folders:
    return {
        name: make_adapter(base, root / name, seed=number, **config)
        for number, (name, config) in enumerate(ADAPTERS.items())
    }


def serve(base: Path, folders: Folders, **args: Any) -> LLM:
    llm = LLM(str(base), **({"dtype": "float32", "enable_lora": True, "max_loras": 3} | args))
    for number, (name, folder) in enumerate(folders.items(), 1):
        llm.engine.add_lora(LoRARequest(name, number, str(folder)))
    return llm


def theirs(model: PeftModel, adapter: str | None, prompt: list[int], answer: Sequence[int]) -> Tensor:
    """[T, V] log-probabilities of PEFT."""
    if adapter is None:
        with model.disable_adapter():
            return hf_logits(model, [*prompt, *answer]).log_softmax(-1)
    model.set_adapter(adapter)
    return peft_logits(model, prompt, answer).log_softmax(-1)


def largest_error(output: RequestOutput, model: PeftModel, adapter: str | None) -> float:
    tokens, ours = reported(output)
    prompt = output.prompt_token_ids
    return float((ours - theirs(model, adapter, prompt, tokens[len(prompt) :])[:-1]).abs().max())


def rows(output: RequestOutput) -> Tensor:
    """[answer, V] log-probabilities of the answer."""
    return torch.tensor([[top[token].logprob for token in range(VOCAB)] for top in output.outputs[0].logprobs or []])


def answer_error(output: RequestOutput, model: PeftModel, adapter: str | None) -> float:
    prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
    return float((rows(output) - theirs(model, adapter, prompt, answer)[len(prompt) - 1 : -1]).abs().max())


@pytest.mark.parametrize("compiled", [False, True], ids=["references", "compiled"])
@pytest.mark.parametrize("budget", [4096, 29], ids=["whole prompts", "chunks"])
@pytest.mark.parametrize("family", ["llama biased", "qwen3"])
def test_wherever_the_invocation_stands_the_numbers_are_pefts_in_one_batch_with_everybody(
    family: str, budget: int, compiled: bool, model_of: ModelOf, folders_of: Callable[[str], Folders]
) -> None:
    pairs = [(where, name) for where in PROMPTS for name in NAMES]
    prompts: list[Prompt] = [PROMPTS[where] for where, _ in pairs]
    with kernels(compiled=compiled):
        llm = serve(model_of(family), folders_of(family), max_num_batched_tokens=budget, max_num_seqs=24)
        outputs = llm.generate(prompts, everything(NEW), lora_request=[name for _, name in pairs], use_tqdm=False)
    peft = load_peft(model_of(family), folders_of(family))
    as_base = set()
    for output, (where, name) in zip(outputs, pairs):
        assert largest_error(output, peft, name) < TOLERANCE, (where, name)
        assert (output.adapter or "").partition("@")[0] == (name or "")
        if name == "first" and largest_error(output, peft, None) < TOLERANCE:
            as_base.add(where)
    assert as_base == {"at the end", "over itself", "nowhere", "cut off", "in pieces"}, "the others wake it"


@pytest.mark.parametrize("pioneer", NAMES)
def test_every_whole_page_before_an_invocation_is_the_bases_whoever_computed_it(
    pioneer: str | None, model_of: ModelOf, folders_of: Callable[[str], Folders]
) -> None:
    base, folders = model_of("llama"), folders_of("llama")
    peft = load_peft(base, folders)
    prompt = [*some(20, 3 * PAGE), 9, *FIRST, 10, *SECOND, *some(21, 14)]  # the fourth page has both invocations
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=VOCAB)
    llm = serve(base, folders)
    seen: set[str | None] = set()
    for name in [pioneer, *NAMES, *NAMES]:
        before = llm.engine.snapshot().cached_tokens
        (output,) = llm.generate(prompt, params, lora_request=name, use_tqdm=False)
        assert answer_error(output, peft, name) < TOLERANCE, name
        shared = 3 * PAGE if name != "plain" and seen - {"plain"} else 0
        found = llm.engine.snapshot().cached_tokens - before
        assert found == (4 * PAGE if name in seen else shared), name
        seen.add(name)


def test_a_second_turn_computes_what_follows_the_bases_last_whole_page_before_the_invocation(
    tmp_path: Path,
) -> None:
    """1,036 tokens of prompt and answer are the base's. The key and value of the answer's last token were never needed,
    so 1,035 are in the cache, 1,024 of them in whole pages of 16. Of the 1,045 tokens of the second turn, 9 from its
    invocation on and the 12 between the last whole page and the invocation are computed.
    """
    base = make_model(tmp_path / "base", max_position_embeddings=2048)
    folders = adapters_for(base, tmp_path)
    peft = load_peft(base, folders)
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, logprobs=VOCAB)
    for name, wanted in ((None, 21), ("first", 21), ("plain", 1045)):
        llm = serve(base, folders, max_num_batched_tokens=256)
        (said,) = llm.generate(some(30, 1029), params, use_tqdm=False)
        prompt = [*said.prompt_token_ids, *said.outputs[0].token_ids, *FIRST, *some(31, 6)]
        steps = watch(llm)
        (output,) = llm.generate(prompt, params, lora_request=name, use_tqdm=False)
        runs = [run for batch in steps for run in batch.runs]
        assert sum(min(run.count, len(prompt) - run.start) for run in runs if run.start < len(prompt)) == wanted, name
        assert sum(map(num_bare, runs)) == (12 if name == "first" else wanted + 6 if name is None else 0)
        assert answer_error(output, peft, name) < TOLERANCE, name


def watch(llm: LLM) -> list[Batch]:
    """The steps from now on."""
    runner = llm.engine._built.engine._runner
    launch, seen = runner.launch, []

    def watched(batch: Batch, look_for_masks: Callable[[Batch], None]) -> Any:
        seen.append(batch)
        return launch(batch, look_for_masks)

    runner.launch = watched  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("where", ["in the middle", "nowhere"])
def test_an_invocation_that_is_generated_changes_nothing_as_in_pefts_generate(
    where: str, model_of: ModelOf, folders_of: Callable[[str], Folders]
) -> None:
    prompt, token, count = PROMPTS[where], SECOND[0], 5
    llm = serve(model_of("llama"), folders_of("llama"))
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=VOCAB, logit_bias={token: 100})
    (output,) = llm.generate(prompt, params, lora_request="second", use_tqdm=False)
    assert output.outputs[0].token_ids == [token] * count, "the invocation, again and again"
    peft = load_peft(model_of("llama"), folders_of("llama"))
    peft.set_adapter("second")
    wishes = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        sequence_bias=[[[token], 100.0]],
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    ids = torch.tensor([prompt])
    told = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=wishes)
    assert told.sequences[0].tolist() == [*prompt, *[token] * count]
    assert (rows(output) - torch.cat(told.logits).log_softmax(-1)).abs().max() < TOLERANCE


def test_what_is_computed_again_after_a_preemption_wakes_at_the_same_place(
    model_of: ModelOf, folders_of: Callable[[str], Folders]
) -> None:
    base, folders = model_of("llama"), folders_of("llama")
    peft = load_peft(base, folders)
    llm = serve(base, folders, max_model_len=128, kv_cache_memory=12 * PAGE * 2 * 2 * 2 * 16 * 4, max_num_seqs=8)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=VOCAB, logit_bias={8: 3.0, 5: 3.0})
    pairs = [(where, name) for where in ("in the middle", "several times", "nowhere") for name in NAMES]
    prompts: list[Prompt] = [PROMPTS[where] for where, _ in pairs]
    outputs = llm.generate(prompts, params, lora_request=[name for _, name in pairs], use_tqdm=False)
    for output, (where, name) in zip(outputs, pairs):
        assert answer_error(output, peft, name) < TOLERANCE, (where, name)
    assert llm.engine.snapshot().preemptions > 0


def test_a_prompt_without_the_invocation_is_logged(
    model_of: ModelOf, folders_of: Callable[[str], Folders], caplog: pytest.LogCaptureFixture
) -> None:
    llm = serve(model_of("llama"), folders_of("llama"))
    for where, lines in (("in the middle", 0), ("nowhere", 1)):
        caplog.clear()
        (output,) = llm.generate(PROMPTS[where], everything(1), lora_request="first", use_tqdm=False)
        assert output.adapter is not None
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warned) == lines
        assert all(f"no invocation of {output.adapter} (the tokens {FIRST})" in line for line in warned)


def test_it_is_served_alone_and_whole(model_of: ModelOf, folders_of: Callable[[str], Folders]) -> None:
    llm = serve(model_of("llama"), folders_of("llama"))
    weighted: list[dict[str, float]] = [{"first": 0.5}, {"plain": 0.5, "first": 0.5}, {"first": 1.0, "second": 1.0}]
    for weights in weighted:
        with pytest.raises(RequestError, match="is more than a low-rank sum"):
            llm.generate([5, 6], lora_request=weights, use_tqdm=False)


def test_the_invocation_is_part_of_what_an_adapter_is(model_of: ModelOf, tmp_path: Path) -> None:
    base = model_of("llama")
    folder = make_adapter(base, tmp_path / "adapter")
    llm = serve(base, {})
    digests = []
    for invocation in ([], None, [5, 6], [56], [6, 5]):
        reconfigure(folder, alora_invocation_tokens=invocation)
        version = llm.engine.add_lora(LoRARequest("a", 1, str(folder), load_inplace=True))
        assert version.invocation == tuple(invocation or ())
        digests.append(version.digest)
    assert digests[0] == digests[1], "an ordinary adapter, as in PEFT"
    assert len(set(digests)) == 4
