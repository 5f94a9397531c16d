"""Prompts with an image each, of many adapters: the first token, images a second, decode steps beside those of text.

    python -m benchmarks.media --out results
    python -m benchmarks.media --images 32 --side 1008 --rank 64 --out results

The shape of Qwen2.5-VL-7B, its tower too, with random weights (16.6 GB in bfloat16); adapters of random numbers that
never touch a disk, on the language model, or on that and the tower. No image comes twice. Some answers of the last
round are held against transformers' own model in float32 (33 GB more) with the adapters' factors added by hooks.
Without a GPU: `--model tiny --dtype float32`.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.engine.output import Assembler
from aiolora.media.reader import MediaReader
from aiolora.models.loading import outline, read_config
from aiolora.types import MediaItem
from benchmarks.command import tell
from benchmarks.reference import Check, Reference
from benchmarks.session import core_of
from benchmarks.shapes import write_tokenizer

_SCALE = 2.0  # lora_alpha / r
_SHARE = 1 / 2  # of what a projection gives: so much an adapter adds to it
_STD = 0.02  # of the weights of linears
_TEXT = 64  # tokens of a prompt beside its image


@dataclass(frozen=True)
class MediaShape:
    """A Qwen2.5-VL as its config says; `side` of an image in pixels."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    side: int

    @property
    def vocab(self) -> int:
        return int(self.text["vocab_size"])

    @property
    def image(self) -> int:
        """The placeholder."""
        return self.vocab - 1

    def config(self) -> dict[str, object]:
        sections = self.text["hidden_size"] // self.text["num_attention_heads"] // 8
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [sections, *[sections * 3 // 2] * 2]}
        text = {"model_type": "qwen2_5_vl_text", "rope_parameters": rope, "use_sliding_window": False, **self.text}
        text |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1}
        vision = {"model_type": "qwen2_5_vl", "out_hidden_size": self.text["hidden_size"], "patch_size": 14}
        vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, **self.vision}
        last = self.vocab
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "dtype": "bfloat16",
            "text_config": text,
            "vision_config": vision,
            "image_token_id": last - 1,
            "video_token_id": last - 2,
            "vision_start_token_id": last - 3,
            "vision_end_token_id": last - 4,
            "tie_word_embeddings": False,
        }


