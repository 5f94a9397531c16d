"""Compiles csrc/ for this CPU, once a machine, and loads it: what native.py and the loader of adapters call."""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from aiolora.config import Environment

SOURCES = Path(__file__).with_name("csrc")
_MATH = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_COMMON = ("-std=c11", "-O3", *_MATH, "-shared", "-fPIC", "-pthread", "-lm")
_FLAGS = (  # the first that compiles; Apple's clang has no OpenMP, some compilers do not know -march=native
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    (),
)
_LOG = logging.getLogger(__name__)


class Library(NamedTuple):
    """The loaded functions: each takes one packed struct; what another result than 0 means stands in csrc/."""

    linear: "ctypes._NamedFuncPointer"
    attention: "ctypes._NamedFuncPointer"
    norm: "ctypes._NamedFuncPointer"
    gate_mul: "ctypes._NamedFuncPointer"
    rope_store: "ctypes._NamedFuncPointer"
    lay_out: "ctypes._NamedFuncPointer"


@functools.cache
def library() -> Library | None:
    """The compiled kernels, built at the first call; None where AIOLORA_NATIVE=0 or nothing here can compile them."""
    environment = Environment.read()
    if not environment.native:
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _LOG.warning("no C compiler (cc, gcc, clang) found: CPU decoding and loading of adapters stay 2-3 times slower")
        return None
    problem = ""
    for flags in _FLAGS:
        try:
            return _load(built(compiler, flags, environment.cache / "native"))
        except subprocess.CalledProcessError as error:
            problem = problem or error.stderr.strip()[-500:]
        except OSError as error:
            problem = str(error)
    _LOG.warning(
        "compiling %s with %s failed, CPU decoding and loading of adapters stay 2-3 times slower: %s",
        SOURCES,
        compiler,
        problem,
    )
    return None


def built(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """The library, compiled where the cache `folder` does not have it yet."""
    path = folder / _name(compiler, flags)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(file) for file in sorted(SOURCES.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: several processes may do this
        made = Path(scratch) / path.name
        subprocess.run(
            [compiler, *flags, *_COMMON, "-o", str(made), *files], capture_output=True, text=True, check=True
        )
        made.replace(path)
    return path


def _name(compiler: str, flags: tuple[str, ...]) -> str:
    """A file name that says everything the library depends on: sources, compiler, flags, the features of this CPU."""
    macros = subprocess.run(
        [compiler, *flags, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    parts = [" ".join([*_COMMON, *flags]).encode(), macros.encode()]
    for file in sorted(SOURCES.glob("*.[ch]")):
        parts += file.name.encode(), file.read_bytes()
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32] + ".so"


def _load(path: Path) -> Library:
    """Bind the functions; the short ones keep the GIL: asking for it back may wait longer than their 1-3 us."""
    free, held = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    loaded = Library(free.linear, free.attention, held.norm, held.gate_mul, held.rope_store, free.lay_out)
    for function in loaded:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    loaded.lay_out.argtypes = [ctypes.c_void_p]  # it writes to its struct
    return loaded
