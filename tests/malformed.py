"""Adapter folders with something wrong, generated: what to do to a good one, the status and the words that it gets.

The good one is `tests.tiny.make_adapter`'s: rank 8 on q_proj and v_proj of two layers, float32, hidden size 64.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import reconfigure, rewrite

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"

Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Malformed:
    """One way to be wrong."""

    name: str
    spoil: Spoil  # of a copy of a good folder
    said: tuple[str, ...]  # by the refusal: the culprit
    status: int = 422


def malformed() -> list[Malformed]:
    """All of them, no two alike."""
    groups = (cut(), headers(), entries(), files(), values(), dtypes(), shapes(), pairs(), configs(), ranks())
    return [one for group in groups for one in group]


def cut() -> Iterator[Malformed]:
    """The tensors' file ends too soon, or too late."""

    def end(of: Callable[[bytes, int], bytes]) -> Spoil:
        def spoil(folder: Path) -> None:
            data = (folder / TENSORS).read_bytes()
            (folder / TENSORS).write_bytes(of(data, 8 + struct.unpack("<Q", data[:8])[0]))

        return spoil

    for size in (0, 5, 8, 99):
        yield Malformed(f"cut to {size} bytes", end(lambda data, _, size=size: data[:size]), (TENSORS, "truncated"))
    for name, of in {
        "cut in the last byte of its header": lambda data, body: data[: body - 1],
        "cut behind its header": lambda data, body: data[:body],
        "cut in half": lambda data, body: data[: (body + len(data)) // 2],
        "without its last byte": lambda data, body: data[:-1],
        "with a byte too many": lambda data, body: data + b"\0",
        "twice": lambda data, body: data + data,
    }.items():
        yield Malformed(name, end(of), (TENSORS, "truncated"))
    yield Malformed(
        "grown to 20 GB of holes", lambda folder: os.truncate(folder / TENSORS, 20 << 30), (TENSORS, str(20 << 30))
    )


def headers() -> Iterator[Malformed]:
    """The header as a whole."""

    def header(data: bytes, length: int | None = None) -> Spoil:
        said = struct.pack("<Q", len(data) if length is None else length)
        return lambda folder: (folder / TENSORS).write_bytes(said + data)

    for length in (1 << 24, 1 << 62, (1 << 64) - 1):
        yield Malformed(f"a header of {length} bytes", header(b"{}", length), (f"header of {length} bytes",))
    yield Malformed("a header over the limit", header(b"{}" + b" " * (8 << 20)), ("limit is 8388608",))
    for name, data in {
        "empty": b"",
        "no JSON": b"not JSON",
        "no UTF-8": b'{"\xff": 1}',
        "nested without end": b"[" * 100_000,
        "of metadata nested without end": b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "of a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    }.items():
        yield Malformed(f"a header {name}", header(data), (TENSORS, "no JSON header"))
    for text in ("[]", "3", '"a"', "null"):
        yield Malformed(f"a header that is {text}", header(text.encode()), (TENSORS, "no JSON object"))
    yield Malformed("a header of no tensors", header(b"{}"), (TENSORS, "no LoRA tensors"))
    empty = ",".join(f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(50_001))
    yield Malformed("a header of 50,001 tensors", header(f"{{{empty}}}".encode()), ("over 50000 tensors",))


def entries() -> Iterator[Malformed]:
    """What the header says of one tensor of an otherwise whole file."""

    def entry(change: Callable[[dict[str, Any]], object]) -> Spoil:
        def spoil(folder: Path) -> None:
            data = (folder / TENSORS).read_bytes()
            end = 8 + struct.unpack("<Q", data[:8])[0]
            header = json.loads(data[8:end])
            changed = change(header[A])
            if changed is not None:
                header[A] = changed
            _put_header(folder, json.dumps(header), data[end:])

        return spoil

    def doubled(of: str, as_: str) -> Spoil:
        def spoil(folder: Path) -> None:
            data = (folder / TENSORS).read_bytes()
            end = 8 + struct.unpack("<Q", data[:8])[0]
            _put_header(folder, data[8:end].decode().replace(of, as_, 1), data[end:])

        return spoil

    yield Malformed("a tensor named twice", doubled(f'"{B}"', f'"{A}"'), (A, "twice"))
    yield Malformed("a field given twice", doubled(f'"{A}":{{', f'"{A}":{{"dtype":"F32",'), (A, "a field twice"))
    for field, wrong, said in (
        ("dtype", ("F3", "f32", "OBJECT", "", 7, None), "the dtype"),
        ("shape", ([-8, -64], [8.0, 64], [True, 512], "8x64", None, [1] * 17, [1 << 60, 1 << 60]), "no shape"),
        ("data_offsets", ([-8, 2040], [0], [0, 1, 2], [0.0, 2048], "0-2048", None), "no two data_offsets"),
        ("data_offsets", ([2048, 0], [0, 2047], [0, 1 << 40]), "bytes for torch.float32"),
    ):
        for value in wrong:
            change = entry(lambda fields, field=field, value=value: fields.update({field: value}))
            yield Malformed(f"{field} {value!r}", change, (A, said))
    for field in ("dtype", "shape", "data_offsets"):
        yield Malformed(f"no {field}", entry(lambda fields, field=field: fields.pop(field) and None), (A,))
    for shift, what in ((-4, "overlap"), (4, "leave a hole")):
        moved = entry(
            lambda fields, shift=shift: fields.update({"data_offsets": [at + shift for at in fields["data_offsets"]]})
        )
        yield Malformed(f"tensors that {what}", moved, (TENSORS, "malformed"))
    yield Malformed("a list for a tensor", entry(lambda fields: [fields]), (A, "no object"))


def files() -> Iterator[Malformed]:
    """Something else where a file should be."""
    yield Malformed("no tensors", lambda folder: (folder / TENSORS).unlink(), (f"holds no {TENSORS}",))
    for pickle in ("adapter_model.bin", "adapter_model.pt"):
        renamed = lambda folder, pickle=pickle: (folder / TENSORS).rename(folder / pickle)  # noqa: E731
        yield Malformed(f"only {pickle}", renamed, (pickle, "pickle", TENSORS))
    pickled = lambda folder: torch.save({A: torch.zeros(8, 64)}, folder / TENSORS)  # noqa: E731
    yield Malformed("a pickle under the name of the tensors", pickled, (TENSORS, "truncated"))
    for name, make in {
        "a folder": Path.mkdir,
        "a pipe that nobody writes to": os.mkfifo,
        "a link to nowhere": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a device without end": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        for file, status in ((TENSORS, 422), (CONFIG, 404)):
            instead = lambda folder, file=file, make=make: ((folder / file).unlink(), make(folder / file))  # noqa: E731
            yield Malformed(f"{name} for {file}", instead, (f"holds no {file}",), status)
    yield Malformed("no config", lambda folder: (folder / CONFIG).unlink(), (f"holds no {CONFIG}",), 404)


def values() -> Iterator[Malformed]:
    """A number among the tensors."""
    for name in (A, B):
        for value in (torch.nan, torch.inf, -torch.inf):
            yield Malformed(f"{value} in {name}", _tensor(name, lambda t, v=value: _with(t, v)), (name, "not finite"))
        wide = _tensor(name, lambda t: torch.full_like(t, 1e39, dtype=torch.float64))
        yield Malformed(f"more than float32 holds in {name}", wide, (name, "torch.float64", "not finite"))
    for alpha in (1e300, -1e9):
        yield Malformed(
            f"lora_alpha {alpha}", _config(lora_alpha=alpha), (Q.removeprefix("base_model.model."), "scale")
        )


def dtypes() -> Iterator[Malformed]:
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool):
        for name in (A, B):
            yield Malformed(f"{dtype} in {name}", _tensor(name, lambda t, d=dtype: t.to(d)), (name, str(dtype)))


def shapes() -> Iterator[Malformed]:
    for what, change in {
        "a row": lambda t: t[0],
        "a number": lambda t: t[0, 0],
        "three dimensions": lambda t: t[None],
        "nothing": lambda t: t[:0, :0],
    }.items():
        for name in (A, B):
            yield Malformed(f"{what} for {name}", _tensor(name, change), ("layers.0.self_attn.q_proj has lora_A",))
    for name, change in (
        (A, lambda t: t[:, :-1]),
        (A, lambda t: torch.cat([t, t], 1)),
        (B, lambda t: t[:-1]),
        (B, lambda t: torch.cat([t, t])),
    ):
        what = f"{name} of {list(change(torch.zeros(8, 64) if name == A else torch.zeros(64, 8)).shape)}"
        yield Malformed(what, _tensor(name, change), ("q_proj has lora_A", "needs [r, 64] and [64, r]"))


def pairs() -> Iterator[Malformed]:
    """Tensors too few, too many, or of something else."""

    def only(keep: Callable[[str], bool]) -> Spoil:
        return lambda folder: rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if keep(n)})

    def renamed(old: str, new: str) -> Spoil:
        return lambda folder: rewrite(folder, lambda tensors: {n.replace(old, new): t for n, t in tensors.items()})

    for name, left in ((B, "lora_A"), (A, "lora_B")):
        yield Malformed(f"without {name}", only(lambda n, name=name: n != name), (f"has {left} alone",))
    yield Malformed("only A", only(lambda n: "lora_A" in n), ("has lora_A alone",))
    yield Malformed("one layer of two", only(lambda n: ".layers.0." in n), ("layers.1.self_attn", "no tensor belongs"))
    for old, new in (("v_proj", "w_proj"), ("layers.1", "layers.2"), ("self_attn", "cross_attn")):
        yield Malformed(f"{new} for {old}", renamed(old, new), ("not in the base model", new))
    for strange in ("model.x", f"{Q}.lora_C.weight", f"{Q}.lora_A", "../../etc/passwd"):
        more = lambda folder, name=strange: rewrite(folder, lambda t: t | {name: torch.zeros(2)})  # noqa: E731
        yield Malformed(f"a tensor {strange!r} more", more, (Path(strange).name, "not served"))
    twice = lambda folder: rewrite(folder, lambda t: t | {A.removeprefix("base_model.model."): t[A].clone()})  # noqa: E731
    yield Malformed("one factor under two names", twice, ("lora_A of", "a second time"))
    yield Malformed(
        "a target without tensors", _config(target_modules=["q_proj", "v_proj", "o_proj"]), ("'o_proj'", "no tensor")
    )


