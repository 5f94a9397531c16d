"""The embedded model's folder is what transformers expects of one."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from aiolora.errors import WeightsError
from aiolora.models.embedded import pull
from aiolora.models.gguf import read_gguf

REFERENCE = json.loads((Path(__file__).parent.parent / "data/reference.json").read_text())


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull()


def test_a_second_pull_makes_nothing(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pull() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_the_tensors_are_those_of_the_reference(folder: Path) -> None:
    """The file itself may order its header in another way; what it holds may not differ in one bit."""
    total = hashlib.sha256()
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = sorted(tensors.keys())
        for name in names:
            total.update(name.encode() + tensors.get_tensor(name).view(torch.uint8).numpy().tobytes())
    assert len(names) == 272
    assert total.hexdigest() == "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"


@pytest.mark.parametrize("prompt", REFERENCE["prompts"], ids=lambda prompt: prompt["name"])
def test_tokenizer_and_chat_template_give_the_reference_prompts(folder: Path, prompt: dict[str, object]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
    assert text == prompt["text"]
    assert tokenizer.encode(text) == prompt["input_ids"]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize(
    ("data", "culprit"), [(b"nope", "not a GGUF"), (b"GGUF\x02\x00\x00\x00" + bytes(16), "version 2")]
)
def test_what_is_no_gguf_of_version_3_is_refused(data: bytes, culprit: str) -> None:
    with pytest.raises(WeightsError, match=culprit):
        read_gguf(data)
