"""Every family against transformers: the same float32 logits, however the tokens are cut into steps."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config

from aiolora import LLM, SamplingParams
from aiolora.config import EngineArgs
from aiolora.engine.sequence import Sequence
from aiolora.errors import ConfigError, ModelError, ModelNotFoundError, UnsupportedModelError, WeightsError
from aiolora.models.loading import load_decoder
from aiolora.models.model import Model
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.dense import DENSE, longrope
from tests.tiny import (
    FAMILIES,
    TOLERANCE,
    VOCAB,
    Loaded,
    everything,
    hf_logits,
    kernels,
    load_hf,
    make_model,
    prompt_ids,
    reconfigure,
    reported,
)

LENGTHS = (75, 7, 1, 40)
HF = Callable[[str], nn.Module]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_prompts_of_one_step_have_the_logits_of_transformers(family: str, model_of: ModelOf, hf_of: HF) -> None:
    loaded, prompts = Loaded.of(model_of(family)), [prompt_ids(i, length) for i, length in enumerate(LENGTHS)]
    seqs = loaded.sequences(prompts)
    logits = torch.cat(loaded.step(*((seq, 0, len(seq.tokens)) for seq in seqs)))
    expected = torch.cat([hf_logits(hf_of(family), prompt) for prompt in prompts])
    assert 0.3 < expected.std() < 3
    assert_same(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_decoding_in_mixed_steps_change_no_logit(family: str, model_of: ModelOf, hf_of: HF) -> None:
    loaded = Loaded.of(model_of(family))
    long, short = loaded.sequences([prompt_ids(5, 60), prompt_ids(6, 33)])
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def step(*runs: tuple[Sequence, int, int]) -> None:
        for (seq, _, _), logits in zip(runs, loaded.step(*runs)):
            seen[seq.number].append(logits)

    step((long, 0, 9), (short, 0, 32))
    step((short, 32, 1), (long, 9, 40))
    step((long, 49, 3))
    step((long, 52, 8))
    for number in range(6):
        long.tokens.append((11 * (number + 1)) % VOCAB)
        short.tokens.append((23 * (number + 1)) % VOCAB)
        step((long, 60 + number, 1), (short, 33 + number, 1))
    for seq in (long, short):
        assert_same(torch.cat(seen[seq.number]), hf_logits(hf_of(family), seq.tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logprobs_that_llm_reports_are_those_of_transformers(family: str, model_of: ModelOf, hf_of: HF) -> None:
    llm = LLM(str(model_of(family)), dtype="float32", max_num_batched_tokens=37, max_num_seqs=3)
    prompts: list[Prompt] = [prompt_ids(i, length) for i, length in enumerate(LENGTHS)]
    cold = llm.generate(prompts, everything(6), use_tqdm=False)
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=VOCAB)
    warm = llm.generate(prompts, greedy, use_tqdm=False)  # the prompts' full pages come from the cache
    for output, again in zip(cold, warm):
        tokens, logprobs = reported(output)
        expected = hf_logits(hf_of(family), tokens).log_softmax(-1)[:-1]
        assert_same(logprobs, expected)
        assert output.outputs[0].token_ids == expected[-6:].argmax(-1).tolist() == again.outputs[0].token_ids
        assert output.prompt_token_ids == tokens[:-6]
        rows = [[top[token].logprob for token in range(VOCAB)] for top in again.outputs[0].logprobs or []]
        assert_same(torch.tensor(rows), expected[-6:])


@pytest.mark.parametrize("compiled", [False, True])
def test_the_references_and_the_compiled_kernels_both_agree(compiled: bool, model_of: ModelOf, hf_of: HF) -> None:
    for family in ("llama", "qwen3", "mistral", *DENSE):
        with kernels(compiled=compiled):
            loaded = Loaded.of(model_of(family))
            (seq,) = loaded.sequences([prompt_ids(9, 50)])
            logits = [*loaded.step((seq, 0, 44)), *loaded.step((seq, 44, 5)), *loaded.step((seq, 49, 1))]
        assert_same(torch.cat(logits), hf_logits(hf_of(family), seq.tokens))


def test_bfloat16_stays_near_float32(model_of: ModelOf, hf_of: HF) -> None:
    prompt = prompt_ids(3, 50)
    for compiled in (False, True):
        with kernels(compiled=compiled):
            loaded = Loaded.of(model_of("qwen3"), dtype="bfloat16")
            (seq,) = loaded.sequences([prompt])
            (logits,) = loaded.step((seq, 0, 50))
        torch.testing.assert_close(logits, hf_logits(hf_of("qwen3"), prompt), rtol=0, atol=0.15)


@pytest.mark.parametrize("family", DENSE)
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(family: str, model_of: ModelOf, hf_of: HF) -> None:
    prompt = prompt_ids(3, 50)
    exact = hf_logits(hf_of(family), prompt)
    theirs = hf_logits(load_hf(model_of(family)).bfloat16(), prompt)
    for compiled in (False, True):
        with kernels(compiled=compiled):
            loaded = Loaded.of(model_of(family), dtype="bfloat16")
            (seq,) = loaded.sequences([prompt])
            ours = torch.cat([*loaded.step((seq, 0, 44)), *loaded.step((seq, 44, 5)), *loaded.step((seq, 49, 1))])
        assert (ours - exact).std() < 1.25 * (theirs - exact).std()


def load(folder: Path, **args: Any) -> Model:
    return load_decoder(EngineArgs(model=str(folder), dtype="float32", **args), folder, device="cpu")


@pytest.fixture
def copied(model_of: ModelOf, tmp_path: Path) -> Path:
    """A model that a test may break."""
    return Path(shutil.copytree(model_of("llama"), tmp_path / "model"))


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    """Set a tensor of the checkpoint, or leave it out."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors if tensor is None else tensors | {name: tensor}, folder / "model.safetensors")


