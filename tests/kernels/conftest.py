"""The kernels run on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1; else they are not collected."""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
DEVICE = "cpu" if INTERPRETED else "cuda"
# bfloat16 products of the interpreter are wrong, without a word
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]

collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    assert isinstance(request.param, torch.dtype)
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
