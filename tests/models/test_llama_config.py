import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from aiolora.errors import ModelError
from aiolora.models.llama_config import LlamaConfig
from aiolora.models.loading import read_config

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGER = LLAMA3 | {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"hidden_size": 64, "num_attention_heads": 4},
        {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "dtype": "bfloat16"},
        {"rope_parameters": LONGER},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"},
        {"eos_token_id": [1, 2], "bos_token_id": None, "never heard of": 3},
    ],
    ids=lambda said: " ".join(said) or "nothing",
)
def test_a_llama_says_what_it_says_to_transformers(said: dict[str, Any]) -> None:
    ours, theirs = LlamaConfig(**said), transformers.LlamaConfig(**said)
    assert ours.to_dict() == theirs.to_dict()
    assert {one.name for one in fields(LlamaConfig)} == {one.name for one in fields(transformers.LlamaConfig)}


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_size": "64"}, {"hidden_size": 65}, {"head_dim": 10.5}, {"layer_types": ["none"]}, {"hidden_act": 3}],
)
def test_a_llama_that_transformers_refuses_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **wrong}))
    with pytest.raises(Exception, match=r"\w"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert isinstance(read_config(tmp_path), LlamaConfig)


def taken(kind: type[transformers.PreTrainedConfig], name: str, value: object) -> object:
    """What `kind` makes of a config.json that says so; None: it refuses it."""
    try:
        return kind(**{name: value}).to_dict()
    except (StrictDataclassError, ZeroDivisionError):
        return None


@pytest.mark.parametrize("name", sorted(transformers.LlamaConfig.__annotations__))
def test_each_field_takes_what_it_takes_in_transformers(name: str) -> None:
    for value in (0, 1, 2, 0.0, 0.5, 2.0, True, None, "x", [1], {}):
        assert taken(LlamaConfig, name, value) == taken(transformers.LlamaConfig, name, value), value


def test_transformers_finds_the_model_of_a_llama() -> None:
    small = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    assert type(AutoModelForCausalLM.from_config(small)) is transformers.LlamaForCausalLM
