"""What torch finds on this machine."""

import os
import shutil
from importlib.util import find_spec

import torch
from msgspec import Struct

from aiolora.ops.build_native import library
from aiolora.ops.registration import has_kernels


class GPU(Struct, frozen=True):
    """One card."""

    name: str
    capability: tuple[int, int]
    nbytes: int


class Machine(Struct, frozen=True):
    """The facts, none of them judged."""

    torch: str
    cuda: str | None  # the version that torch was built with; None: a CPU build
    gpus: tuple[GPU, ...]
    triton: bool
    gpu_kernels: bool  # they would run here
    cores: int
    memory_nbytes: int
    bfloat16: bool  # the CPU has arithmetic for it
    compiler: str | None
    native: bool  # the compiled CPU kernels run


def look() -> Machine:
    """Find out. Compiles the CPU kernels where nobody has: some seconds."""
    gpus = []
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        gpus.append(GPU(card.name, (card.major, card.minor), card.total_memory))
    return Machine(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpus=tuple(gpus),
        triton=find_spec("triton") is not None,
        gpu_kernels=bool(gpus) and has_kernels(),
        cores=os.cpu_count() or 1,
        memory_nbytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bfloat16=torch.cpu._is_avx512_bf16_supported(),
        compiler=shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
        native=library() is not None,
    )
