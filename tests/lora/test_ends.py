"""Adapters of embedding, head and norms: PEFT's numbers over several blocks of rows, memory, mixes, refusals."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.errors import AdapterMemoryError, AdapterMismatchError, AdapterUnsupportedError, RequestError
from aiolora.types import Prompt
from tests.lora.fidelity import train
from tests.tiny import hf_logits, kernels, load_hf, load_peft, make_model, prompt_ids, reconfigure, rewrite

VOCABULARY = 290  # two blocks and a part of one
TOLERANCE = 1e-4
CONFIGS: dict[str, dict[str, Any]] = {
    "low rank on the head": {"r": 12, "target_modules": ["q_proj", "lm_head"]},
    "low rank on the embedding": {"r": 5, "target_modules": ["embed_tokens"], "use_rslora": True},
    "low rank on both": {"r": 17, "target_modules": ["v_proj", "lm_head", "embed_tokens"]},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "an embedding of its own": {"modules_to_save": ["embed_tokens"]},
    "tokens of its own": {"trainable_token_indices": [289, 3, 131, 130]},
    "a token of its own": {"trainable_token_indices": {"embed_tokens": [3]}},
    "norms of its own": {"modules_to_save": ["norm"]},
    "plain": {"r": 8},
}
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=40, prompt_logprobs=40)


class Trained:
    """A base model and, by name, PEFT's models and where they were saved."""

    def __init__(self, folder: Path, family: str) -> None:
        self.base = make_model(folder / "base", family, vocab_size=VOCABULARY)
        self.hf = load_hf(self.base)
        self.peft: dict[str, PeftModel] = {}
        self.loras: dict[str, LoRARequest] = {}
        for number, (name, config) in enumerate(CONFIGS.items()):
            place = folder / name.replace(" ", "-")
            self.peft[name] = train(self.hf, config, place, seed=number)
            self.loras[name] = LoRARequest(name, number + 1, str(place))

    def serve(self, *names: str, **args: Any) -> LLM:
        llm = LLM(str(self.base), **({"dtype": "float32", "enable_lora": True, "max_lora_rank": 24} | args))
        for name in names:
            llm.engine.add_lora(self.loras[name])
        return llm

    def check(self, output: RequestOutput, name: str | None) -> None:
        """Every log-probability that was reported is the model's of that name."""
        model: nn.Module = self.hf if name is None else self.peft[name]
        assert error(output, model) < TOLERANCE, name


def error(output: RequestOutput, model: nn.Module) -> float:
    answer = output.outputs[0]
    tokens = [*output.prompt_token_ids, *answer.token_ids]
    theirs = hf_logits(model, tokens).log_softmax(-1)
    reported = [*(output.prompt_logprobs or [])[1:], *(answer.logprobs or [])]
    assert len(reported) == len(tokens) - 1
    rows = [
        torch.tensor([top[token].logprob - float(row[token]) for token in top])
        for top, row in zip(reported, theirs)
        if top is not None
    ]
    for top, row in zip(reported, theirs):
        assert top is not None
        assert int(row.argmax()) in top
    return float(torch.cat(rows).abs().max())