def test_an_unknown_tensor_is_refused_by_name(copied: Path) -> None:
    change(copied, "model.layers.1.self_attn.q_proj.bias", torch.zeros(64))
    with pytest.raises(WeightsError, match=r"1 tensors unknown .*: model\.layers\.1\.self_attn\.q_proj\.bias"):
        load(copied)


def test_a_missing_tensor_is_refused_by_name(copied: Path) -> None:
    change(copied, "model.layers.0.mlp.up_proj.weight", None)
    with pytest.raises(WeightsError, match=r"1 tensors missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        load(copied)


def test_an_untied_head_must_be_in_the_checkpoint(copied: Path) -> None:
    change(copied, "lm_head.weight", None)
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        load(copied)


def test_a_wrong_shape_is_refused_with_both_shapes(copied: Path) -> None:
    change(copied, "model.norm.weight", torch.ones(65))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight: shape \[65\], the config says \[64\]"):
        load(copied)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_by_path(copied: Path, kept: int) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=re.escape(str(file))):
        load(copied)


def test_a_folder_without_safetensors_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors; only safetensors weights are read"):
        load(copied)


def shard(folder: Path) -> dict[str, str]:
    """Cut the checkpoint into three files with an index, as transformers does: the map of the index."""
    tensors = load_file(folder / "model.safetensors")
    files: dict[str, dict[str, Tensor]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        files.setdefault(f"model-{number % 3 + 1:05}-of-00003.safetensors", {})[name] = tensor
    for file, content in files.items():
        save_file(content, folder / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return weight_map


def test_a_sharded_checkpoint_loads_all_its_files(copied: Path, hf_of: HF) -> None:
    shard(copied)
    loaded = Loaded.of(copied)
    (seq,) = loaded.sequences([prompt_ids(1, 20)])
    assert_same(loaded.step((seq, 0, 20))[0], hf_logits(hf_of("llama"), seq.tokens))


def test_an_absent_shard_is_refused_by_name(copied: Path) -> None:
    shard(copied)
    (copied / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no model-00002-of-00003\.safetensors"):
        load(copied)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_broken_index_is_refused(copied: Path, index: str) -> None:
    shard(copied)
    (copied / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        load(copied)


def test_an_index_that_points_outside_the_folder_is_refused(copied: Path) -> None:
    weight_map = shard(copied)
    outside = {name: f"../{copied.name}/{file}" for name, file in weight_map.items()}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        load(copied)


def test_an_unserved_family_is_refused_with_those_served(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not served: .* llama, .*mistral, .*qwen2"):
        load(tmp_path, model_impl="aiolora")


def test_an_unserved_activation_is_refused(copied: Path) -> None:
    reconfigure(copied, hidden_act="gelu")
    with pytest.raises(UnsupportedModelError, match=r"hidden_act 'gelu' is not served; served are: silu"):
        load(copied, model_impl="aiolora")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not served"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not served"),
        ("starcoder2", {"hidden_act": "relu"}, "hidden_act 'relu' without a gate is not served"),
        ("granite 4", {"num_local_experts": 2}, "num_local_experts=2"),
        ("gpt-oss", {"swiglu_limit": 0.0}, "swiglu_limit=0.0 is not served"),
        ("granite 4", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention is not served"),
    ],
)
def test_what_a_config_asks_for_in_vain_is_refused_by_name(
    family: str, changes: dict[str, object], said: str, model_of: ModelOf, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_of(family), tmp_path / "model"))
    reconfigure(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=said):
        load(folder, model_impl="aiolora")


def test_an_unserved_rope_type_is_refused_with_those_served(copied: Path) -> None:
    reconfigure(copied, rope_parameters={"rope_theta": 1e4, "rope_type": "proportional"})
    with pytest.raises(
        UnsupportedModelError, match="'proportional' is not served; served are: default, linear, dynamic, llama3, yarn"
    ):
        load(copied, model_impl="aiolora")


@pytest.mark.parametrize(("longest", "length"), [(64, 64), (256, 65), (256, 200)])
def test_longrope_turns_by_the_factors_of_the_context_that_is_served(longest: int, length: int, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", **longrope(8, 64, factor=4.0))
    loaded = Loaded.of(folder, max_model_len=longest)
    (seq,) = loaded.sequences([prompt_ids(1, length)])
    assert_same(loaded.step((seq, 0, length))[0], hf_logits(load_hf(folder), seq.tokens))


@pytest.mark.parametrize(
    "config", [b"", b"{", b"[]", b"{}", b'{"model_type": 3}', b'{"model_type": "no-such"}', b"\xff"]
)
def test_a_config_that_cannot_be_read_is_a_model_error(copied: Path, config: bytes) -> None:
    (copied / "config.json").write_bytes(config)
    with pytest.raises(ModelError, match=r"config\.json|model_type"):
        load(copied)


def test_a_folder_without_a_config_is_not_found(copied: Path) -> None:
    (copied / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        LLM(str(copied))


def test_a_context_longer_than_the_models_is_refused_and_a_shorter_one_kept(copied: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len=257 is over the model's context of 256 tokens"):
        load(copied, max_model_len=257)
    assert load(copied, max_model_len=33).config.max_positions == 33


def test_dummy_weights_need_no_checkpoint_and_follow_the_seed(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    first, same, other = (load(copied, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
