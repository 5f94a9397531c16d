"""Outlines that were made, by what they were made of: adapters that were trained alike differ in values only."""

from collections.abc import Hashable

from msgspec import structs

from aiolora.lora.adapter import PeftConfig
from aiolora.lora.layout import Layout
from aiolora.lora.outline import Limits, Outline, outline
from aiolora.lora.tensorfile import Tensors

_MOST, _LEAST = 50_000, 500  # tensors of all outlines that are kept, and as how many a small one counts


class Outlines:
    """What configs, names and shapes say of adapters for one base, worked out once for all that are alike.

    It takes the interpreter, which those need who are being served, some milliseconds for some hundred tensors. Any
    thread.
    """

    def __init__(self, layout: Layout, limits: Limits) -> None:
        self.layout = layout
        self.limits = limits
        self._made: dict[Hashable, Outline] = {}  # least recently used first

    def of(self, name: str, config: PeftConfig, file: Tensors) -> Outline:
        """As `outline`. What raises is not kept."""
        key = file.likeness, _recipe(config)
        made = self._made.get(key) or outline(name, config, file.entries, self.layout, self.limits)
        self._made.pop(key, None)
        self._made[key] = made
        total = sum(max(_LEAST, len(other.entries)) for other in list(self._made.values()))
        for oldest in list(self._made):
            if total <= _MOST:
                break
            gone = self._made.pop(oldest, None)
            total -= max(_LEAST, len(gone.entries)) if gone else 0
        return made


def _recipe(config: PeftConfig) -> str:
    """All of it that an outline follows from. PEFT saves what was a set in any order."""
    targets = config.target_modules
    in_order = sorted(targets) if isinstance(targets, list) else targets
    return repr(structs.replace(config, base_model_name_or_path=None, target_modules=in_order))
