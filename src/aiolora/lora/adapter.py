"""What a PEFT LoRA config means, and which of its features are served.

Formats: `LoraConfig` of PEFT (https://huggingface.co/docs/peft/package_reference/lora), read from adapter_config.json.
"""

import functools
import math
import re
from typing import Any

import msgspec
from msgspec import Struct

from aiolora.errors import AdapterFormatError, AdapterUnsupportedError

# How lora_A and lora_B were initialised matters only where the base's weights were changed with them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Fields that change the meaning of the tensors when they are set, and what to do instead.
_NOT_SERVED = {
    "modules_to_save": "retrain without modules_to_save",
    "trainable_token_indices": "retrain without trainable_token_indices",
    "layer_replication": "serve the replicated model as the base",
    "use_qalora": "retrain with use_qalora=False",
    "use_bdlora": "retrain without use_bdlora",
    "arrow_config": "serve the routed adapters one by one",
    "velora_config": "retrain without velora_config",
    "monteclora_config": "retrain without monteclora_config",
    "kasa_config": "retrain without kasa_config",
}

_BIASES = ("none", "all", "lora_only")

_PLAIN_NAME = re.compile(r"[\w.]+")
_REPEATED_GROUP = re.compile(r"\)[*+{]")  # `(...)?` is no repetition: it counts as a quantifier
_QUANTIFIER = re.compile(r"(?<!\()[*+?{]+")
_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|.", re.DOTALL)  # an escape, a set or a character
_MAX_INVOCATION = 256  # tokens: the prompt is searched for them
_MAX_PATTERN, _MAX_QUANTIFIERS, _MAX_REGEXES = 256, 4, 64  # 4 quantifiers need at most 0.8 ms a module, 6 need 31


class PeftConfig(Struct, frozen=True):
    """The fields of adapter_config.json that say how its tensors are meant."""

    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: str = "none"
    use_dora: bool | None = False
    lora_bias: bool | None = False
    init_lora_weights: bool | str | None = True
    alora_invocation_tokens: list[int] | None = None
    task_type: str | None = None

    def scale(self, module: str, rank: int) -> float:
        """Alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732), after alpha_pattern."""
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, self._target(module)) or "", self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rank(self, module: str) -> int:
        """The rank that the config gives to `module`, after rank_pattern."""
        return self.rank_pattern.get(_matching(self.rank_pattern, self._target(module)) or "", self.r)

    def _target(self, module: str) -> str:
        """What patterns are held against: the module, or its weight where target_parameters names that."""
        weight = weight_of(module)
        return weight if any(stands_for(name, weight) for name in self.target_parameters or ()) else module

    def spares(self, module: str) -> bool:
        """Whether exclude_modules or layers_to_transform keep `module` out of target_modules."""
        excluded, layers = self.exclude_modules or [], self.layers_to_transform
        if isinstance(excluded, str):
            if re.fullmatch(excluded, module):
                return True
        elif any(stands_for(name, module) for name in excluded):
            return True
        if layers is None or layers == []:
            return False
        if isinstance(self.target_modules, list) and module in self.target_modules:
            return False  # PEFT asks for the layer only where a name is the end of a module's
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return layer is None or int(layer[1]) not in ([layers] if isinstance(layers, int) else layers)


def weight_of(module: str) -> str:
    """The parameter of `module` that target_parameters may name: LoRA on it is LoRA on the module."""
    return f"{module}.weight"


def stands_for(name: str, module: str) -> bool:
    """Whether `name` of a list in the config means `module`: the whole of it, or its end behind a dot."""
    return module == name or module.endswith("." + name)


