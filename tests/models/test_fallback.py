"""Architectures that only transformers computes, served by its code with our parts in it: docs/models-fallback.md."""

import asyncio
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from aiolora import LLM, AsyncLLMEngine, LoRARequest, RequestOutput, SamplingParams
from aiolora.config import EngineArgs
from aiolora.errors import (
    AdapterMismatchError,
    AdapterUnsupportedError,
    ConfigError,
    UnsupportedModelError,
    WeightsError,
)
from aiolora.lora.inspection import inspect_adapter
from aiolora.models.building import load_fallback
from aiolora.models.loading import load_decoder, read_config
from aiolora.models.model import Model
from aiolora.models.paths import way_of
from aiolora.types import Prompt
from tests.borrowed import ONE_BY_ONE, OURS, REFUSED, SERVED, SIZES, make_borrowed, write_config
from tests.conftest import ModelOf
from tests.sparse import SPARSE
from tests.tiny import (
    ALL_LINEARS,
    DEVICE,
    TELLS,
    TOLERANCE,
    VOCAB,
    Loaded,
    everything,
    hf_logits,
    load_hf,
    load_peft,
    make_adapter,
    prompt_ids,
    reported,
    rewrite,
)

TABLE = Path(__file__).parents[2] / "docs" / "models-fallback.md"
ADAPTERS = {"all": 8, "few": 5}  # ranks: of every projection, and of every third
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate")
LENGTHS = (60, 60, 60, 7)
HEAD = """# Models by transformers' own code

Written by `tests/models/test_fallback.py`. A model whose architecture our decoder does not have runs the code that
transformers has for it, with our attention, paged KV cache and LoRA in it. Each of these was made tiny with random
weights and held against transformers, and with PEFT adapters against PEFT: prompts in chunks, decoding, several
sequences and adapters in a step, the prefix cache, in float32 on a CPU. The error is the largest difference of a logit
or a log-probability, rounded up to a power of ten, 1e-5 at the least; the limit is 1e-4. Whatever is loaded is held
against itself once more when it starts: see `models/proof.py`.

Adapters reach every projection that runs once a token, the embedding and the head. Routed experts and norms take none
here. Steps are not captured in CUDA graphs. Chunks of attention run in plain PyTorch.

Models that are older than transformers' attention interface, or attend otherwise, keep their own attention: a step then
runs them once for each of its sequences, on keys and values out of our pages ("one by one" in the table).
"""
FolderOf = Callable[[str], Path]


@dataclass(frozen=True)
class Measured:
    """One architecture, held against transformers and PEFT."""

    steps: float  # largest difference of a logit, however the tokens were cut into steps
    served: float  # of a log-probability through the engine, base and adapters in one batch
    apart: float  # smallest difference that an adapter makes
    projections: int  # that take adapters


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    @cache
    def make(name: str) -> Path:
        kind, changes = (SERVED | OURS)[name]
        return make_borrowed(tmp_path_factory.mktemp("borrowed") / "model", kind, changes)

    return make


@pytest.fixture(scope="module")
def measured_of(folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Measured]:
    @cache
    def measure(name: str) -> Measured:
        folder = folder_of(name)
        steps, projections = in_steps(folder)
        served, apart = through_the_engine(folder, projections, tmp_path_factory.mktemp("adapters"))
        return Measured(steps, served, apart, len(projections))

    return measure


def in_steps(folder: Path) -> tuple[float, list[str]]:
    """The largest error over chunks, decoding and two sequences in each step; which projections take adapters."""
    prompts = [prompt_ids(1, 45), prompt_ids(2, 7)]
    hf, loaded = load_hf(folder), Loaded.of(folder, model_impl="transformers")
    long, short = loaded.sequences(prompts)
    seen: list[list[Tensor]] = [[], []]
    for runs in (
        [(long, 0, 20), (short, 0, 5)],
        [(short, 5, 1), (long, 20, 23)],
        [(long, 43, 1)],
        [(long, 44, 1), (short, 6, 1)],
    ):
        for (seq, _, _), logits in zip(runs, loaded.step(*runs)):
            seen[seq.number].append(logits)
    apart = [(torch.cat(ours) - hf_logits(hf, prompt)).abs().max() for ours, prompt in zip(seen, prompts)]
    return float(max(apart)), [name for _, linear in loaded.model.linears() for name in linear.parts]


