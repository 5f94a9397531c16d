"""`aiolora generate --input`: a line of JSON in, a line out, in order, failures among them."""

import io
import json
from pathlib import Path

import pytest

from aiolora.cli import main
from tests.tiny import make_adapter


def run(byte_model: Path, lines: list[object], folder: Path, *more: str) -> tuple[int, list[dict[str, object]]]:
    given, out = folder / "in.jsonl", folder / "out.jsonl"
    given.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    common = [str(byte_model), "--dtype", "float32", "--max-tokens", "5"]
    status = main(["generate", *common, "--input", str(given), "--output", str(out), *more])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


def test_answers_come_in_the_order_of_their_lines(byte_model: Path, tmp_path: Path) -> None:
    lines = [{"id": number, "prompt": [20 + number] * 4, "max_tokens": 30 - number} for number in range(20)]
    status, answers = run(byte_model, list(lines), tmp_path)
    assert status == 0
    assert [answer["id"] for answer in answers] == list(range(20))
    assert [answer["line"] for answer in answers] == list(range(1, 21))
    assert all(answer["prompt_tokens"] == 4 and "text" in answer for answer in answers)


def test_a_line_may_name_its_adapter_and_be_a_conversation(talking_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(talking_model, tmp_path / "a", strength=4.0)
    lines = [
        {"prompt": "hello", "lora": "a"},
        {"prompt": "hello"},
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    ]
    status, answers = run(talking_model, list(lines), tmp_path, "--lora-modules", f"a={adapter}")
    assert status == 0
    assert str(answers[0]["adapter"]).startswith("a@")
    assert "adapter" not in answers[1]
    assert answers[0]["text"] != answers[1]["text"]
    assert answers[2]["generated_tokens"] <= 2  # type: ignore[operator]


def test_a_line_that_fails_is_an_error_and_the_others_are_answered(byte_model: Path, tmp_path: Path) -> None:
    status, answers = run(byte_model, [{"prompt": []}, {"prompt": "x"}, {"prompt": "x", "temperature": -1}], tmp_path)
    assert status == 1
    assert "empty" in str(answers[0]["error"])
    assert "text" in answers[1]
    assert "temperature" in str(answers[2]["error"])


@pytest.mark.parametrize(
    "text", ["{", '{"prompt": 1}', "{}", '{"prompt": "x", "promptt": 1}', '{"prompt": "x", "messages": []}']
)
def test_a_line_that_is_no_request_is_named_before_anything_is_loaded(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "good"}\n' + text + "\n"))
    assert main(["generate", "/no/such/model", "--input", "-"]) == 1
    assert "stdin, line 2" in capsys.readouterr().err


def test_what_is_asked_goes_one_way_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "x", "--input", "-"]) == 1
    assert "--prompt and --input" in capsys.readouterr().err
    assert main(["generate", "m", "--input", "/nowhere.jsonl"]) == 1
    assert "/nowhere.jsonl" in capsys.readouterr().err