_QWEN = MediaShape(
    {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    },
    {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    672,
)
_TINY = MediaShape(
    {
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "fullatt_block_indexes": [1]},
    140,
)
MEDIA_SHAPES = {"qwen2.5-vl-7b": _QWEN, "tiny": _TINY}


def make_folder(root: Path, shape: MediaShape) -> Path:
    folder = root / "media"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    write_tokenizer(folder, shape.vocab)
    return folder


class Adapters:
    """Factors of the adapter `number`: windows into noise, of every linear of the language model, or of the tower too.

    Odd ones are of the language model only.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        networks = outline(folder)
        assert networks.encoder is not None
        self.rank = rank
        self._linears: dict[bool, list[tuple[str, int, int]]] = {True: [], False: []}  # of the tower: module, K, N
        for tower, linears in ((False, networks.decoder.linears()), (True, networks.encoder.linears())):
            for _, linear in linears:
                self._linears[tower] += [(name, linear.inputs, high - low) for name, low, high in linear.slices()]
        generator = torch.Generator().manual_seed(rank)
        self._noise = torch.empty(1 << 23, dtype=torch.bfloat16).normal_(generator=generator)

    @property
    def config(self) -> dict[str, object]:
        return {"peft_type": "LORA", "r": self.rank, "lora_alpha": _SCALE * self.rank}

    def factors(self, number: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module, A, B)."""
        turns = count(number * 7919)
        for module, inputs, outputs in [*self._linears[False], *(self._linears[True] if has_tower(number) else ())]:
            std = _SHARE * _STD * inputs**0.5 / (_SCALE * self.rank**0.5)
            yield (
                module,
                self._window((self.rank, inputs), inputs**-0.5, next(turns)),
                self._window((outputs, self.rank), std, next(turns)),
            )

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Under the names that PEFT gives them."""
        found = {}
        for module, a, b in self.factors(number):
            found[f"base_model.model.{module}.lora_A.weight"] = a
            found[f"base_model.model.{module}.lora_B.weight"] = b
        return found

    def _window(self, size: tuple[int, int], std: float, turn: int) -> Tensor:
        numel = size[0] * size[1]
        first = turn * 104_729 % (len(self._noise) - numel)
        return self._noise[first : first + numel].view(size) * std


def has_tower(number: int) -> bool:
    return number % 2 == 0


class MediaReference(Reference):
    """transformers' model over the weights of the engine, in float32; what adapters add is added by hooks."""

    def __init__(self, folder: Path, llm: LLM, adapters: Adapters) -> None:
        from transformers import AutoModelForImageTextToText
        from transformers.initialization import no_init_weights

        runner: Any = core_of(llm)._runner
        self._device = runner._model.embed.weight.device
        self._adapters = adapters
        self._media = llm.engine._built.intake.media
        self._encoding = runner._encoding
        self._features: dict[tuple[int, ...], dict[str, Tensor]] = {}  # by the first tokens of a prompt
        torch.backends.cudnn.allow_tf32 = False
        with torch.device(self._device), no_init_weights():
            self._hf: nn.Module = AutoModelForImageTextToText.from_config(read_config(folder), dtype=torch.float32)
        weights = dict(runner._model.checkpoint()) | dict(runner._encoding._encoder.checkpoint())
        self._hf.load_state_dict(weights)
        self._hf.eval()
        self._modules = dict(self._hf.named_modules())

    def know(self, prompt: Mapping[str, Any]) -> bytes:
        """Which image `prompt` is about: its digest."""
        item = _item(self._media, prompt)
        features = {name: torch.from_numpy(array).to(self._device) for name, array in item.features.items()}
        self._features[tuple(prompt["prompt_token_ids"][: _TEXT // 2])] = features
        return item.digest

    @torch.inference_mode()
    def apart(self, prompt: Mapping[str, Any], lora: LoRARequest) -> tuple[float, float]:
        """How far the rows that were kept of its image under `lora` are from the reference's, and from the base's.

        Of the size of the reference's (2-norm).
        """
        digest, features = self.know(prompt), self._features[tuple(prompt["prompt_token_ids"][: _TEXT // 2])]
        (ours,) = [
            rows for key, rows in self._encoding.kept._rows.items() if key.digest == digest and key.mix is not None
        ]
        found = []
        for one in (lora, None):
            with self._adapted(one):
                theirs = self._hf.model.get_image_features(**features).pooler_output[0]  # type: ignore[operator, union-attr]
            found.append(float((ours.float() - theirs).norm() / theirs.norm()))
        return found[0], found[1]

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], lora: LoRARequest | None) -> Tensor:
        """[T, V] float32: of what follows each token."""
        features = self._features.get(tuple(ids[: _TEXT // 2]), {})
        tokens = torch.tensor([list(ids)], device=self._device)
        placeholder: int = self._hf.config.image_token_id  # type: ignore[union-attr, assignment]
        kinds = {"mm_token_type_ids": (tokens == placeholder).int()} if features else {}
        with self._adapted(lora):
            logits: Tensor = self._hf(tokens, use_cache=False, **features, **kinds).logits[0]
        return logits.log_softmax(-1)

    @contextmanager
    def _adapted(self, lora: LoRARequest | None) -> Iterator[None]:
        factors = [] if lora is None else self._adapters.factors(lora.lora_int_id)
        hooks = [self._modules[module].register_forward_hook(self._added(a, b)) for module, a, b in factors]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _added(self, a: Tensor, b: Tensor) -> Any:
        a, b = a.to(self._device).float(), b.to(self._device).float()
        return lambda module, given, y: y + given[0] @ a.T @ b.T * _SCALE


class _Words:
    chat_template: object = None

    def decode(self, ids: Sequence[int]) -> str:
        return " "


def _item(media: MediaReader, prompt: Mapping[str, Any]) -> MediaItem:
    """That of a prompt about one image."""
    [opened] = media.open(media.split(prompt, _Words()).given)
    return opened.item()


@dataclass
class Round:
    """What 16 requests that came at once had."""

    prepared_s: float  # of the host, an image
    first_s: list[float]  # until each one's first token, from when all were prepared
    step_s: float
    outputs: list[RequestOutput]
    prompts: list[dict[str, Any]]


class MediaSession:
    """One engine on the shape, with all adapters published: `loras`."""

    def __init__(self, folder: Path, shape: MediaShape, adapters: Adapters, args: argparse.Namespace) -> None:
        self.shape, self._side = shape, args.side or shape.side
        self._random = random.Random(0)
        self._pixels = np.random.default_rng(0)
        text, element = shape.text, 4 if args.dtype == "float32" else 2
        head = text["hidden_size"] // text["num_attention_heads"]
        kv_nbytes = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head * element  # of a token
        self.rows = (self._side // 28) ** 2 + _TEXT  # tokens of a prompt
        tokens = self.rows + 8 + args.steps + 16
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            dtype=args.dtype,
            max_num_seqs=args.images,
            max_model_len=tokens,
            kv_cache_memory=2 * args.images * (tokens + 16) * kv_nbytes,
            max_image_pixels=max(1 << 20, self._side**2),
            enable_lora=True,
            max_loras=2 * args.adapters,
            max_cpu_loras=2 * args.adapters,
            max_lora_rank=args.rank,
        )
        self.loras = [LoRARequest(f"a{number}", number, "in memory") for number in range(1, 2 * args.adapters + 1)]
        for lora in self.loras:
            tensors = adapters.tensors(lora.lora_int_id)
            self.llm.engine.add_lora(lora.lora_name, tensors=tensors, config=adapters.config)

    def prompt(self, *, image: bool) -> dict[str, Any]:
        """Tokens that nobody has seen before, with a new image in their middle or all text and as long."""
        ids = [self._random.randrange(300, self.shape.vocab - 8) for _ in range(_TEXT if image else self.rows)]
        if not image:
            return {"prompt_token_ids": ids}
        ids.insert(_TEXT // 2, self.shape.image)
        coarse = self._pixels.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        size = -(-self._side // 16)
        picture = coarse.repeat(size, 0).repeat(size, 1)[: self._side, : self._side]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}

    def run(self, loras: Sequence[LoRARequest | None], steps: int, *, image: bool) -> Round:
        """A request for each of `loras`, all at once, to their first tokens and `steps` further."""
        engine, names = self.llm.engine, [f"media-{self._random.random()}" for _ in loras]
        prompts = [self.prompt(image=image) for _ in loras]
        params = SamplingParams(temperature=0, max_tokens=steps + 16, ignore_eos=True)
        start = time.perf_counter()
        for name, prompt, lora in zip(names, prompts, loras):
            engine.add_request(name, prompt, params, lora and lora.lora_name)
        ready = time.perf_counter()
        first: dict[str, float] = {}
        begun: dict[str, Assembler] = {}
        while len(first) < len(names):
            for assembler in engine.advance():
                begun[assembler.request.id] = assembler
                first.setdefault(assembler.request.id, time.perf_counter() - ready)
        for _ in range(8):
            engine.advance()
        before = time.perf_counter()
        for _ in range(steps):
            engine.advance()
        took = (time.perf_counter() - before) / steps
        outputs = [begun[name].output() for name in names]
        for name in names:
            engine.abort_request(name)
        while core_of(self.llm).has_work:
            core_of(self.llm).step()
        return Round((ready - start) / len(names), [first[name] for name in names], took, outputs, prompts)

    def encoding(self, repeat: int) -> tuple[float, float]:
        """Seconds of the encoder for an image without adapters: until the host is done, until the device is."""
        encoder = core_of(self.llm)._runner._encoding._encoder  # type: ignore[attr-defined]
        on_gpu = torch.cuda.is_available()
        host, device = [], []
        for _ in range(repeat + 1):
            prompt = self.prompt(image=True)
            item = _item(self.llm.engine._built.intake.media, prompt)
            features = {name: torch.from_numpy(array) for name, array in item.features.items()}
            start = time.perf_counter()
            with torch.inference_mode():
                encoder(item.modality, features, None)
            host.append(time.perf_counter() - start)
            if on_gpu:
                torch.cuda.synchronize()
            device.append(time.perf_counter() - start)
        return statistics.median(host[1:]), statistics.median(device[1:])


def measure(
    session: MediaSession, adapters: Adapters, folder: Path, args: argparse.Namespace
) -> tuple[list[tuple[str | float, ...]], Check]:
    own = {tower: [lora for lora in session.loras if has_tower(lora.lora_int_id) == tower] for tower in (False, True)}
    of = {tower: [some[row % len(some)] for row in range(args.images)] for tower, some in own.items()}
    sides: dict[str, tuple[bool, list[LoRARequest | None]]] = {
        "text, base": (False, [None] * args.images),
        "images, base": (True, [None] * args.images),
        "images, adapters of the language model": (True, [*of[False]]),
        "images, adapters of the tower, too": (True, [*of[True]]),
    }
    rounds: dict[str, list[Round]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):  # the first warms up
        for name, (image, loras) in sides.items():
            done = session.run(loras, args.steps, image=image)
            rounds[name] = [*rounds[name], done] if number else []
            print(
                f"# round {number}, {name}: first token {statistics.median(done.first_s) * 1e3:.1f} ms, all "
                f"{max(done.first_s) * 1e3:.1f} ms, a step {done.step_s * 1e3:.3f} ms",
                flush=True,
            )
    rows: list[tuple[str | float, ...]] = []
    for name, some in rounds.items():
        first = [value for one in some for value in one.first_s]
        rows += [
            (f"first token, {name}", 1e3 * statistics.median(first), "ms (median)"),
            (f"all first tokens, {name}", 1e3 * statistics.median(max(one.first_s) for one in some), "ms"),
            (f"a decode step, {name}", 1e3 * statistics.median(one.step_s for one in some), "ms"),
        ]
        if sides[name][0]:
            pace = statistics.median(args.images / max(one.first_s) for one in some)
            rows.append((f"pace, {name}", pace, "images/s"))
    prepared = statistics.median(one.prepared_s for one in rounds["images, base"])
    host, device = session.encoding(8)
    rows += [
        ("preparing an image, of one core", 1e3 * prepared, "ms"),
        ("encoder alone, until the host is done", 1e3 * host, "ms"),
        ("encoder alone, until the device is", 1e3 * device, "ms"),
    ]
    reference = MediaReference(folder, session.llm, adapters)
    checks = {name: _check(reference, rounds[name][-1], sides[name][1]) for name in sides if sides[name][0]}
    for name, check in checks.items():
        print(f"# check of {name}: {check}", flush=True)
    last = rounds["images, adapters of the tower, too"][-1]
    near, far = reference.apart(last.prompts[0], of[True][0])
    rows += [
        ("rows of an image, off the reference's", 100 * near, "% (bar 5)"),
        ("rows of an image, off the base's", 100 * far, "% (bar 20)"),
    ]
    if near > 0.05 or far < 0.2:
        print(f"# rows of an image are {near:.1%} off the reference's and {far:.1%} off those without its adapter")
        raise SystemExit("WRONG")
    return rows, next((check for check in checks.values() if not check.right), check)


def _check(reference: MediaReference, done: Round, loras: Sequence[LoRARequest | None]) -> Check:
    """Of the first two."""
    for prompt in done.prompts[:2]:
        reference.know(prompt)
    return reference.check(done.outputs[:2], loras[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-vl-7b", choices=list(MEDIA_SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--images", type=int, default=16, help="requests at a time, with an image each")
    parser.add_argument("--side", type=int, help="of an image, pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8, help="of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the CSV")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = MEDIA_SHAPES[args.model]
    with tempfile.TemporaryDirectory() as root:
        folder = make_folder(Path(root), shape)
        adapters = Adapters(folder, args.rank)
        start = time.perf_counter()
        session = MediaSession(folder, shape, adapters, args)
        print(f"# {session.llm.engine.snapshot()}", flush=True)
        print(f"# engine and {len(session.loras)} adapters: {time.perf_counter() - start:.1f} s", flush=True)
        rows, check = measure(session, adapters, folder, args)
    side = args.side or shape.side
    said = f"{args.model}, {args.dtype}, {args.images} images of {side} x {side}, {args.adapters} adapters a kind"
    tell(args.out / "media.csv", f"{said} of rank {args.rank}", rows, check)


if __name__ == "__main__":
    main()