def through_the_engine(folder: Path, projections: list[str], adapters: Path) -> tuple[float, float]:
    """The largest error over prompts in chunks and answers, then out of the prefix cache; how much adapters tell."""
    if peft_means_experts(load_hf(folder)):
        projections = [name for name in projections if name.rpartition(".")[2] not in OF_EXPERTS]
    targets = {"all": projections, "few": projections[::3]}
    folders = {
        name: make_adapter(folder, adapters / name, seed=rank, r=rank, target_modules=targets[name])
        for name, rank in ADAPTERS.items()
    }
    peft = load_peft(folder, folders)
    llm = LLM(
        str(folder),
        model_impl="transformers",
        dtype="float32",
        enable_lora=True,
        max_loras=2,
        max_num_batched_tokens=37,
    )
    names = ["all", None, "few", None]
    loras = [None if name is None else LoRARequest(name, ADAPTERS[name], str(folders[name])) for name in names]
    prompts: list[Prompt] = [prompt_ids(3, length) for length in LENGTHS]
    errors, first = list[float](), list[Tensor]()
    for name, output in zip(names, llm.generate(prompts, everything(5), lora_request=loras, use_tqdm=False)):
        tokens, ours = reported(output)
        errors.append(float((ours - expected(peft, name, tokens)).abs().max()))
        first.append(ours[:6])
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=VOCAB)
    cached = llm.generate(prompts, greedy, lora_request=loras, use_tqdm=False)  # full pages come from the prefix cache
    errors += [answer_error(peft, name, output) for name, output in zip(names, cached)]
    return max(errors), min(float((first[i] - first[1]).abs().max()) for i in (0, 2))


def serve(folder: Path, **args: Any) -> LLM:
    return LLM(str(folder), model_impl="transformers", dtype="float32", enable_lora=True, **args)


def peft_means_experts(model: nn.Module) -> bool:
    """Whether PEFT takes the names of projections for those of routed experts, which are one parameter."""
    return any(name.endswith("experts.down_proj") for name, _ in model.named_parameters())


def expected(peft: Any, name: str | None, tokens: list[int]) -> Tensor:
    if name is None:
        with peft.disable_adapter():
            return hf_logits(peft, tokens).log_softmax(-1)[:-1]
    peft.set_adapter(name)
    return hf_logits(peft, tokens).log_softmax(-1)[:-1]


def answer_error(peft: Any, name: str | None, output: RequestOutput) -> float:
    answer = output.outputs[0]
    theirs = expected(peft, name, [*output.prompt_token_ids, *answer.token_ids])[-len(answer.token_ids) :]
    ours = torch.tensor([[top[token].logprob for token in range(VOCAB)] for top in answer.logprobs or []])
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", SERVED)
def test_logits_are_those_of_transformers_however_tokens_are_cut_into_steps(
    name: str, measured_of: Callable[[str], Measured]
) -> None:
    assert measured_of(name).steps < TOLERANCE


@pytest.mark.parametrize("name", SERVED)
def test_peft_adapters_and_the_base_in_one_batch_have_pefts_numbers(
    name: str, measured_of: Callable[[str], Measured]
) -> None:
    measured = measured_of(name)
    assert measured.served < TOLERANCE
    assert measured.apart > TELLS, "an adapter that changes nothing"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name_with_the_reason(name: str, tmp_path: Path) -> None:
    kind, changes, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"model_type {kind!r} is not served: .*{reason}"):
        load(write_config(tmp_path, kind, changes))


@pytest.mark.parametrize("family", ["llama tied", "mistral", "gemma2", "granite biased", "smollm3", "gpt-oss"])
def test_a_family_of_ours_answers_the_same_by_transformers_code(family: str, model_of: ModelOf, tmp_path: Path) -> None:
    base = model_of(family)
    targets = ALL_LINEARS[:4] if family in SPARSE else ALL_LINEARS  # routed experts take no adapters there
    lora = LoRARequest("a", 1, str(make_adapter(base, tmp_path / "a", target_modules=targets)))
    prompts: list[Prompt] = [prompt_ids(i, length) for i, length in enumerate((75, 40, 7, 40))]
    ours, theirs = (
        LLM(str(base), model_impl=impl, dtype="float32", enable_lora=True, max_num_batched_tokens=37).generate(
            prompts, everything(8), lora_request=[lora, None, lora, None], use_tqdm=False
        )
        for impl in ("aiolora", "transformers")
    )
    for one, other in zip(ours, theirs):
        (tokens, logprobs), (same, close) = reported(one), reported(other)
        assert tokens == same
        torch.testing.assert_close(logprobs, close, rtol=0, atol=TOLERANCE)


ENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora on conv1d": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "trained biases on conv1d": ("gpt2", {"bias": "lora_only", "target_modules": ["c_proj"], "fan_in_fan_out": True}),
    "embedding of gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "trained tokens of gpt2": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [3, 17]}}),
    "embed_in and embed_out": ("gpt_neox", {"target_modules": ["embed_in", "embed_out", "dense"]}),
    "a whole embed_out": ("gpt_neox", {"target_modules": ["query_key_value"], "modules_to_save": ["embed_out"]}),
    "a scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "trained tokens scaled": ("gemma3", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17]}),
    "a head with a bias": ("phimoe", {"target_modules": ["lm_head", "q_proj"]}),
    "a head below a soft-cap": ("vaultgemma", {"target_modules": ["lm_head", "q_proj"]}),
    "a scaled head": ("cohere2", {"target_modules": ["lm_head", "v_proj"], "use_dora": True}),
    "a whole scaled head": ("granite", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
}


@pytest.mark.parametrize("case", ENDS)
def test_embedding_head_dora_and_biases_have_pefts_numbers(case: str, folder_of: FolderOf, tmp_path: Path) -> None:
    name, config = ENDS[case]
    base = folder_of(name)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    train_the_rest(adapter, config.get("modules_to_save", []))
    peft, hf = load_peft(base, {"all": adapter}), load_hf(base)
    llm = serve(base, max_num_batched_tokens=37)
    prompts: list[Prompt] = [[*prompt_ids(3, 40), 3, 17]] * 3
    lora = LoRARequest("all", 1, str(adapter))
    outputs = llm.generate(prompts, everything(4), lora_request=[None, lora, None], use_tqdm=False)
    for model, output in zip([hf, peft, hf], outputs):
        tokens, ours = reported(output)
        torch.testing.assert_close(ours, hf_logits(model, tokens).log_softmax(-1)[:-1], rtol=0, atol=TOLERANCE)
    assert (reported(outputs[0])[1][:41] - reported(outputs[1])[1][:41]).abs().max() > 0.01


def train_the_rest(folder: Path, saved: list[str]) -> None:
    """Move what an adapter brings beside its factors, the modules `saved` whole among it; leave out the base's own."""

    def moved(name: str, tensor: Tensor) -> Tensor:
        if not re.search("|".join(["magnitude", "trainable_tokens", r"(?<!base_layer.)bias", *saved]), name):
            return tensor
        return tensor + 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))

    rewrite(
        folder,
        lambda tensors: {name: moved(name, one) for name, one in tensors.items() if "base_layer.bias" not in name},
    )