@pytest.fixture(scope="module", params=["llama", "llama tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_of(request.param, tmp_path_factory.mktemp("ends"))


@cache
def trained_of(family: str, folder: Path) -> Trained:
    return Trained(folder, family)


@pytest.fixture(params=[False, True], ids=["references", "compiled"])
def compiled(request: pytest.FixtureRequest) -> Iterator[bool]:
    with kernels(compiled=request.param):
        yield request.param


def test_all_and_the_base_agree_with_peft_in_one_batch_of_small_chunks(trained: Trained, compiled: bool) -> None:
    names = [*CONFIGS, None] * 2
    llm = trained.serve(max_loras=len(CONFIGS), max_num_batched_tokens=40, max_num_seqs=12)
    prompts: list[Prompt] = [prompt_ids(n, 1 + 7 * n % 40, VOCABULARY) for n in range(len(names))]
    loras = [None if name is None else trained.loras[name] for name in names]
    for output, name in zip(llm.generate(prompts, PARAMS, lora_request=loras, use_tqdm=False), names):
        trained.check(output, name)


def test_they_take_turns_in_a_room_for_one(trained: Trained) -> None:
    whole = {"an embedding of its own", "a head of its own", "tokens of its own", "low rank on both"}
    biggest = 2 * 3 * 3 * (48 + VOCABULARY) * 8 * 4  # more than the rank pages of one, half of it for blocks
    llm = trained.serve(max_loras=1, max_cpu_loras=2, lora_ends_memory=max(biggest, 8 * 128 * 64 * 4))
    for name in [*CONFIGS, *whole, "plain"]:
        (output,) = llm.generate(prompt_ids(1, 9, VOCABULARY), PARAMS, lora_request=trained.loras[name], use_tqdm=False)
        trained.check(output, name)
    assert len(llm.engine.snapshot().resident_adapters) <= 3


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_low_rank_sums_on_the_ends_are_weighted_as_pefts_concatenation(trained: Trained) -> None:
    names = ["low rank on both", "low rank on the head"]
    model = load_peft(trained.base, dict(zip("ab", (Path(trained.loras[name].lora_path) for name in names))))
    llm = trained.serve(*names)
    for number, weights in enumerate(([0.5, -0.75], [2.0, 1.0])):
        model.add_weighted_adapter(["a", "b"], weights, f"mix{number}", combination_type="cat")
        model.set_adapter(f"mix{number}")
        mix = dict(zip(names, weights))
        (output,) = llm.generate(prompt_ids(2, 20, VOCABULARY), PARAMS, lora_request=mix, use_tqdm=False)
        assert error(output, model.eval()) < TOLERANCE


@pytest.mark.parametrize("name", ["a head of its own", "tokens of its own", "norms of its own"])
def test_rows_of_their_own_are_no_sum_and_named_alone(trained: Trained, name: str) -> None:
    llm = trained.serve(name, "plain")
    assert not llm.engine.add_lora(trained.loras[name]).additive
    for mix in ({name: 0.5}, {name: 1.0, "plain": 1.0}):
        with pytest.raises(RequestError, match=f"{name}.*name it alone"):
            llm.generate([5], PARAMS, lora_request=mix, use_tqdm=False)
    (output,) = llm.generate(prompt_ids(3, 9, VOCABULARY), PARAMS, lora_request={name: 1.0}, use_tqdm=False)
    trained.check(output, name)


def test_embeddings_that_are_the_bases_own_take_nothing(trained: Trained, tmp_path: Path) -> None:
    saved = train(trained.hf, {"r": 8, "save_embedding_layers": True}, tmp_path / "saved", seed=9)
    plain = train(trained.hf, {"r": 8}, tmp_path / "plain", seed=9)
    assert len(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == 2 + len(
        load_file(tmp_path / "plain" / "adapter_model.safetensors")
    )
    llm = trained.serve(lora_ends_memory=0)
    versions = [
        llm.engine.add_lora(LoRARequest(name, number, str(tmp_path / name)))
        for number, name in enumerate(("saved", "plain"), 7)
    ]
    assert versions[0].nbytes == versions[1].nbytes
    assert versions[0].additive
    assert versions[0].digest != versions[1].digest
    (output,) = llm.generate(prompt_ids(3, 9, VOCABULARY), PARAMS, lora_request="saved", use_tqdm=False)
    assert max(error(output, saved), error(output, plain)) < TOLERANCE


def test_trained_tokens_take_the_blocks_they_are_in(trained: Trained) -> None:
    llm = trained.serve("plain")
    plain = llm.engine.add_lora(trained.loras["plain"]).nbytes
    block = 128 * trained.hf.config.hidden_size * 4
    ends = 2 if trained.hf.config.tie_word_embeddings else 1
    assert llm.engine.add_lora(trained.loras["tokens of its own"]).nbytes == plain + 3 * ends * block
    assert llm.engine.add_lora(trained.loras["norms of its own"]).nbytes == plain + block


@pytest.mark.parametrize("name", ["a head of its own", "low rank on both"])
def test_what_is_larger_than_the_room_is_refused_with_the_number_that_is_enough(trained: Trained, name: str) -> None:
    small = trained.serve("plain", lora_ends_memory=1 << 12)
    with pytest.raises(AdapterMemoryError, match="--lora-ends-memory") as refused:
        small.engine.add_lora(trained.loras[name])
    (output,) = small.generate([5], PARAMS, lora_request="plain", use_tqdm=False)
    trained.check(output, "plain")
    enough = int(str(refused.value).rpartition(" ")[2])
    llm = trained.serve(name, lora_ends_memory=enough)
    (output,) = llm.generate([5, 7], PARAMS, lora_request=name, use_tqdm=False)
    trained.check(output, name)


@pytest.mark.parametrize("name", ["tokens of its own", "low rank on both"])
def test_tensors_in_memory_mean_what_they_mean_in_a_folder(trained: Trained, name: str) -> None:
    folder = Path(trained.loras[name].lora_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    llm = trained.serve(name)
    version = llm.engine.add_lora("held", tensors=tensors, config=trained.peft[name].peft_config["default"])
    assert version.digest == llm.engine.add_lora(trained.loras[name]).digest
    (output,) = llm.generate(prompt_ids(3, 9, VOCABULARY), PARAMS, lora_request="held", use_tqdm=False)
    trained.check(output, name)


def test_the_same_rows_of_other_tokens_are_another_adapter(trained: Trained, tmp_path: Path) -> None:
    train(trained.hf, {"trainable_token_indices": [3, 4]}, tmp_path / "a", seed=1)
    llm = trained.serve()
    first = llm.engine.add_lora(LoRARequest("first", 1, str(tmp_path / "a")))
    reconfigure(tmp_path / "a", trainable_token_indices=[3, 5])
    second = llm.engine.add_lora(LoRARequest("second", 2, str(tmp_path / "a")))
    assert first.digest != second.digest


def test_only_the_modules_that_the_operator_named_are_changed(trained: Trained) -> None:
    llm = trained.serve(lora_target_modules=("q_proj", "v_proj", "embed_tokens"))
    for name in ("low rank on the head", "a head of its own", "norms of its own"):
        with pytest.raises(AdapterMismatchError, match="--lora-target-modules"):
            llm.engine.add_lora(trained.loras[name])
    for name in ("low rank on the embedding", "an embedding of its own"):
        (output,) = llm.generate([5, 7], PARAMS, lora_request=trained.loras[name], use_tqdm=False)
        trained.check(output, name)


# ---- a vocabulary of its own ----

RESIZED: dict[str, tuple[int, dict[str, Any]]] = {
    "added and not trained": (391, {"r": 8}),
    "added and trained": (391, {"trainable_token_indices": [290, 390, 3]}),
    "added and the embedding saved": (391, {"modules_to_save": ["embed_tokens"]}),
    "added and both ends saved": (300, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "cut": (270, {"r": 8}),
    "cut and both ends saved": (200, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.fixture(scope="module")
def resized(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LoRARequest, PeftModel]]:
    root, made = tmp_path_factory.mktemp("resized"), {}
    for number, (name, (size, config)) in enumerate(RESIZED.items()):
        base = load_hf(trained.base)
        torch.manual_seed(number)
        base.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            base.get_input_embeddings().weight[VOCABULARY:].normal_(std=0.1)
        peft = train(base, config, root / str(number), seed=number)
        made[name] = LoRARequest(name, 50 + number, str(root / str(number))), peft
    return made


def test_each_knows_its_own_tokens_in_one_batch_with_those_who_do_not(
    trained: Trained, resized: dict[str, tuple[LoRARequest, PeftModel]], compiled: bool
) -> None:
    others = [None, "plain", "low rank on both", "a head of its own"]
    llm = trained.serve(max_loras=12, max_num_batched_tokens=40, max_num_seqs=12)
    names = [*RESIZED, *others] * 2
    prompts: list[Prompt] = []
    for number, name in enumerate(names):
        size = RESIZED[name][0] if name in RESIZED else VOCABULARY
        prompts.append([size - 1, *prompt_ids(number, 1 + 5 * number % 30, size), size - 1])
    loras = [resized[name][0] if name in RESIZED else trained.loras[name] if name else None for name in names]
    sizes = {version.name: version.vocabulary for version in map(llm.engine.add_lora, filter(None, loras))}
    assert sizes == {name: RESIZED[name][0] if name in RESIZED else 0 for name in names if name}
    for output, name in zip(llm.generate(prompts, PARAMS, lora_request=loras, use_tqdm=False), names):
        if name in RESIZED:
            assert error(output, resized[name][1]) < TOLERANCE, name
        else:
            trained.check(output, name)


def test_a_token_is_nobodys_who_does_not_know_it(
    trained: Trained, resized: dict[str, tuple[LoRARequest, PeftModel]]
) -> None:
    llm = trained.serve("plain")
    for name in ("added and trained", "cut"):
        llm.engine.add_lora(resized[name][0])
    greedy = SamplingParams(temperature=0, max_tokens=3)
    for mix, unknown in ((None, 290), ("plain", 290), ("cut", 270), ("added and trained", 391)):
        with pytest.raises(RequestError, match=f"token id {unknown} is not in the vocabulary of {unknown}"):
            llm.generate([5, unknown], greedy, lora_request=mix, use_tqdm=False)
        with pytest.raises(RequestError, match="logit_bias"):
            llm.generate([5], SamplingParams(logit_bias={unknown: 1.0}), lora_request=mix, use_tqdm=False)
        llm.generate([5, unknown - 1], greedy, lora_request=mix, use_tqdm=False)
    wish = SamplingParams(temperature=0, max_tokens=2, logit_bias={390: 1e4}, ignore_eos=True)
    prompts: list[Prompt] = [[5], [6], [7]]
    params = [greedy, wish, greedy]
    _, output, _ = llm.generate(prompts, params, lora_request=[None, "added and trained", "cut"], use_tqdm=False)
    assert output.outputs[0].token_ids == [390, 390]
    hot = SamplingParams(temperature=100.0, max_tokens=60, ignore_eos=True, n=4, seed=1)
    for mix, size in ((None, 290), ("cut", 270)):
        others: list[Any] = [mix, "added and trained"]
        output, _ = llm.generate([[5], [6]], hot, lora_request=others, use_tqdm=False)
        assert max(token for answer in output.outputs for token in answer.token_ids) < size


def test_very_many_added_tokens_are_refused(trained: Trained, tmp_path: Path) -> None:
    base = load_hf(trained.base)
    base.resize_token_embeddings(VOCABULARY + 1025, mean_resizing=False)
    train(base, {"r": 8}, tmp_path / "a", seed=0)
    with pytest.raises(AdapterUnsupportedError, match=r"adds 1025 tokens .* at most 1024 .*; serve the resized"):
        trained.serve().engine.add_lora(LoRARequest("a", 1, str(tmp_path / "a")))


def test_low_rank_factors_over_a_resized_vocabulary_are_refused(trained: Trained, tmp_path: Path) -> None:
    base = load_hf(trained.base)
    base.resize_token_embeddings(300, mean_resizing=False)
    train(base, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, tmp_path / "a", seed=0)
    with pytest.raises(AdapterUnsupportedError, match=r"over a resized vocabulary of 300.*retrain with"):
        trained.serve().engine.add_lora(LoRARequest("a", 1, str(tmp_path / "a")))


def test_dora_over_a_weight_that_is_not_the_bases_is_refused_and_one_that_is_may_be_saved_along(
    trained: Trained, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True}
    peft = train(trained.hf, config, tmp_path / "a", seed=0)
    lora = LoRARequest("a", 1, str(tmp_path / "a"))
    llm = trained.serve()
    (output,) = llm.generate(prompt_ids(1, 9, VOCABULARY), PARAMS, lora_request=lora, use_tqdm=False)
    assert error(output, peft) < TOLERANCE
    rewrite(tmp_path / "a", changed("base_layer.weight"))
    with pytest.raises(AdapterUnsupportedError, match=r"(lm_head|embed_tokens) has DoRA over a weight that is not"):
        trained.serve().engine.add_lora(lora)


def test_an_adapter_that_wakes_in_the_prompt_has_no_rows_of_its_own(trained: Trained, tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "alora_invocation_tokens": [5, 6]}
    train(trained.hf, config, tmp_path / "a", seed=0)
    lora = LoRARequest("a", 1, str(tmp_path / "a"))
    trained.serve().engine.add_lora(lora)
    rewrite(tmp_path / "a", changed("base_layer.weight"))
    with pytest.raises(AdapterUnsupportedError, match=r"alora_invocation_tokens with rows of its own"):
        trained.serve().engine.add_lora(lora)


def changed(end: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Other values in the tensors whose names end so; there must be some."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert any(name.endswith(end) for name in tensors)
        return {name: tensor + 1 if name.endswith(end) else tensor for name, tensor in tensors.items()}

    return change


def test_announced_adapters_of_the_ends_are_checked_by_their_header(trained: Trained, tmp_path: Path) -> None:
    whole = LoRARequest("a head of its own", 1, trained.loras["a head of its own"].lora_path)
    engine = trained.serve().engine
    engine.announce_lora(whole)
    train(trained.hf, {"modules_to_save": ["lm_head"]}, tmp_path / "a", seed=0)
    rewrite(tmp_path / "a", lambda tensors: {n: t[:99] if "lm_head" in n else t for n, t in tensors.items()})
    with pytest.raises(AdapterUnsupportedError, match="resized to"):
        engine.announce_lora(LoRARequest("a", 2, str(tmp_path / "a")))
