"""Adapters that cannot be served: each is refused by a named error, and nobody else notices."""

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aiolora import LLM, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from aiolora.errors import (
    AdapterChangedError,
    AdapterConflictError,
    AdapterError,
    AdapterFormatError,
    AdapterMemoryError,
    AdapterMismatchError,
    AdapterNotFoundError,
    AdapterRankError,
    AdapterUnsupportedError,
    UnknownModelError,
)
from tests.conftest import ModelOf
from tests.tiny import ALL_LINEARS, make_adapter, prompt_ids, reconfigure, rewrite

ROOT = Path(__file__).parents[2]
PROMPT = prompt_ids(0, 20)
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def base(model_of: ModelOf) -> Path:
    return model_of("llama")


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("good"), r=8)


@pytest.fixture(scope="module")
def llm(base: Path, good: Path) -> LLM:
    llm = LLM(str(base), dtype="float32", enable_lora=True, max_lora_rank=16, max_loras=2)
    llm.engine.add_lora(LoRARequest("good", 1, str(good)))
    return llm


def answers(llm: LLM) -> list[tuple[list[int], float]]:
    """Of the base and of the adapter 'good', their prompts in the prefix cache."""
    for _ in range(2):
        outputs = llm.generate([PROMPT, PROMPT], GREEDY, lora_request=[None, "good"], use_tqdm=False)
    return [(output.outputs[0].token_ids, output.outputs[0].cumulative_logprob) for output in outputs]


@pytest.fixture
def refuse(llm: LLM) -> Iterator[Callable[..., AdapterError]]:
    """Ask for an adapter, expect that error; the base and a good adapter answer as before, nothing is kept."""
    before, known = answers(llm), llm.engine.list_loras()

    def ask(folder: Path | str, kind: type[AdapterError], *said: str) -> AdapterError:
        with pytest.raises(kind) as caught:
            llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("bad", 7, str(folder)), use_tqdm=False)
        assert type(caught.value) is kind
        assert caught.value.adapter == "bad"
        for text in ("adapter 'bad'", *said):
            assert text in str(caught.value)
        return caught.value

    yield ask
    llm.engine.remove_lora("bad")
    assert answers(llm) == before
    assert llm.engine.list_loras() == known
    assert before[0] != before[1]


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> Break:
    """Edit the tensors in place, or return others."""

    def apply(folder: Path) -> None:
        def edited(content: dict[str, Tensor]) -> dict[str, Tensor]:
            return change(content) or content

        rewrite(folder, edited)

    return apply


def config(**fields: object) -> Break:
    return lambda folder: reconfigure(folder, **fields)


def config_bytes(data: bytes) -> Break:
    return lambda folder: (folder / "adapter_config.json").write_bytes(data)


def file_bytes(change: Callable[[bytes], bytes]) -> Break:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def header(text: str | bytes, body: bytes = b"") -> Break:
    data = text.encode() if isinstance(text, str) else text
    return file_bytes(lambda _: struct.pack("<Q", len(data)) + data + body)


def drop(key: str) -> Break:
    return tensors(lambda content: {name: tensor for name, tensor in content.items() if name != key})


def put(key: str, value: Callable[[Tensor], Tensor]) -> Break:
    return tensors(lambda content: {**content, key: value(content.get(key, torch.zeros(8, 64)))})


def spoil(key: str, value: float) -> Break:
    def change(content: dict[str, Tensor]) -> None:
        content[key][0, 0] = value

    return tensors(change)


def both(*breaks: Break) -> Break:
    def apply(folder: Path) -> None:
        for one in breaks:
            one(folder)

    return apply


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
HEAD, NORM = "base_model.model.lm_head.weight", "base_model.model.model.norm.weight"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

