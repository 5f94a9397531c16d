"""Every LoRA config that PEFT can save is served with PEFT's numbers, or refused by name: docs/peft-fidelity.md."""

import contextlib
import dataclasses
import math
import re
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel
from torch import Tensor

from aiolora import LLM, LoRARequest
from aiolora.errors import AdapterError, AdapterUnsupportedError
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.lora.fidelity import ASLEEP, ELSEWHERE, INVOCATION, OPTIONS, Case, alone, peft_logits, together, train
from tests.tiny import everything, hf_logits, load_hf, prompt_ids, reported

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
COMBINATIONS = 40
TOLERANCE = 1e-4  # of the largest logit
TABLE = Path(__file__).parents[2] / "docs" / "peft-fidelity.md"
PROMPT = [*prompt_ids(0, 8), *INVOCATION, *prompt_ids(1, 11)]
HEAD = f"""# What PEFT saves, and what is served

Written by `tests/lora/test_fidelity.py`. Every option of PEFT's `LoraConfig` alone, and {COMBINATIONS} seeded
combinations, are trained a little on tiny models ({", ".join(FAMILIES)}), saved by PEFT and served in float32
on a CPU, all of a model in one batch with the base. The error is the largest difference of a log-probability from the
trained model's as a part of its largest logit, rounded up to a power of ten, 1e-5 at the least; the limit is 1e-4.
What is not served is refused when it is loaded, with the way out. The prompt holds the invocation {list(INVOCATION)}
of an aLoRA, and not {list(ASLEEP)}: one whose invocation is not there answers as the base does.

`converted` means: saved with `path_initial_model_for_weight_conversion`. `save_embedding_layers` is an argument of
`save_pretrained`.
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one config on one model."""

    option: str
    family: str
    error: float  # of the largest logit; nan where it is refused
    difference: float  # of the trained model's log-probabilities from the base's
    refusal: AdapterError | None


@pytest.fixture(scope="module")
def outcomes(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return [
        outcome
        for family in FAMILIES
        for outcome in measure(family, model_of(family), tmp_path_factory.mktemp("fidelity"))
    ]


def measure(family: str, model: Path, folder: Path) -> list[Outcome]:
    """Train all, load all, and serve in one batch what was not refused, the base first and last."""
    base = load_hf(model)
    trained: list[tuple[Case, PeftModel]] = []

    def add(case: Case) -> None:
        trained.append((case, train(base, case.config, folder / str(len(trained)), seed=len(trained))))

    for case in alone():
        add(case)
    count = len(trained) + COMBINATIONS
    for case in together(seed=0):
        with contextlib.suppress(ValueError):  # PEFT's own refusal
            add(case)
        if len(trained) == count:
            break
    llm = LLM(str(model), dtype="float32", enable_lora=True, max_loras=count, max_cpu_loras=count)
    loras: dict[int, LoRARequest] = {}
    outcomes = []
    for number, (case, _) in enumerate(trained):
        lora = LoRARequest(str(number), number + 1, str(folder / str(number)))
        try:
            llm.engine.add_lora(lora)
            loras[number] = lora
        except AdapterError as refusal:
            outcomes.append(Outcome(case.option, family, math.nan, math.nan, refusal))
    prompts: list[Prompt] = [PROMPT] * (len(loras) + 2)
    first, *answers, last = llm.generate(
        prompts, everything(2), lora_request=[None, *loras.values(), None], use_tqdm=False
    )
    assert (
        max(error_of(*reported(output), hf_logits(base, reported(output)[0])) for output in (first, last)) < TOLERANCE
    )
    plain = hf_logits(base, PROMPT).log_softmax(-1)
    for number, answer in zip(loras, answers):
        case, peft = trained[number]
        tokens, ours = reported(answer)
        logits = peft_logits(peft, PROMPT, tokens[len(PROMPT) :])
        difference = float((logits.log_softmax(-1)[: len(PROMPT)] - plain).abs().max())
        outcomes.append(Outcome(case.option, family, error_of(tokens, ours, logits), difference, None))
    order = {case.option: number for number, (case, _) in enumerate(trained)}
    return sorted(outcomes, key=lambda outcome: order[outcome.option])


def error_of(tokens: list[int], ours: Tensor, logits: Tensor) -> float:
    return float((ours - logits.log_softmax(-1)[: len(tokens) - 1]).abs().max() / logits.abs().max())


def test_whatever_peft_saves_and_we_serve_has_pefts_numbers(outcomes: list[Outcome]) -> None:
    wrong = [outcome for outcome in outcomes if outcome.refusal is None and not outcome.error < TOLERANCE]
    assert not wrong
    idle = {"lora_alpha=0", f"alora_invocation_tokens={list(ASLEEP)}"}
    served = [outcome for outcome in outcomes if outcome.refusal is None and outcome.option not in idle]
    assert len(served) > 100 * len(FAMILIES)
    assert min(outcome.difference for outcome in served) > 100 * TOLERANCE, "an adapter that changes nothing"


def test_whatever_is_not_served_is_refused_by_name_with_the_way_out(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.refusal is not None:
            assert isinstance(outcome.refusal, AdapterUnsupportedError), outcome
            assert re.search(r"; (retrain|serve|use|save|name) ", str(outcome.refusal)), outcome


def test_every_option_of_loraconfig_is_in_the_table() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - ELSEWHERE - set(OPTIONS) == set(), "an option of PEFT that nobody tried"


def test_the_table_in_the_docs_is_what_was_measured(outcomes: list[Outcome]) -> None:
    """Writes the table; run twice to accept a change, and read its diff."""
    committed = columns(TABLE.read_text()) if TABLE.exists() else {}
    measured = table(outcomes)
    TABLE.write_text(measured)
    assert columns(measured) == committed


def table(outcomes: list[Outcome]) -> str:
    lines = [HEAD, "| model | served | refused | largest error |", "|---|---|---|---|"]
    for family in FAMILIES:
        own = [outcome for outcome in outcomes if outcome.family == family]
        served = [outcome.error for outcome in own if outcome.refusal is None]
        lines.append(f"| {family} | {len(served)} | {len(own) - len(served)} | {bound(served)} |")
    lines += ["", "| config | served | largest error, or the refusal |", "|---|---|---|"]
    for option in dict.fromkeys(outcome.option for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.option == option]
        served = [outcome for outcome in own if outcome.refusal is None]
        refusal = next((str(outcome.refusal).partition(": ")[2] for outcome in own if outcome.refusal), "")
        told = ", ".join(outcome.family for outcome in served) if refusal else "yes"
        what = "; ".join(filter(None, [bound([outcome.error for outcome in served]), refusal])).replace("|", r"\|")
        lines.append(f"| `{option.replace('|', chr(92) + '|')}` | {told or 'no'} | {what} |")
    return "\n".join(lines) + "\n"


def bound(errors: list[float]) -> str:
    """The largest, rounded up to a power of ten; below 1e-5 it is the noise of a machine's float32."""
    return f"{10.0 ** max(-5, math.ceil(math.log10(max(errors)))):.0e}" if errors else ""


def columns(text: str) -> dict[str, str]:
    """Config -> what the table says of its being served."""
    rows = (re.fullmatch(r"\| `(.*)` \| ([^|]*) \| .* \|", line) for line in text.splitlines())
    return {row[1]: row[2] for row in rows if row}
