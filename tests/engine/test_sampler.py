"""Sampler: what each row asks for, and tokens that are still on the device."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from aiolora.engine.sampler import Chosen, Sampler, read, uniform
from aiolora.engine.sequence import Sequence
from aiolora.ops.sampling import sample
from aiolora.types import Request, SamplingParams

VOCABULARY, EOS = 40, 7
SAMPLER = Sampler(frozenset({EOS}))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def sequence(*tokens: int, output: tuple[int, ...] = (), pending: int = 1, **params: Any) -> Sequence:
    """One whose next token is being chosen; `pending` counts it and what is in flight."""
    request = Request(id="a", prompt_token_ids=tokens or (1, 2), params=SamplingParams(**params))
    seq = Sequence(request, 0, seed=5, number=0, max_length=100)
    seq.tokens += output
    seq.num_pending = pending
    return seq


def choose(
    logits: Tensor, seqs: list[Sequence], previous: Tensor | None = None, rows: list[int] | None = None
) -> Chosen:
    return SAMPLER.choose(logits, seqs, previous, rows or [-1] * len(seqs))


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0, "top_k": 3, "top_p": 0.5}, True),
        ({}, False),
        ({"temperature": 0, "logprobs": 0}, False),
        ({"temperature": 0, "presence_penalty": 0.5}, False),
        ({"temperature": 0, "logit_bias": {3: 1.0}}, False),
        ({"temperature": 0, "min_tokens": 1}, False),
    ],
)
def test_greedy_rows_without_wishes_are_plain(params: dict[str, Any], plain: bool) -> None:
    seqs = [sequence(temperature=0), sequence(**params)]
    assert SAMPLER.plain(seqs) is plain
    logits = torch.randn(2, VOCABULARY)
    chosen = choose(logits, seqs)
    assert chosen.tokens.dtype == torch.int32
    assert chosen.tokens[0] == logits[0].argmax()
    exact = logits.log_softmax(-1).gather(1, chosen.tokens.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen.logprobs, exact)
    assert (chosen.ranks is None) is ("logprobs" not in params)
    assert chosen.top is None


def test_the_token_follows_from_seed_and_position_with_or_without_tokens_in_flight() -> None:
    logits, points = torch.randn(1, VOCABULARY), set()
    for length in range(3, 8):
        landed = sequence(output=(9,) * (length - 2))
        in_flight = sequence(output=(9,) * (length - 3), pending=2)
        previous = torch.tensor([9, 9], dtype=torch.int32)
        u = uniform(5, length + 1)
        one, nothing = torch.ones(1), torch.zeros(1)
        expected = sample(logits, one, nothing.int(), one, nothing, torch.tensor([u]))
        assert torch.equal(choose(logits, [landed]).tokens, expected)
        assert torch.equal(choose(logits, [in_flight], previous, [1]).tokens, expected)
        points.add(u)
    assert len(points) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalties_count_the_token_in_flight(dtype: torch.dtype) -> None:
    logits = torch.randn(3, VOCABULARY).to(dtype)
    before = logits.clone()
    logits[:, 20] = before[:, 20] = 9.0
    logits[:, 21] = before[:, 21] = 8.5
    wish: dict[str, Any] = {"temperature": 0, "frequency_penalty": 0.4}
    landed = sequence(output=(20, 20), **wish)
    in_flight = sequence(output=(20,), pending=2, **wish)
    other = sequence(output=(20,), pending=2, **wish)
    previous = torch.tensor([20, 3, 4], dtype=torch.int32)
    chosen = choose(logits, [landed, in_flight, other], previous, [-1, 0, 2])
    assert chosen.tokens.tolist() == [21, 21, 20]
    assert torch.equal(logits, before), "the raw logits are reported"
    exact = logits.float().log_softmax(-1)[range(3), [21, 21, 20]]
    torch.testing.assert_close(chosen.logprobs, exact)


def test_the_repetition_penalty_sees_prompt_output_and_flight_but_frequency_no_prompt() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [4, 5, 6, 8]] = torch.tensor([3.0, 2.9, 2.8, 2.0])
    wish: dict[str, Any] = {"temperature": 0, "repetition_penalty": 2.0}
    previous = torch.tensor([6], dtype=torch.int32)
    assert choose(logits, [sequence(4, output=(5,), pending=2, **wish)], previous, [0]).tokens.tolist() == [8]
    assert choose(logits, [sequence(4, output=(5,), **wish)]).tokens.tolist() == [6]
    wish = {"temperature": 0, "presence_penalty": 2.0}
    assert choose(logits, [sequence(4, output=(5,), **wish)]).tokens.tolist() == [4]


def test_an_end_that_the_model_has_no_logit_for_hurts_nobody() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, EOS] = 5.0
    sampler = Sampler(frozenset({EOS, VOCABULARY}))
    assert sampler.choose(logits, [sequence(temperature=0, min_tokens=1)], None, [-1]).tokens.item() == 0


def test_an_answer_is_not_ended_before_min_tokens_tokens_in_flight_among_them() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, EOS], logits[0, 11], logits[0, 12] = 9.0, 8.0, 7.0
    wish: dict[str, Any] = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (11,)}
    previous = torch.tensor([3], dtype=torch.int32)
    for output, pending, token in (((), 1, 12), ((3,), 1, 12), ((), 2, 12), ((3,), 2, EOS), ((3, 3), 1, EOS)):
        seq = sequence(output=output, pending=pending, **wish)
        assert choose(logits, [seq], previous, [pending - 2]).tokens.tolist() == [token], (output, pending)
    assert choose(logits, [sequence(ignore_eos=True, **wish)]).tokens.tolist() == [EOS]


def test_bias_is_added_to_its_own_row_only() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 2] = 1.0
    seqs = [sequence(temperature=0), sequence(temperature=0, logit_bias={9: 5.0, 2: -1.0}), sequence(temperature=0)]
    assert choose(logits, seqs).tokens.tolist() == [2, 9, 2]


def test_a_grammar_masks_its_own_row_only_after_all_else() -> None:
    class Only:
        def __init__(self, *tokens: int) -> None:
            self.bits = sum(1 << token for token in tokens).to_bytes(8, "little")
            self.ready = True

    logits = torch.randn(4, VOCABULARY)
    wish: dict[str, Any] = {"logit_bias": {3: 90.0}, "frequency_penalty": 1.0}
    seqs = [sequence(temperature=0, **(wish if number else {})) for number in range(4)]
    seqs[1].matcher, seqs[3].matcher = Only(31), Only(32, 39)  # type: ignore[assignment]
    before = logits.clone()
    chosen = choose(logits, seqs).tokens.tolist()
    assert chosen == [int(logits[0].argmax()), 31, 3, 32 + int(logits[3, 39] > logits[3, 32]) * 7]
    assert torch.equal(logits, before)
    assert not SAMPLER.plain(seqs)
    drawn = {choose(logits, [sequence(output=(1,) * n), *seqs[1:]]).tokens[1].item() for n in range(5)}
    assert drawn == {31}


def test_each_row_is_told_what_it_asked_for() -> None:
    logits = torch.randn(4, VOCABULARY)
    exact = logits.log_softmax(-1)
    tokens = torch.tensor([3, 30, 0, 12], dtype=torch.int32)
    tops: list[int | None] = [2, None, 0, 5]
    chosen = SAMPLER.report(logits, tokens, tops)
    rows = read(chosen, tops)
    assert [one.token_id for one in rows] == tokens.tolist()
    for row, (one, top) in enumerate(zip(rows, tops)):
        assert one.logprob == pytest.approx(float(exact[row, one.token_id]), abs=1e-5)
        assert one.rank == 1 + int((exact[row] > exact[row, one.token_id]).sum())
        best = exact[row].sort(descending=True)
        assert [token for token, _ in one.top] == best.indices[: top or 0].tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values[: top or 0].tolist(), abs=1e-5)
    plain = SAMPLER.report(logits, tokens, [None] * 4)
    assert plain.ranks is None
    assert [(one.rank, one.top) for one in read(plain, [None] * 4)] == [(1, ())] * 4


def test_a_chosen_token_has_one_log_probability_wherever_it_is_told() -> None:
    logits = torch.randn(5, VOCABULARY).bfloat16()
    greedy = choose(logits, [sequence(temperature=0)] * 5)
    asked = choose(logits, [sequence(temperature=0, logprobs=3)] * 5)
    assert asked.top is not None
    ids, values = asked.top
    assert torch.equal(greedy.logprobs, asked.logprobs)
    assert torch.equal(values[ids == asked.tokens.unsqueeze(1)], asked.logprobs)


def test_logits_that_are_not_finite_are_told_by_nan() -> None:
    logits = torch.randn(2, VOCABULARY)
    logits[1, 5] = torch.nan
    for wish in ({"temperature": 0}, {"temperature": 1.0, "logprobs": 2}, {"presence_penalty": 1.0}):
        rows = read(choose(logits, [sequence(**wish), sequence(**wish)]), [wish.get("logprobs")] * 2)
        assert [math.isfinite(one.logprob) for one in rows] == [True, False]
        assert all(0 <= one.token_id < VOCABULARY for one in rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU")
def test_nothing_waits_for_a_gpu() -> None:
    wishes: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_p": 0.9, "top_k": 5, "logprobs": 3},
        {"logit_bias": {3: 1.0}, "min_tokens": 9, "presence_penalty": 1.0, "repetition_penalty": 1.5},
    ]
    seqs = [sequence(output=(3,), pending=2, **wish) for wish in wishes]
    logits, previous = torch.randn(3, VOCABULARY, device="cuda"), torch.tensor([1, 2, 3], device="cuda").int()
    choose(logits.bfloat16(), seqs, previous, [2, 1, 0])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = choose(logits.bfloat16(), seqs, previous, [2, 1, 0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = choose(logits.bfloat16().cpu(), seqs, previous.cpu(), [2, 1, 0])
    assert torch.equal(chosen.tokens.cpu(), on_host.tokens)