def configs() -> Iterator[Malformed]:
    """adapter_config.json as bytes, and its fields."""
    for name, data in {
        "empty": b"",
        "no JSON": b"r: 8",
        "cut": b'{"r": 8',
        "a list": b"[1]",
        "null": b"null",
        "behind a byte order mark": b'\xef\xbb\xbf{"r": 8}',
        "in UTF-16": '{"r": 8}'.encode("utf-16"),
        "in Latin-1": b'{"r": 8, "revision": "\xe9"}',
        "nested without end": b"[" * 500_000,
    }.items():
        yield Malformed(
            f"a config {name}",
            lambda folder, data=data: (folder / CONFIG).write_bytes(data),
            (CONFIG, "not a PEFT config"),
        )
    large = lambda folder: (folder / CONFIG).write_bytes(b" " * (10 << 20))  # noqa: E731
    yield Malformed("a config of 10 MB", large, (CONFIG, "over 1048576 bytes"))
    for field, value in (
        ("r", "eight"),
        ("r", 8.5),
        ("r", None),
        ("lora_alpha", "much"),
        ("target_modules", 3),
        ("rank_pattern", [4]),
        ("alpha_pattern", {"q_proj": "much"}),
        ("bias", 1),
    ):
        yield Malformed(f"{field} {value!r}", _config(**{field: value}), (CONFIG, "not a PEFT config", field))
    yield Malformed("another method", _config(peft_type="IA3"), ("peft_type 'IA3'", "'LORA'"))
    for pattern in ("(a+)+$", "(.*)*q_proj", ".?" * 60 + "Z"):
        yield Malformed(
            f"the pattern {pattern}", _config(rank_pattern={pattern: 4}), (pattern[:80], "name the modules")
        )
    yield Malformed("no pattern", _config(alpha_pattern={"[a": 4}), ("'[a'", "not a regular expression"))