BROKEN: dict[str, tuple[Break, type[AdapterError], tuple[str, ...]]] = {
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        AdapterNotFoundError,
        ("holds no adapter_config.json",),
    ),
    "an empty config": (config_bytes(b""), AdapterFormatError, ("adapter_config.json is not a PEFT config",)),
    "a config that is not JSON": (config_bytes(b"r: 8"), AdapterFormatError, ("not a PEFT config",)),
    "a config that is a list": (config_bytes(b"[1]"), AdapterFormatError, ("not a PEFT config", "array")),
    "a deep config": (config_bytes(b"[" * 500_000), AdapterFormatError, ("not a PEFT config",)),
    "a deep value": (
        config_bytes(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        AdapterFormatError,
        ("not a PEFT config",),
    ),
    "a config in latin-1": (config_bytes(b'{"r": 8, "revision": "\xe9"}'), AdapterFormatError, ("not a PEFT config",)),
    "a config of megabytes": (config_bytes(b" " * (2 << 20)), AdapterFormatError, ("is over 1048576 bytes",)),
    "a rank that is text": (config(r="eight"), AdapterFormatError, ("not a PEFT config", "$.r")),
    "no safetensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        AdapterFormatError,
        ("holds no adapter_model.safetensors",),
    ),
    "a pickle only": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        AdapterFormatError,
        ("adapter_model.bin is a pickle, which is never read", "safe_serialization=True"),
    ),
    "a folder for tensors": (
        lambda folder: both(
            lambda f: (f / "adapter_model.safetensors").unlink(), lambda f: (f / "adapter_model.safetensors").mkdir()
        )(folder),
        AdapterFormatError,
        ("holds no adapter_model.safetensors",),
    ),
    "an empty file": (file_bytes(lambda data: b""), AdapterFormatError, ("truncated", "file of 0")),
    "a file cut in its length": (file_bytes(lambda data: data[:5]), AdapterFormatError, ("truncated", "file of 5")),
    "a file cut in its header": (file_bytes(lambda data: data[:99]), AdapterFormatError, ("truncated", "file of 99")),
    "a file cut behind its header": (
        file_bytes(lambda data: data[: 8 + struct.unpack("<Q", data[:8])[0]]),
        AdapterFormatError,
        ("truncated or malformed",),
    ),
    "a file cut in half": (
        file_bytes(lambda data: data[: len(data) // 2]),
        AdapterFormatError,
        ("truncated or malformed",),
    ),
    "a file without its last byte": (
        file_bytes(lambda data: data[:-1]),
        AdapterFormatError,
        ("truncated or malformed",),
    ),
    "bytes behind the tensors": (
        file_bytes(lambda data: data + b"\0\0\0\0"),
        AdapterFormatError,
        ("truncated or malformed",),
    ),
    "a header of 2**62 bytes": (
        file_bytes(lambda data: struct.pack("<Q", 1 << 62) + data[8:]),
        AdapterFormatError,
        (f"header of {1 << 62} bytes",),
    ),
    "a header over the limit": (
        header("{" + ENTRY + "}" + " " * (9 << 20)),
        AdapterFormatError,
        ("the limit is 8388608",),
    ),
    "a header that is not JSON": (header("not json"), AdapterFormatError, ("no JSON header",)),
    "a header that is not UTF-8": (header(b'{"\xff\xfe": 1}'), AdapterFormatError, ("no JSON header",)),
    "a header that is a number": (header("3"), AdapterFormatError, ("header",)),
    "a header that is a list": (header("[1, 2]"), AdapterFormatError, ("header",)),
    "a header that is a list of pairs": (header('[[["a"], 2], [["b"], 3]]'), AdapterFormatError, ("header",)),
    "a header that is text": (header('"ab"'), AdapterFormatError, ("header",)),
    "a deep header": (header("[" * 100_000), AdapterFormatError, ("no JSON header",)),
    "a header with huge numbers": (
        header('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', b"1234"),
        AdapterFormatError,
        ("no JSON header",),
    ),
    "a header of strange entries": (header('{"a": 1, "b": [], "c": null}'), AdapterFormatError, ("malformed",)),
    "a header with a tensor twice": (
        header("{" + ENTRY + "," + ENTRY + "}", b"1234"),
        AdapterFormatError,
        ("names 'a' twice",),
    ),
    "a header with a field twice": (
        header('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        AdapterFormatError,
        ("malformed",),
    ),
    "tensors that overlap": (
        header("{" + ENTRY + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        AdapterFormatError,
        ("malformed",),
    ),
    "a header of too many tensors": (
        header(
            "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(50_001)) + "}"
        ),
        AdapterFormatError,
        ("over 50000 tensors",),
    ),
    "an unknown dtype": (
        header('{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        AdapterFormatError,
        ("malformed",),
    ),
    "no tensors": (header("{}"), AdapterFormatError, ("holds no LoRA tensors",)),
    "NaN in A": (spoil(A, torch.nan), AdapterFormatError, (A, "not finite")),
    "infinity in B": (spoil(B, -torch.inf), AdapterFormatError, (B, "not finite")),
    "more than float32 holds": (
        tensors(lambda content: {**content, B: torch.full_like(content[B], 1e39, dtype=torch.float64)}),
        AdapterFormatError,
        (B, "torch.float64", "finite floats in torch.float32"),
    ),
    "integers": (put(A, lambda a: a.to(torch.int8)), AdapterFormatError, (A, "torch.int8")),
    "booleans": (put(A, lambda a: a.bool()), AdapterFormatError, (A, "torch.bool")),
    "a scalar": (put(A, lambda a: torch.tensor(1.0)), AdapterMismatchError, ("q_proj has lora_A []",)),
    "A of three dimensions": (put(A, lambda a: a[None]), AdapterMismatchError, ("lora_A [1, 8, 64]",)),
    "A without B": (drop(B), AdapterFormatError, ("layers.0.self_attn.q_proj has lora_A alone",)),
    "B without A": (drop(A), AdapterFormatError, ("layers.0.self_attn.q_proj has lora_B alone",)),
    "A and B of two ranks": (
        put(B, lambda b: b[:, :5]),
        AdapterFormatError,
        ("rank 8 in lora_A and 5 in lora_B",),
    ),
    "a rank other than the config's": (
        config(r=4),
        AdapterFormatError,
        ("layers.0.self_attn.q_proj has rank 8", "adapter_config.json says 4"),
    ),
    "a rank other than rank_pattern's": (
        config(rank_pattern={"layers.1.self_attn.v_proj": 3}),
        AdapterFormatError,
        ("layers.1.self_attn.v_proj has rank 8", "says 3"),
    ),
    "rank 0 in the config": (config(r=0), AdapterFormatError, ("r=0", "at least 1")),
    "rank 0 in the file": (
        both(
            put(A, lambda a: a[:0]), put(B, lambda b: b[:, :0]), config(rank_pattern={"layers.0.self_attn.q_proj": 0})
        ),
        AdapterFormatError,
        ("rank 0",),
    ),
    "a module that a layer has not": (
        tensors(lambda content: {name.replace("v_proj", "w_proj"): t for name, t in content.items()}),
        AdapterMismatchError,
        ("2 modules are not in the base model", "layers.0.self_attn.w_proj"),
    ),
    "a layer that the model has not": (
        tensors(lambda content: {name.replace("layers.1", "layers.2"): t for name, t in content.items()}),
        AdapterMismatchError,
        ("not in the base model", "layers.2.self_attn.q_proj"),
    ),
    "a target without tensors": (
        config(target_modules=["q_proj", "v_proj", "o_proj"]),
        AdapterFormatError,
        ("target_modules names 'o_proj', but no tensor belongs to it",),
    ),
    "a parameter without tensors": (
        config(target_parameters=["mlp.up_proj.weight"]),
        AdapterFormatError,
        ("target_parameters names 'mlp.up_proj.weight', but no tensor belongs to it in 2 modules",),
    ),
    "a head without tensors": (
        config(target_modules=["q_proj", "v_proj", "lm_head"]),
        AdapterFormatError,
        ("target_modules names 'lm_head', but no tensor belongs to it",),
    ),
    "a tensor that is no factor": (
        put(f"{Q}.lora_C.weight", lambda t: t),
        AdapterUnsupportedError,
        ("no lora_A/lora_B", f"{Q}.lora_C.weight"),
    ),
    "another method": (config(peft_type="LOHA"), AdapterUnsupportedError, ("peft_type 'LOHA'", "only 'LORA'")),
    "a bias that the base has not": (
        both(put(f"{Q}.base_layer.bias", lambda _: torch.zeros(64)), config(bias="lora_only")),
        AdapterMismatchError,
        ("layers.0.self_attn.q_proj has a bias, the base model's has none",),
    ),
    "a bias of another length": (
        both(put(f"{Q}.bias", lambda _: torch.zeros(63)), config(bias="all")),
        AdapterMismatchError,
        ("q_proj has bias [63], the base model needs [64]",),
    ),
    "a bias twice": (
        both(
            put(f"{Q}.bias", lambda _: torch.zeros(64)),
            put(f"{Q}.base_layer.bias", lambda _: torch.zeros(64)),
            config(bias="all"),
        ),
        AdapterFormatError,
        ("names bias of model.layers.0.self_attn.q_proj a second time",),
    ),
    "a bias of a norm": (
        both(put("base_model.model.model.norm.bias", lambda _: torch.zeros(64)), config(bias="all")),
        AdapterMismatchError,
        ("1 modules are not in the base model", "model.norm"),
    ),
    "a bias that the config does not speak of": (
        put(f"{Q}.base_layer.bias", lambda _: torch.zeros(64)),
        AdapterUnsupportedError,
        ("1 tensors are no lora_A/lora_B", f"{Q}.base_layer.bias"),
    ),
    "biases of nobody": (config(bias="some"), AdapterFormatError, ("bias='some' is none of none, all, lora_only",)),
    "a magnitude that the config does not speak of": (
        put(f"{Q}.lora_magnitude_vector", lambda _: torch.ones(64)),
        AdapterUnsupportedError,
        ("1 tensors are no lora_A/lora_B", f"{Q}.lora_magnitude_vector"),
    ),
    "DoRA without magnitudes": (
        config(use_dora=True),
        AdapterFormatError,
        ("q_proj has no lora_magnitude_vector, and adapter_config.json says that it was trained",),
    ),
    "lora_bias without biases": (config(lora_bias=True), AdapterFormatError, ("q_proj has no lora_B.bias",)),
    "DoRA with lora_bias": (config(use_dora=True, lora_bias=True), AdapterFormatError, ("use_dora and lora_bias",)),
    "a magnitude alone": (
        both(drop(A), drop(B), put(f"{Q}.lora_magnitude_vector", lambda _: torch.ones(64)), config(use_dora=True)),
        AdapterFormatError,
        ("q_proj has lora_magnitude_vector alone",),
    ),
    "PiSSA with iterations": (
        config(init_lora_weights="pissa_niter_16"),
        AdapterUnsupportedError,
        ("'pissa_niter_16' changes the base model's weights", "path_initial_model_for_weight_conversion"),
    ),
    "CorDA": (config(init_lora_weights="corda"), AdapterUnsupportedError, ("'corda' changes the base",)),
    "LoftQ": (config(init_lora_weights="loftq"), AdapterUnsupportedError, ("'loftq' changes the base",)),
    "an invocation that is text": (
        config(alora_invocation_tokens="<|go|>"),
        AdapterFormatError,
        ("not a PEFT config", "$.alora_invocation_tokens"),
    ),
    "an invocation of no tokens that there are": (
        config(alora_invocation_tokens=[5, -6]),
        AdapterFormatError,
        ("alora_invocation_tokens has 2 tokens, the least -6", "up to 256 token ids"),
    ),
    "an invocation of a book": (
        config(alora_invocation_tokens=[5] * 257),
        AdapterFormatError,
        ("alora_invocation_tokens has 257 tokens", "up to 256"),
    ),
    "an invocation that PEFT never looks for": (
        config(alora_invocation_tokens=[5, 6], task_type=None),
        AdapterUnsupportedError,
        ("alora_invocation_tokens with task_type=None", "save it with task_type='CAUSAL_LM'"),
    ),
    "a config only of a module to save": (
        config(modules_to_save=["lm_head"]),
        AdapterFormatError,
        ("modules_to_save names lm_head, but no tensor belongs to it",),
    ),
    "a config only of trained tokens": (
        config(trainable_token_indices=[3]),
        AdapterFormatError,
        ("trainable_token_indices names model.embed_tokens, but no tensor belongs to it",),
    ),
    "trained tokens that the config does not name": (
        put(TOKENS, lambda _: torch.zeros(1, 64)),
        AdapterFormatError,
        (TOKENS, "trainable_token_indices names no token of model.embed_tokens"),
    ),
    "fewer trained tokens than the config names": (
        both(put(TOKENS, lambda _: torch.zeros(1, 64)), config(trainable_token_indices=[3, 4])),
        AdapterMismatchError,
        (TOKENS, "the shape [1, 64]", "say [2, 64]"),
    ),
    "a trained token twice": (
        both(put(TOKENS, lambda _: torch.zeros(2, 64)), config(trainable_token_indices=[3, 3])),
        AdapterFormatError,
        ("names a token twice",),
    ),
    "a trained token that there is not": (
        both(put(TOKENS, lambda _: torch.zeros(2, 64)), config(trainable_token_indices=[3, 96])),
        AdapterMismatchError,
        ("names [96]", "vocabulary has 96 tokens"),
    ),
    "NaN in a trained token": (
        both(put(TOKENS, lambda _: torch.full((1, 64), torch.nan)), config(trainable_token_indices=[3])),
        AdapterFormatError,
        (TOKENS, "not finite"),
    ),
    "infinity in a head": (
        both(put(HEAD, lambda _: torch.full((96, 64), torch.inf)), config(modules_to_save=["lm_head"])),
        AdapterFormatError,
        (HEAD, "not finite"),
    ),
    "a head of integers": (
        both(put(HEAD, lambda _: torch.zeros((96, 64), dtype=torch.int8)), config(modules_to_save=["lm_head"])),
        AdapterFormatError,
        (HEAD, "torch.int8"),
    ),
    "a head of another width": (
        both(put(HEAD, lambda _: torch.zeros(96, 48)), config(modules_to_save=["lm_head"])),
        AdapterMismatchError,
        (HEAD, "[96, 48]", "[96, 64]"),
    ),
    "a head of another vocabulary": (
        both(put(HEAD, lambda _: torch.zeros(99, 64)), config(modules_to_save=["lm_head"])),
        AdapterUnsupportedError,
        ("resized to {'lm_head': 99}, the base model has 96 tokens", "; save both with modules_to_save"),
    ),
    "a norm of another width": (
        both(put(NORM, lambda _: torch.zeros(48)), config(modules_to_save=["model.norm"])),
        AdapterMismatchError,
        (NORM, "[48]", "[64]"),
    ),
    "a head twice": (
        both(
            put(HEAD, lambda _: torch.zeros(96, 64)),
            put("lm_head.weight", lambda _: torch.zeros(96, 64)),
            config(modules_to_save=["lm_head"]),
        ),
        AdapterFormatError,
        ("the weight of lm_head a second time",),
    ),
    "factors of a head of another vocabulary": (
        both(
            put("base_model.model.lm_head.lora_A.weight", lambda _: torch.zeros(8, 64)),
            put("base_model.model.lm_head.lora_B.weight", lambda _: torch.zeros(99, 8)),
        ),
        AdapterMismatchError,
        ("lm_head has lora_A [8, 64] and lora_B [99, 8]", "[96, r]"),
    ),
    "factors of an embedding as a linear module has them": (
        both(
            put("base_model.model.model.embed_tokens.lora_A.weight", lambda _: torch.zeros(8, 96)),
            put("base_model.model.model.embed_tokens.lora_B.weight", lambda _: torch.zeros(64, 8)),
        ),
        AdapterUnsupportedError,
        ("model.embed_tokens.lora_A.weight", "no lora_A/lora_B of a linear module"),
    ),
    "factors and a whole weight": (
        both(
            put("base_model.model.lm_head.lora_A.weight", lambda _: torch.zeros(8, 64)),
            put("base_model.model.lm_head.lora_B.weight", lambda _: torch.zeros(96, 8)),
            put(HEAD, lambda _: torch.zeros(96, 64)),
            config(modules_to_save=["lm_head"]),
        ),
        AdapterUnsupportedError,
        ("lm_head has low-rank factors and trained tokens or a whole weight", "retrain with one of them"),
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_adapter_is_refused_and_the_others_are_served(
    broken: str, copied: Path, refuse: Callable[..., AdapterError]
) -> None:
    damage, kind, said = BROKEN[broken]
    damage(copied)
    refuse(copied, kind, *said)


def test_every_byte_cut_of_a_header_and_random_damage_are_refused_or_harmless(
    base: Path, copied: Path, llm: LLM
) -> None:
    file = copied / "adapter_model.safetensors"
    whole = file.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    before = answers(llm)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for number in range(300):
        at = int(torch.randint(0, length, (1,), generator=generator))
        byte = int(torch.randint(0, 256, (1,), generator=generator))
        file.write_bytes(whole[:at] if number % 2 else whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            llm.engine.add_lora(LoRARequest("bad", 7, str(copied)))
        except AdapterError:
            refused += 1
        else:
            llm.engine.remove_lora("bad")
    assert refused > 250
    assert answers(llm) == before


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        (
            {"modules_to_save": ["lm_head", "up_proj"]},
            AdapterUnsupportedError,
            "modules_to_save trained 2 modules whole that are no embedding, head or norm",
        ),
        (
            {"alora_invocation_tokens": [5, 6], "modules_to_save": ["lm_head"]},
            AdapterUnsupportedError,
            "alora_invocation_tokens with trained ['lm_head'], which in PEFT act on what is before the invocation",
        ),
        ({"layer_replication": [[0, 2], [1, 2]]}, AdapterUnsupportedError, "layer_replication="),
        ({"init_lora_weights": "pissa"}, AdapterUnsupportedError, "'pissa' changes the base model's weights"),
        ({"init_lora_weights": "olora"}, AdapterUnsupportedError, "'olora' changes the base model's weights"),
        ({"r": 17}, AdapterRankError, "exceeds max_lora_rank=16; start with --max-lora-rank 17"),
        ({"r": 4, "rank_pattern": {"v_proj": 30}}, AdapterRankError, "rank 30 of model.layers.0.self_attn.v_proj"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_peft_saves_of_features_not_served_is_refused(
    config: dict[str, Any],
    kind: type[AdapterError],
    said: str,
    base: Path,
    tmp_path: Path,
    refuse: Callable[..., AdapterError],
) -> None:
    refuse(make_adapter(base, tmp_path, **config), kind, said)


def test_an_adapter_of_another_base_is_refused_with_both_shapes(
    model_of: ModelOf, tmp_path: Path, refuse: Callable[..., AdapterError]
) -> None:
    other = model_of("llama tied")
    refuse(
        make_adapter(other, tmp_path), AdapterMismatchError, "lora_A [8, 48]", "needs [r, 64] and [64, r]", str(other)
    )


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "no such repository", "../..", "org/no-such-adapter", "\0", "x" * 5000, "~nobody/x"]
)
def test_a_path_that_leads_nowhere_is_not_found(path: str, refuse: Callable[..., AdapterError]) -> None:
    refuse(path, AdapterNotFoundError, "no adapter found at")


def test_an_empty_folder_holds_no_adapter(tmp_path: Path, refuse: Callable[..., AdapterError]) -> None:
    refuse(tmp_path, AdapterNotFoundError, "holds no adapter_config.json")


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern", "exclude_modules"])
@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*q_proj",
        "(a|a|.)*Z",
        ".*.*.*.*.*.*.*.*.*.*.*.*Z",
        "[a-z0-9._]*[a-z0-9._]*[a-z0-9._]*[a-z0-9._]*[a-z0-9._]*Z",
        ".+?.+?.+?.+?.+?.+?.+?Z",
        ".?" * 60 + "Z",
        ".{0,99}" * 20 + "Z",
        "(?:x{1,50}){1,50}",
        "q_proj|" * 60,
        "q_proj|.*.*.*.*.*Z",
        "[|]?.?.?.?.?Z",
        r"\|?.?.?.?.?Z",
        "(.*a|.*b|.*c|.*d|.*e)",
    ],
)
def test_a_pattern_that_could_run_for_minutes_is_refused_at_once(
    field: str, pattern: str, copied: Path, refuse: Callable[..., AdapterError]
) -> None:
    reconfigure(copied, **{field: pattern if field == "exclude_modules" else {pattern: 8}})
    started = time.process_time()
    refuse(copied, AdapterUnsupportedError, "pattern", "name the modules")
    assert time.process_time() - started < 0.25


def test_very_many_regular_expressions_are_refused_at_once(copied: Path, refuse: Callable[..., AdapterError]) -> None:
    reconfigure(copied, alpha_pattern={f".*.*.*.*{i}": 8 for i in range(5000)})
    started = time.process_time()
    refuse(copied, AdapterUnsupportedError, "5000 patterns are regular expressions, the limit is 64")
    assert time.process_time() - started < 0.5


def test_very_many_alternatives_are_as_many_regular_expressions(
    copied: Path, refuse: Callable[..., AdapterError]
) -> None:
    reconfigure(copied, rank_pattern={"|".join([".*.*.*.*Z"] * 20) + str(i): 8 for i in range(4)})
    refuse(copied, AdapterUnsupportedError, "80 patterns are regular expressions, the limit is 64")


@pytest.mark.parametrize("pattern", ["[a", "a)b", "a{99999999999999999999}", "(?i)q_proj", "*", "(?P<x>a)(?P<x>b)"])
def test_a_pattern_that_is_no_regular_expression_is_refused(
    pattern: str, copied: Path, refuse: Callable[..., AdapterError]
) -> None:
    reconfigure(copied, alpha_pattern={pattern: 8})
    refuse(copied, AdapterFormatError, f"pattern {pattern!r} is not a regular expression")


def test_a_pattern_a_module_loads_quickly(base: Path, good: Path, copied: Path, llm: LLM) -> None:
    names = {f"model.layers.{layer}.self_attn.{part}_proj": 16 for layer in range(600) for part in "qkvo"}
    reconfigure(copied, alpha_pattern=names)
    started = time.process_time()
    version = llm.engine.add_lora(LoRARequest("patterned", 8, str(copied)))
    assert time.process_time() - started < 2
    assert version.pages == llm.engine.add_lora(LoRARequest("good", 1, str(good))).pages
    llm.engine.remove_lora("patterned")


def test_eight_bit_floats_are_read(copied: Path, llm: LLM) -> None:
    rewrite(copied, lambda content: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in content.items()})
    (output,) = llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("eight bit", 9, str(copied)), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5
    llm.engine.remove_lora("eight bit")


def test_the_name_of_the_base_model_is_no_adapters_name(base: Path, good: Path, llm: LLM) -> None:
    with pytest.raises(AdapterConflictError, match="is the name of the base model; choose another"):
        llm.generate(PROMPT, GREEDY, lora_request=LoRARequest(str(base), 5, str(good)), use_tqdm=False)


def test_one_id_stands_for_one_name(good: Path, llm: LLM) -> None:
    with pytest.raises(AdapterConflictError, match="lora_int_id=1 already stands for 'good'"):
        llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("better", 1, str(good)), use_tqdm=False)


def test_one_name_has_one_id(good: Path, llm: LLM) -> None:
    with pytest.raises(AdapterConflictError, match="was loaded with lora_int_id=1 and is now asked for with 2"):
        llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("good", 2, str(good)), use_tqdm=False)


