"""Fixtures of the whole suite: tiny models and adapters, made once a session."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from aiolora.engine import plan
from tests import tiny

ModelOf = Callable[[str], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Pages and examples take longest, and beside this file: they begin first, lest a worker ends alone with them."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices only lose by threads, and other work may share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_model_cards() -> Iterator[None]:
    """PEFT writes one beside every adapter that it saves, which nobody here reads: a third of what saving costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "create_or_update_model_card", lambda model, folder: None)
        yield


@pytest.fixture(scope="module")
def few_graphs() -> Iterator[None]:
    """On a GPU an engine captures graphs of each kind, not of each size: it starts in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        if tiny.DEVICE == "cuda":
            patch.setattr(plan, "_GRAPH_SIZES", (1, 4, 12))
            patch.setattr(plan, "_PROMPT_SIZES", ((64, (16,)),))
        yield


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """Family of `tiny.FAMILIES` -> the folder of such a model. Read only."""

    @cache
    def make(family: str) -> Path:
        return tiny.make_model(tmp_path_factory.mktemp("models") / family.replace(" ", "-"), family)

    return make


@pytest.fixture(scope="session")
def hf_of(model_of: ModelOf) -> Callable[[str], nn.Module]:
    """Family -> the same model, in transformers."""

    @cache
    def load(family: str) -> nn.Module:
        return tiny.load_hf(model_of(family))

    return load


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama over the bytes of text."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "bytes", vocab_size=320, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def talking_model(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`byte_model` with a chat template."""
    folder = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(byte_model, folder)
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder
