"""Hub repository ids as model, adapter path and --lora-modules: the real huggingface_hub against a small hub."""

from pathlib import Path

import httpx
import pytest

from aiolora import LLM, LoRARequest, SamplingParams
from aiolora.errors import AdapterNotFoundError, ModelNotFoundError
from examples.local_hub import LocalHub
from tests import HUB
from tests.conftest import ModelOf
from tests.tiny import make_adapter

PARAMS = SamplingParams(max_tokens=3, temperature=0, logprobs=0)


@pytest.fixture(scope="module")
def folders(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model, and an adapter among files that nobody is to fetch."""
    adapter = make_adapter(model_of("llama"), tmp_path_factory.mktemp("adapters") / "adapter")
    (adapter / "training_args.bin").write_bytes(b"never fetched")
    (adapter / "tokenizer.json").write_text("{}")
    return model_of("llama"), adapter


@pytest.fixture(scope="module")
def hub(folders: tuple[Path, Path]) -> LocalHub:
    HUB.repositories |= {"org/base": folders[0], "org/adapter": folders[1]}
    return HUB


@pytest.fixture(scope="module")
def llm(hub: LocalHub) -> LLM:
    return LLM("org/base", enable_lora=True)


def test_model_and_adapter_may_be_repositories(llm: LLM, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    remote = llm.generate([[5, 6, 7]], PARAMS, lora_request=LoRARequest("a", 1, "org/adapter"), use_tqdm=False)
    local = LLM(str(base), enable_lora=True).generate(
        [[5, 6, 7]], PARAMS, lora_request=LoRARequest("a", 1, str(adapter)), use_tqdm=False
    )
    assert remote[0].outputs[0].logprobs == local[0].outputs[0].logprobs
    assert remote[0].adapter == local[0].adapter, "the digest says what the bytes are, wherever they came from"


def test_only_an_adapters_two_files_and_its_tokenizer_are_fetched(llm: LLM, hub: LocalHub) -> None:
    hub.repositories["org/fresh"] = hub.repositories["org/adapter"]
    hub.requests.clear()
    llm.generate([[5]], PARAMS, lora_request=LoRARequest("fresh", 2, "org/fresh"), use_tqdm=False)
    fetched = {path.rsplit("/", 1)[1] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}


def test_repositories_that_are_not_there_are_named_and_the_engine_goes_on(llm: LLM) -> None:
    with pytest.raises(ModelNotFoundError, match="org/nothing"):
        LLM("org/nothing")
    with pytest.raises(AdapterNotFoundError, match="org/nothing"):
        llm.generate([[5]], PARAMS, lora_request=LoRARequest("b", 3, "org/nothing"), use_tqdm=False)
    assert llm.generate([[5]], PARAMS, use_tqdm=False)[0].finished


@pytest.mark.parametrize("path", ["../secrets", "org/adapter/../../x", "/nowhere/at/all", "a b", "https://host/x"])
def test_a_path_that_is_neither_folder_nor_repository_is_never_asked_of_the_hub(
    llm: LLM, hub: LocalHub, path: str
) -> None:
    hub.requests.clear()
    with pytest.raises(AdapterNotFoundError):
        llm.generate([[5]], PARAMS, lora_request=LoRARequest("c", 4, path), use_tqdm=False)
    assert hub.requests == []


def test_the_small_hub_answers_404_like_the_real_one(hub: LocalHub) -> None:
    response = httpx.get(f"{hub.endpoint}/api/models/org/nothing/revision/main")
    assert (response.status_code, response.headers["X-Error-Code"]) == (404, "RepoNotFound")