@pytest.mark.parametrize(
    ("name", "config", "error", "match"),
    [
        ("phimoe", {"target_modules": ["router"]}, AdapterMismatchError, r"mlp\.router"),
        ("gpt2", {"modules_to_save": ["ln_f"], "target_modules": ["c_attn"]}, AdapterUnsupportedError, "ln_f"),
    ],
)
def test_an_adapter_on_what_takes_none_is_refused_by_name(
    name: str, config: dict[str, Any], error: type[Exception], match: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    base = folder_of(name)
    lora = LoRARequest("a", 1, str(make_adapter(base, tmp_path / "a", **config)))
    llm = serve(base)
    with pytest.raises(error, match=match):
        llm.engine.add_lora(lora)


async def test_streams_of_a_borrowed_model_and_its_adapter_run_side_by_side(
    folder_of: FolderOf, tmp_path: Path
) -> None:
    base = folder_of("gpt_neox")
    adapter = make_adapter(base, tmp_path / "a", target_modules=["query_key_value"], strength=2.0)
    peft = load_peft(base, {"all": adapter})
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompt = prompt_ids(4, 30)

    async def stream(engine: AsyncLLMEngine, lora: LoRARequest | None) -> list[int]:
        return [output.token_id async for output in engine.stream(prompt, greedy, lora=lora)]

    async with AsyncLLMEngine.from_engine_args(
        EngineArgs(model=str(base), dtype="float32", enable_lora=True)
    ) as engine:
        plain, adapted = await asyncio.gather(stream(engine, None), stream(engine, LoRARequest("a", 1, str(adapter))))
    assert plain != adapted
    for which, answer in ((None, plain), ("all", adapted)):
        assert expected(peft, which, [*prompt, *answer])[-12:].argmax(-1).tolist() == answer


def test_layers_that_keep_more_than_keys_and_values_are_found_out_by_their_logits(tmp_path: Path) -> None:
    folder = make_borrowed(tmp_path, "minimax", {})
    hf = read_config(folder)
    with pytest.raises(UnsupportedModelError, match="not the same once sequences share a step"):
        load_fallback(folder, hf, dtype=torch.float32, device="cpu", max_positions=64, seed=None)


def test_bfloat16_stays_near_float32(folder_of: FolderOf) -> None:
    folder, prompt = folder_of("olmo2"), prompt_ids(3, 50)
    loaded = Loaded.of(folder, model_impl="transformers", dtype="bfloat16")
    (seq,) = loaded.sequences([prompt])
    (logits,) = loaded.step((seq, 0, 50))
    torch.testing.assert_close(logits, hf_logits(load_hf(folder), prompt), rtol=0, atol=0.2)


def test_a_missing_or_unknown_tensor_is_refused_by_name(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("gpt_neox"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 tensors missing: gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight"):
        load(folder)
    whole = tensors | {"gpt_neox.layers.1.mlp.dense_h_to_4h.weight": lost, "gpt_neox.extra.weight": lost.clone()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 tensors unknown .*: gpt_neox\.extra\.weight"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(WeightsError, match=re.escape(str(folder))):
        load(folder)


def test_masks_and_frequencies_of_older_checkpoints_are_passed_over(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("gptj"), tmp_path / "model"))
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.0.attn.masked_bias": torch.ones(())}
    save_file(load_file(folder / "model.safetensors") | mask, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).config.num_layers == 2


def test_an_adapter_is_inspected_without_the_weights(folder_of: FolderOf, tmp_path: Path) -> None:
    adapter = make_adapter(folder_of("gpt_neox"), tmp_path / "a", target_modules=["dense", "embed_in"])
    config = write_config(tmp_path / "config", *SERVED["gpt_neox"])
    report = inspect_adapter(str(adapter), model=str(config), max_rank=64)
    assert report.version is not None
    assert report.coverage is not None
    assert (report.coverage.ignored, report.coverage.missing) == ((), ())


def test_dummy_weights_need_no_checkpoint_and_follow_the_seed(tmp_path: Path) -> None:
    folder = write_config(tmp_path, *SERVED["gpt2"])
    first, same, other = (load(folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embed.weight, same.embed.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_what_cannot_be_kept_is_a_config_error(folder_of: FolderOf) -> None:
    with pytest.raises(ConfigError, match="max_model_len=257 is over the model's context of 256"):
        load(folder_of("gpt2"), max_model_len=257)
    with pytest.raises(ConfigError, match="compile=True"):
        load(folder_of("gpt2"), compile=True)
    assert load(folder_of("gpt2"), max_model_len=33).config.max_positions == 33


def test_nothing_of_it_is_captured_in_a_graph(folder_of: FolderOf) -> None:
    assert load(folder_of("gpt2")).capturable is False


def load(folder: Path, **args: Any) -> Model:
    return load_decoder(EngineArgs(model=str(folder), **({"dtype": "float32"} | args)), folder, device="cpu")


def test_the_table_in_the_docs_is_what_was_measured(measured_of: Callable[[str], Measured]) -> None:
    """Writes the table; run twice to accept a change, and read its diff."""
    committed = rows(TABLE.read_text()) if TABLE.exists() else []
    measured = table({name: measured_of(name) for name in SERVED})
    if DEVICE == "cpu":  # of which it speaks
        TABLE.write_text(measured)
    assert rows(measured) == committed


def table(measured: dict[str, Measured]) -> str:
    lines = [
        HEAD,
        "| model | model_type | runs | projections that take adapters | largest error |",
        "|---|---|---|---|---|",
    ]
    for name, one in measured.items():
        error = bound(max(one.steps, one.served))
        runs = "one by one" if name in ONE_BY_ONE else "together"
        lines.append(f"| {name} | `{SERVED[name][0]}` | {runs} | {one.projections} in 2 layers | {error} |")
    lines += ["", "| refused | model_type | why |", "|---|---|---|"]
    for name, (kind, changes, _) in REFUSED.items():
        why = way_of(CONFIG_MAPPING[kind](**(SIZES | changes))).reasons[-1].partition(": ")[2]
        lines.append(f"| {name} | `{kind}` | {why} |")
    return "\n".join(lines) + "\n"


def bound(error: float) -> str:
    """Rounded up to a power of ten; below 1e-5 it is the noise of a machine's float32."""
    return f"{10.0 ** max(-5, math.ceil(math.log10(error))):.0e}"


def rows(text: str) -> list[str]:
    """Those of the tables, without the errors measured."""
    return [re.sub(r"\| [0-9e-]+ \|$", "", line) for line in text.splitlines() if line.startswith("|")]