def parse_config(adapter: str, data: bytes) -> PeftConfig:
    """The config of `adapter` from the bytes of its adapter_config.json.

    Raises `AdapterFormatError` for what is no LoRA config and `AdapterUnsupportedError` for features not served.
    """
    try:
        raw: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        config = msgspec.convert(raw, PeftConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterFormatError(adapter, f"adapter_config.json is not a PEFT config: {error}") from None
    if config.peft_type != "LORA":
        raise AdapterUnsupportedError(adapter, f"peft_type {config.peft_type!r} is not served, only 'LORA'")
    for field, way_out in _NOT_SERVED.items():
        if raw.get(field):
            raise AdapterUnsupportedError(adapter, f"{field}={raw[field]!r} is not served; {way_out}")
    if config.init_lora_weights is not None and config.init_lora_weights not in _PLAIN_INITS:
        raise AdapterUnsupportedError(
            adapter,
            f"init_lora_weights={config.init_lora_weights!r} changes the base model's weights; save it with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    _check_invocation(adapter, config)
    if config.r < 1 or not math.isfinite(config.lora_alpha):
        raise AdapterFormatError(adapter, f"r={config.r}, lora_alpha={config.lora_alpha}: r must be at least 1")
    if config.use_dora and config.lora_bias:
        raise AdapterFormatError(adapter, "use_dora and lora_bias are set both, which PEFT does not do")
    if config.bias not in _BIASES:
        raise AdapterFormatError(adapter, f"bias={config.bias!r} is none of {', '.join(_BIASES)}")
    patterns = [*config.rank_pattern, *config.alpha_pattern]
    if isinstance(config.exclude_modules, str):
        patterns.append(config.exclude_modules)
    regexes = [pattern for pattern in patterns if not _is_plain(pattern)]
    if (count := sum(_cost(pattern) for pattern in regexes)) > _MAX_REGEXES:
        raise AdapterUnsupportedError(
            adapter, f"{count} patterns are regular expressions, the limit is {_MAX_REGEXES}; name the modules"
        )
    for pattern in regexes:
        _check_pattern(adapter, pattern)
    return config


def _check_invocation(adapter: str, config: PeftConfig) -> None:
    """An activated LoRA (aLoRA, arXiv 2504.12397) sleeps until the prompt's last `alora_invocation_tokens`."""
    invocation = config.alora_invocation_tokens or []
    if len(invocation) > _MAX_INVOCATION or any(token < 0 for token in invocation):
        raise AdapterFormatError(
            adapter,
            f"alora_invocation_tokens has {len(invocation)} tokens, the least {min(invocation)}; give up to "
            f"{_MAX_INVOCATION} token ids",
        )
    if invocation and config.task_type != "CAUSAL_LM":
        raise AdapterUnsupportedError(
            adapter,
            f"alora_invocation_tokens with task_type={config.task_type!r}: PEFT looks for them in CAUSAL_LM only, and "
            "the adapter would never wake; save it with task_type='CAUSAL_LM'",
        )


def _matching(patterns: dict[str, Any], module: str) -> str | None:
    """The first pattern that stands for `module`: the whole of it or its end behind a dot, as PEFT matches."""
    return next((pattern for pattern in patterns if _whole(pattern).match(module)), None)


def _is_plain(pattern: str) -> bool:
    return len(pattern) <= _MAX_PATTERN and _PLAIN_NAME.fullmatch(pattern) is not None


def _cost(pattern: str) -> int:
    """How many patterns of the most quantifiers take as long."""
    return max(1, -(-len(_QUANTIFIER.findall(pattern)) // _MAX_QUANTIFIERS))


def _check_pattern(adapter: str, pattern: str) -> None:
    """A pattern is a regex by PEFT's rule; refuse one that could run for minutes (nested or many quantifiers).

    Alternatives are tried one after the other, so each may have as many quantifiers as a pattern of its own.
    """
    if (
        len(pattern) > _MAX_PATTERN
        or _REPEATED_GROUP.search(pattern)
        or any(len(_QUANTIFIER.findall(part)) > _MAX_QUANTIFIERS for part in _alternatives(pattern))
    ):
        raise AdapterUnsupportedError(
            adapter,
            f"pattern {pattern[:80]!r} repeats a group, has over {_MAX_QUANTIFIERS} quantifiers in an alternative or "
            f"over {_MAX_PATTERN} characters; name the modules",
        )
    try:
        _whole(pattern)
    except (re.error, OverflowError) as error:
        raise AdapterFormatError(adapter, f"pattern {pattern!r} is not a regular expression: {error}") from None


def _alternatives(pattern: str) -> list[str]:
    """What stands between the `|` outside of all groups."""
    found, depth = [""], 0
    for part in _PART.findall(pattern):
        depth += (part == "(") - (part == ")")
        if part == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += part
    return found


@functools.lru_cache(maxsize=4096)  # a pattern a module is usual (EVA), re's own cache holds 512
def _whole(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
