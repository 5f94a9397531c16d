"""Text streams: the fast one for byte-level tokenizers against the general one and against decoding the whole."""

import random
from pathlib import Path

import pytest

from aiolora.tokenizer import ByteStream, TextStream, Tokenizer, WindowStream
from tests.tiny import make_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of bytes and some merges, 3 special tokens before them."""
    return Tokenizer(make_model(tmp_path_factory.mktemp("bytes"), num_hidden_layers=1, vocab_size=320))


def both(tokenizer: Tokenizer, prompt: list[int], skip: bool) -> tuple[TextStream, TextStream]:
    fast = tokenizer.stream(prompt, skip_special=skip)
    assert isinstance(fast, ByteStream)
    return fast, WindowStream(tokenizer._fast, prompt, skip)


def whole(stream: TextStream, ids: list[int]) -> str:
    return "".join([*map(stream.push, ids), stream.flush()])


def test_both_streams_give_the_text_of_any_tokens(tokenizer: Tokenizer) -> None:
    chance = random.Random(1)
    prompt = tokenizer.encode("and the")
    for number in range(1000):
        if number % 2:
            ids = [chance.randrange(267) for _ in range(chance.randrange(1, 16))]
        else:
            ids = tokenizer.encode("".join(chance.choice("é😀日a \ufffd") for _ in range(6)))
        for skip in (True, False):
            fast, general = both(tokenizer, prompt, skip)
            expected = tokenizer.decode(ids, skip_special=skip)
            assert whole(fast, ids) == expected
            assert whole(general, ids) == expected


def test_characters_come_whole_with_their_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é日a")
    for stream in both(tokenizer, tokenizer.encode("x"), True):
        pieces = [stream.push(token) for token in ids]
        assert [piece for piece in pieces if piece] == ["é", "日", "a"]
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_the_prompt_began_is_shown_once_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab日c")
    for cut in range(1, len(ids)):
        for stream in both(tokenizer, ids[:cut], True):
            shown = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
            assert shown + whole(stream, ids[cut:]) == "ab日c"


def test_a_character_that_the_prompt_began_and_nobody_ended_is_the_prompts(tokenizer: Tokenizer) -> None:
    begun = tokenizer.encode("日")[:-1]
    for stream in both(tokenizer, begun, True):
        assert whole(stream, tokenizer.encode("ab")) == "ab"
    assert whole(tokenizer.stream(begun), []) == ""


def test_ids_that_the_tokenizer_does_not_know_are_no_text(tokenizer: Tokenizer) -> None:
    (a,) = tokenizer.encode("a")
    assert whole(tokenizer.stream([a]), [a, 319, a, 100_000]) == "aa"


def test_a_tokenizer_of_words_streams_by_its_own_decoder(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make_model(tmp_path, num_hidden_layers=1))
    ids = tokenizer.encode("w3 w4 w5")
    stream = tokenizer.stream(ids[:1])
    assert isinstance(stream, WindowStream)
    assert tokenizer.decode(ids[:1]) + whole(stream, ids[1:]) == tokenizer.decode(ids)


def test_a_template_beside_the_processor_is_the_models_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    make_model(tmp_path)
    file = tmp_path / "chat_template.json"
    for content, template in (('{"chat_template": "{{ messages }}"}', "{{ messages }}"), ("[", None), ("[]", None)):
        file.write_text(content)
        assert Tokenizer(tmp_path).chat_template == template