def test_another_path_under_a_known_name_is_refused_with_the_way_out(copied: Path, good: Path, llm: LLM) -> None:
    with pytest.raises(AdapterConflictError, match="set load_inplace=True") as caught:
        llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("good", 1, str(copied)), use_tqdm=False)
    assert str(good) in str(caught.value)
    assert str(copied) in str(caught.value)


def test_a_name_that_was_never_loaded_is_unknown_with_the_nearest(llm: LLM) -> None:
    with pytest.raises(UnknownModelError, match="'god' does not exist; did you mean 'good'"):
        llm.generate(PROMPT, GREEDY, lora_request="god", use_tqdm=False)


def test_without_enable_lora_an_adapter_is_refused_with_the_flag(base: Path, good: Path) -> None:
    llm = LLM(str(base), dtype="float32")
    for lora in (LoRARequest("good", 1, str(good)), "good", {"good": 0.5}):
        with pytest.raises(AdapterUnsupportedError, match="start with enable_lora=True"):
            llm.generate(PROMPT, GREEDY, lora_request=lora, use_tqdm=False)


def test_a_failed_reload_leaves_the_old_version_serving(base: Path, copied: Path) -> None:
    llm = LLM(str(base), dtype="float32", enable_lora=True, max_lora_rank=16)
    lora = LoRARequest("good", 1, str(copied))
    llm.engine.add_lora(lora)
    before = answers(llm)
    whole = load_file(copied / "adapter_model.safetensors")
    spoil(A, torch.nan)(copied)
    again = LoRARequest("good", 1, str(copied), load_inplace=True)
    with pytest.raises(AdapterFormatError, match="not finite"):
        llm.engine.add_lora(again)
    assert answers(llm) == before
    rewrite(copied, lambda _: {name: 2 * tensor for name, tensor in whole.items()})
    llm.engine.add_lora(again)
    assert answers(llm)[0] == before[0]
    assert answers(llm)[1] != before[1]


