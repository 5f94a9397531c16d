"""What docs/adding-a-model.md says is run as it stands there."""

import inspect
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from transformers import Olmo3Config

from aiolora.errors import UnsupportedModelError
from aiolora.models import families
from tests import tiny
from tests.tiny import TOLERANCE, Loaded, hf_logits, load_hf, make_model, prompt_ids

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


def test_the_worked_family_serves_its_shapes_with_the_logits_of_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    family, shapes = (
        dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", PAGE.read_text(), re.M | re.S)
    )
    assert inspect.getsource(families._olmo3) in family
    monkeypatch.delitem(families.FAMILIES, "olmo3")
    said: dict[str, Any] = {"Olmo3Config": Olmo3Config}
    exec(shapes, said)
    for number, (name, shape) in enumerate(said["SHAPES"].items()):
        monkeypatch.setitem(tiny.FAMILIES, name, shape)
        folder = make_model(tmp_path / str(number), name)
        with pytest.raises(UnsupportedModelError, match="model_type 'olmo3' is not served"):
            Loaded.of(folder, model_impl="aiolora")
        exec(family, vars(families) | {"FAMILIES": families.FAMILIES})
        loaded = Loaded.of(folder, model_impl="aiolora")
        (seq,) = loaded.sequences([prompt_ids(number, 50)])
        logits = torch.cat([*loaded.step((seq, 0, 41)), *loaded.step((seq, 41, 9))])
        torch.testing.assert_close(logits, hf_logits(load_hf(folder), seq.tokens), rtol=0, atol=TOLERANCE)