def ranks() -> Iterator[Malformed]:
    """Ranks that do not agree, or are too large for a server of rank 8."""
    for rank in (0, -1):
        yield Malformed(f"r {rank}", _config(r=rank), (f"r={rank}", "at least 1"))
    for rank in (4, 10**9):
        yield Malformed(f"r {rank} over tensors of 8", _config(r=rank), ("has rank 8", f"says {rank}"))
    half = _tensor(B, lambda t: t[:, :4])
    yield Malformed("A and B of two ranks", half, ("rank 8 in lora_A and 4 in lora_B",))
    for times in (2, 100):

        def wider(folder: Path, times: int = times) -> None:
            reconfigure(folder, r=8 * times)
            rewrite(folder, lambda t: {n: torch.cat([v] * times, 0 if "lora_A" in n else 1) for n, v in t.items()})

        yield Malformed(f"rank {8 * times}", wider, (f"rank {8 * times} of", "max_lora_rank=8"))


def _put_header(folder: Path, header: str, body: bytes) -> None:
    data = header.encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(data)) + data + body)


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    def changed(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {**tensors, name: change(tensors[name])}

    return lambda folder: rewrite(folder, changed)


def _config(**fields: object) -> Spoil:
    return lambda folder: reconfigure(folder, **fields)


def _with(tensor: Tensor, value: float) -> Tensor:
    tensor[3, 5] = value
    return tensor