def test_only_the_modules_that_the_operator_named_take_adapters(base: Path, good: Path) -> None:
    llm = LLM(str(base), dtype="float32", enable_lora=True, lora_target_modules=("q_proj",))
    with pytest.raises(AdapterMismatchError, match=r"2 modules .*--lora-target-modules.*v_proj"):
        llm.engine.add_lora(LoRARequest("good", 1, str(good)))


def test_an_adapter_larger_than_the_room_is_refused(base: Path, tmp_path: Path) -> None:
    pages = 8 * 2 * 4 * (3 * 64 + 128 + 64 + 64 + 2 * 64 + 160 + 80 + 64)  # of 8 ranks of every kind
    llm = LLM(str(base), dtype="float32", enable_lora=True, max_loras=1, max_lora_rank=16, lora_memory=2 * pages)
    llm.engine.add_lora(LoRARequest("fits", 1, str(make_adapter(base, tmp_path / "fits", r=16))))
    for name, number in (("one", 2), ("two", 3)):
        folder = make_adapter(base, tmp_path / name, r=16, seed=number)
        llm.engine.add_lora(LoRARequest(name, number, str(folder)))
    for names in ({"one": 0.5, "two": 0.5}, {"one": 1.0, "two": 1.0, "fits": 1.0}):
        with pytest.raises(AdapterMemoryError, match="raise --lora-memory"):
            llm.generate(PROMPT, GREEDY, lora_request=names, use_tqdm=False)
    assert answers_of(llm, "one") != answers_of(llm, "two")


