"""What the user said: engine arguments (also the command line's flags) and the environment."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from aiolora.errors import ConfigError
from aiolora.types import check_fields

Positive = Annotated[int, Meta(ge=1)]


class EngineArgs(Struct, kw_only=True, frozen=True):
    """Arguments of every engine face; the command line's flags are these with dashes.

    Raises `ConfigError` naming the field, its value and its limit.
    """

    model: Annotated[str, Meta(description="folder, hub repository, or the embedded smollm2-135m")]
    tokenizer: Annotated[
        str | None, Meta(description="folder or repository of the tokenizer; the model's by default")
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="auto: the model's, or float32 where the CPU has no bfloat16 arithmetic"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: cuda where there is one")] = "auto"
    load_format: Annotated[
        Literal["auto", "safetensors", "dummy"], Meta(description="dummy: random weights, for measuring")
    ] = "auto"
    model_impl: Annotated[
        Literal["auto", "aiolora", "transformers"],
        Meta(description="auto: our decoder where it has the family, else transformers' code with our attention in it"),
    ] = "auto"
    max_model_len: Annotated[Positive | None, Meta(description="longest prompt plus answer, tokens")] = None
    max_num_seqs: Annotated[Annotated[int, Meta(ge=1, le=4096)] | None, Meta(description="sequences in one step")] = (
        None
    )
    max_num_batched_tokens: Annotated[Positive | None, Meta(description="tokens in one step")] = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1, description="share of the GPU to use")] = 0.9
    kv_cache_memory: Annotated[Positive | None, Meta(description="bytes for the KV cache")] = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    enforce_eager: Annotated[bool, Meta(description="no CUDA graphs")] = False
    compile: Annotated[bool, Meta(description="torch.compile the decoder (slow start)")] = False
    seed: Annotated[int, Meta(description="of requests that bring none")] = 0
    enable_lora: bool = False
    max_loras: Annotated[int, Meta(ge=1, le=4096, description="distinct adapters in one batch")] = 8
    max_lora_rank: Annotated[int, Meta(ge=1, le=4096, description="largest rank of any adapter")] = 64
    max_cpu_loras: Annotated[Positive | None, Meta(description="adapters kept in host memory; >= max_loras")] = None
    lora_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Meta(description="auto: the model's dtype")
    ] = "auto"
    lora_memory: Annotated[Positive | None, Meta(description="bytes for rank pages of adapters on the device")] = None
    lora_ends_memory: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="more bytes for what they change of embedding, head and norms; 0: nothing is served of that"),
    ] = None
    lora_target_modules: Annotated[
        tuple[str, ...] | None,
        Meta(description="only these modules take adapters: q_proj, or what lies in mlp; others have no memory"),
    ] = None

    default_mm_loras: Annotated[
        dict[str, str] | None,
        Meta(description='adapter of requests with that in them that name none: {"audio": folder or repository}'),
    ] = None
    allowed_media_domains: Annotated[
        tuple[str, ...], Meta(description="hosts that images and recordings are fetched from; *: all that are public")
    ] = ()
    max_image_pixels: Annotated[Positive, Meta(description="of one image, width times height")] = 1 << 24
    media_memory: Annotated[
        int, Meta(ge=0, description="bytes on the device for what encoders made of images and recordings")
    ] = 256 << 20

    def __post_init__(self) -> None:
        check_fields(self)
        if self.default_mm_loras and not self.enable_lora:
            raise ConfigError(f"default_mm_loras={self.default_mm_loras!r} needs enable_lora=True (--enable-lora)")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigError(
                f"max_cpu_loras={self.max_cpu_loras} is under max_loras={self.max_loras}: "
                "every adapter of a batch is also kept in host memory; raise max_cpu_loras or lower max_loras"
            )

    @property
    def host_adapters(self) -> int:
        """Adapters kept in host memory."""
        return self.max_cpu_loras or max(32, 2 * self.max_loras)


class ServerArgs(Struct, kw_only=True, frozen=True):
    """Arguments of the HTTP server beside the engine's; flags as `EngineArgs`.

    A key is the key itself, `sha256:` and the hex digest of one, or an object `{"key": ..., "name": ..., "adapters":
    [...]}` as JSON: the name goes into the log, and the key may use the base and those adapters only. Raises
    `ConfigError` naming the field, its value and its limit.
    """

    api_key: Annotated[
        tuple[str, ...],
        Meta(description='who may ask: KEY, sha256:HEX or {"key": ..., "name": ..., "adapters": [...]}; none: all'),
    ] = ()
    admin_key: Annotated[
        tuple[str, ...],
        Meta(description="who may change adapters, too (load, unload, pin, alias, ...); with any key set, nobody else"),
    ] = ()
    cors_origin: Annotated[tuple[str, ...], Meta(description="web pages of these origins may call; * for all")] = ()
    access_log: Annotated[bool, Meta(description="a line for each request, without what was said")] = True
    adapter_labels: Annotated[
        int, Meta(ge=0, le=10_000, description="adapters that /metrics counts by name; the rest are `other`")
    ] = 100
    ready_timeout: Annotated[
        float, Meta(gt=0, description="seconds without a step, though somebody waits, until /ready says 503")
    ] = 30.0
    otlp_endpoint: Annotated[
        str | None, Meta(description="send traces there (OTLP over HTTP); needs the extra otel")
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)


class Environment(Struct, frozen=True):
    """Everything aiolora reads from the environment, in one place."""

    cache: Path  # AIOLORA_CACHE: where pulled models and compiled kernels are kept
    native: bool  # AIOLORA_NATIVE=0: never use the compiled CPU kernels
    runtime_lora_updating: bool  # AIOLORA_ALLOW_RUNTIME_LORA_UPDATING=1: adapters are loaded over HTTP and resolved
    hub_adapters: bool  # AIOLORA_ALLOW_HUB_ADAPTERS=1: those may be fetched from the hub, too
    plugins: tuple[str, ...]  # AIOLORA_PLUGINS: names, in the order in which they are asked
    resolver_cache_dir: Path | None  # AIOLORA_LORA_RESOLVER_CACHE_DIR: the filesystem resolver's folder
    resolver_hf_repos: tuple[str, ...]  # AIOLORA_LORA_RESOLVER_HF_REPO_LIST: all that the hub resolver may fetch
    resolver_timeout_s: float  # AIOLORA_LORA_RESOLVER_TIMEOUT_S: for one resolver's answer

    @classmethod
    def read(cls) -> "Environment":
        home = os.environ.get("AIOLORA_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "aiolora"
        )
        folder = os.environ.get("AIOLORA_LORA_RESOLVER_CACHE_DIR")
        return cls(
            cache=Path(home),
            native=os.environ.get("AIOLORA_NATIVE", "1") != "0",
            runtime_lora_updating=_is_on("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING"),
            hub_adapters=_is_on("AIOLORA_ALLOW_HUB_ADAPTERS"),
            plugins=_listed("AIOLORA_PLUGINS"),
            resolver_cache_dir=Path(folder).expanduser() if folder else None,
            resolver_hf_repos=_listed("AIOLORA_LORA_RESOLVER_HF_REPO_LIST"),
            resolver_timeout_s=_seconds("AIOLORA_LORA_RESOLVER_TIMEOUT_S", 30.0),
        )


def said_in_environment(flags: Iterable[str]) -> dict[str, str]:
    """The flags (without dashes in front) that a variable gives a value: `max-loras` is AIOLORA_MAX_LORAS."""
    variables = {flag: "AIOLORA_" + flag.upper().replace("-", "_") for flag in flags}
    return {flag: os.environ[variable] for flag, variable in variables.items() if os.environ.get(variable)}


def _is_on(variable: str) -> bool:
    """Raises `ConfigError` for a value that is neither yes nor no: a switch that is spelled wrong must not be off."""
    said = os.environ.get(variable, "").strip().lower()
    if said not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"{variable}={said!r}: say 1 or true, 0 or false")
    return said in ("1", "true")


def _listed(variable: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.strip() for item in os.environ.get(variable, "").split(",") if item.strip()))


def _seconds(variable: str, default: float) -> float:
    said = os.environ.get(variable) or str(default)
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{variable}={said!r}: give a positive number of seconds")
    return seconds