def answers_of(llm: LLM, name: str) -> list[int]:
    (output,) = llm.generate(PROMPT, GREEDY, lora_request=name, use_tqdm=False)
    return output.outputs[0].token_ids


def test_a_mix_that_waits_is_served_though_others_fill_a_small_room(base: Path, tmp_path: Path) -> None:
    engine = LLMEngine(
        EngineArgs(
            model=str(base), dtype="float32", enable_lora=True, max_loras=2, max_lora_rank=8, lora_memory=1 << 17
        )
    )
    weights = {}
    for number in range(4):
        name = f"a{number}"
        folder = make_adapter(base, tmp_path / name, seed=number, target_modules=ALL_LINEARS)
        engine.add_lora(LoRARequest(name, number + 1, str(folder)))
        weights[name] = 1.0
    names = list(weights)
    for number in range(12):
        mix = {names[number % 4]: 0.5, names[(number + 1) % 4]: 0.5}
        engine.add_request(str(number), PROMPT, GREEDY, mix)
    done, deadline = set(), time.monotonic() + 120
    while engine.has_unfinished_requests():
        assert time.monotonic() < deadline, f"only {done} were served"
        done |= {output.request_id for output in engine.step() if output.finished}
    assert len(done) == 12


# ---- several at a time ----


def test_new_adapters_of_one_call_answer_as_those_loaded_one_by_one(base: Path, tmp_path: Path) -> None:
    folders = [make_adapter(base, tmp_path / str(seed), seed=seed) for seed in range(6)]
    requests = [LoRARequest(folder.name, number, str(folder)) for number, folder in enumerate(folders, 1)]
    options = {"dtype": "float32", "enable_lora": True, "max_loras": 8, "max_lora_rank": 8}
    one_by_one, together = LLM(str(base), **options), LLM(str(base), **options)
    for request in requests:
        one_by_one.engine.add_lora(request)
    names: list[Any] = [request.lora_name for request in requests]
    mixes: list[Any] = [*requests[:3], None, *requests[3:], requests[0], {names[0]: 0.5, names[1]: 0.5}]
    known: list[Any] = [*names[:3], None, *names[3:], names[0], {names[0]: 0.5, names[1]: 0.5}]
    expected, got = (
        [
            output.outputs[0].token_ids
            for output in llm.generate([PROMPT] * len(loras), GREEDY, lora_request=loras, use_tqdm=False)
        ]
        for llm, loras in ((one_by_one, known), (together, mixes))
    )
    assert got == expected
    assert len({tuple(tokens) for tokens in got}) > 6
    assert [version.digest for version in together.engine.list_loras()] == [
        version.digest for version in one_by_one.engine.list_loras()
    ]


def test_a_broken_one_among_new_adapters_is_named_and_the_call_leaves_nothing(base: Path, tmp_path: Path) -> None:
    folders = [make_adapter(base, tmp_path / str(seed), seed=seed) for seed in range(4)]
    spoil(A, torch.nan)(folders[2])
    requests = [LoRARequest(folder.name, number, str(folder)) for number, folder in enumerate(folders, 1)]
    llm = LLM(str(base), dtype="float32", enable_lora=True, max_loras=8, max_lora_rank=8)
    with pytest.raises(AdapterFormatError, match=r"adapter '2': .*not finite"):
        llm.generate([PROMPT] * 4, GREEDY, lora_request=requests, use_tqdm=False)
    assert [version.name for version in llm.engine.list_loras()] == ["0", "1"]
    assert not llm.engine.has_unfinished_requests()
    served = llm.generate([PROMPT] * 2, GREEDY, lora_request=[requests[0], requests[3]], use_tqdm=False)
    assert served[0].outputs[0].token_ids != served[1].outputs[0].token_ids


# ---- eviction from host memory ----


@pytest.fixture
def two(base: Path, tmp_path: Path) -> tuple[LLMEngine, Path, Path]:
    """An engine with room for one adapter on the device and in the host: loading 'second' evicts 'first'."""
    engine = LLMEngine(
        EngineArgs(model=str(base), dtype="float32", enable_lora=True, max_loras=1, max_cpu_loras=1, max_lora_rank=8)
    )
    folders = [make_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    for number, folder in enumerate(folders, 1):
        engine.add_lora(LoRARequest(folder.name, number, str(folder)))
    return engine, folders[0], folders[1]


def drain(engine: LLMEngine, loras: dict[str, Any]) -> tuple[dict[str, list[int]], list[AdapterError]]:
    """Request id -> adapter; what each answered, and the errors that were raised on the way."""
    done: dict[str, list[int]] = {}
    errors: list[AdapterError] = []
    for request_id, lora in loras.items():
        engine.add_request(request_id, PROMPT, GREEDY, lora)
    while engine.has_unfinished_requests():
        try:
            done |= {out.request_id: out.outputs[0].token_ids for out in engine.step() if out.finished}
        except AdapterError as error:
            errors.append(error)
    return done, errors


def test_an_evicted_adapter_is_read_again_with_equal_output(two: tuple[LLMEngine, Path, Path]) -> None:
    engine, _, _ = two
    seen = [drain(engine, {"a": "first", "b": "second", "c": None})[0] for _ in range(3)]
    assert seen[0] == seen[1] == seen[2]
    assert len({tuple(tokens) for tokens in seen[0].values()}) == 3


def test_an_evicted_adapter_that_changed_fails_its_own_requests_only(two: tuple[LLMEngine, Path, Path]) -> None:
    engine, first, _ = two
    expected, _ = drain(engine, {"b": "second", "c": None})
    rewrite(first, lambda content: {name: 1.5 * tensor for name, tensor in content.items()})
    done, errors = drain(engine, {"a": "first", "a2": "first", "b": "second", "c": None})
    assert done == expected
    assert [type(error) for error in errors] == [AdapterChangedError] * 2
    for said in (str(first), "not", "when it was loaded", "load_inplace=True"):
        assert said in str(errors[0])
    engine.add_lora(LoRARequest("first", 1, str(first), load_inplace=True))
    done, errors = drain(engine, {"a": "first"})
    assert errors == []
    assert done["a"] not in expected.values()


def test_an_evicted_adapter_whose_folder_vanished_fails_its_own_requests_only(
    two: tuple[LLMEngine, Path, Path],
) -> None:
    engine, first, _ = two
    expected, _ = drain(engine, {"b": "second", "c": None})
    first.rename(first.with_name("elsewhere"))
    done, errors = drain(engine, {"a": "first", "b": "second", "c": None})
    assert done == expected
    assert [type(error) for error in errors] == [AdapterNotFoundError]
    assert str(first) in str(errors[0])
    first.with_name("elsewhere").rename(first)
    assert drain(engine, {"a": "first"})[1] == []


def test_whatever_goes_wrong_while_reading_again_is_the_adapters_error(
    two: tuple[LLMEngine, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, _ = two
    with monkeypatch.context() as patch:
        patch.setattr("aiolora.lora.loader.fill", lambda *_, **__: 1 / 0)
        done, errors = drain(engine, {"a": "first", "c": None})
    assert list(done) == ["c"]
    assert [type(error) for error in errors] == [AdapterFormatError]
    assert "could not be read again: ZeroDivisionError" in str(errors[0])
    assert drain(engine, {"a": "first"})[1] == []


def test_a_call_that_failed_leaves_no_error_to_the_next(base: Path, tmp_path: Path) -> None:
    llm = LLM(str(base), dtype="float32", enable_lora=True, max_loras=1, max_cpu_loras=1)
    folders = [make_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    for number, folder in enumerate(folders, 1):
        llm.engine.add_lora(LoRARequest(folder.name, number, str(folder)))
    answers_of(llm, "second")
    shutil.rmtree(folders[0])
    with pytest.raises(AdapterNotFoundError):
        llm.generate([PROMPT] * 3, GREEDY, lora_request="first", use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()
    assert len(answers_of(llm, "second")) == 5


def test_a_config_digest_says_what_the_tensors_mean(copied: Path, good: Path, llm: LLM) -> None:
    known = next(version for version in llm.engine.list_loras() if version.name == "good")
    reconfigure(copied, lora_alpha=8)
    other = llm.engine.add_lora(LoRARequest("other", 11, str(copied)))
    llm.engine.remove_lora("other")
    assert other.digest != known.digest
    config_text = json.loads((good / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(dict(reversed(config_text.items())), indent=3))
    same = llm.engine.add_lora(LoRARequest("other", 11, str(copied)))
    llm.engine.remove_lora("other")
    assert same.digest == known.digest


def test_a_module_of_scale_zero_leaves_its_neighbours_alone(model_of: ModelOf, tmp_path: Path) -> None:
    folder = make_adapter(model_of("llama"), tmp_path / "zero", alpha_pattern={"layers.0.self_attn.q_proj": 0})
    llm = LLM(str(model_of("llama")), dtype="float32", enable_lora=True)
    llm.engine.add_lora(LoRARequest("zero", 1, str(folder)))
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    base, adapted = llm.generate([[5, 6, 7]] * 2, params, lora_request=[None, "zero"], use_tqdm=False)
    assert base.outputs[0].logprobs != adapted.outputs[0].logprobs


@pytest.mark.parametrize("alpha", [1e300, -1e9])
def test_a_scale_that_no_training_makes_is_refused(model_of: ModelOf, tmp_path: Path, alpha: float) -> None:
    folder = make_adapter(model_of("llama"), tmp_path / "huge", alpha_pattern={"q_proj": alpha})
    llm = LLM(str(model_of("llama")), dtype="float32", enable_lora=True)
    with pytest.raises(AdapterFormatError, match="the limit is 10000"):
        llm.engine.add_lora(LoRARequest("huge", 1, str(folder)))
