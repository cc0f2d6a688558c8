"""Bad rows and dialogues through the whole: compress, evaluate and compare count, record and render them."""

import json
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.data.texts import load_tokenizer, read_evaluation
from niwaki.errors import CalibrationError, CheckpointError
from niwaki.measure.compare.inputs import read_prompts
from niwaki.measure.evaluate.tasks import read_items
from niwaki.measure.schema import ComparisonSettings
from niwaki.model.checkpoint import Checkpoint
from support.models import tiny_llama
from support.servers import chat_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
GOOD = '{"pairs": [["a", " b"], ["a", " c"]], "gold": 0}'


def rows_of(path: Path, count: int) -> Path:
    talks = [
        {"messages": [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": "Hm. " * 9}]}
        for number in range(count)
    ]
    lines = [json.dumps(talk) for talk in talks]
    path.write_text("\n".join(["null", *lines[: count // 2], '{"text": "\\ud83d"}', *lines[count // 2 :], '{"cut']))
    return path


def test_bad_rows_and_dialogues_go_all_the_way(tmp_path: Path) -> None:
    model, data = chat_model(tmp_path / "model"), rows_of(tmp_path / "d.jsonl", 20)
    told: list[str] = []

    def report(event: str, **fields: Any) -> None:
        told.extend([fields["message"]] if event == "warning" else [])

    calibration = {"files": [str(data)], "samples": 2, "seq_len": 64}
    record = niwaki.compress(
        model, tmp_path / "out", method="wanda", target="0.5", calibration=calibration, report=report
    )
    counts = {"null": 1, "half of a surrogate pair": 1, "not JSON": 1}
    assert record["calibration"]["skipped"] == {str(data): counts}
    assert any("skipped 3 of 23 rows" in line for line in told)
    told.clear()
    result = niwaki.evaluate(tmp_path / "out", data=data, seq_len=64, report=report)
    assert result["skipped"] == {str(data): counts} and len(told) == 1
    comparison = niwaki.compare(model, tmp_path / "out", data=data, seq_len=64, rounds=0)
    assert comparison.candidates[0].data[0].skipped == counts
    tokenizer = load_tokenizer(model)
    read = read_evaluation([str(data)], "text", tokenizer, seq_len=64, max_tokens=64, bos="off", report=report)
    shown = tokenizer.decode(read.ids_ST[0])
    assert shown.startswith("<|user|>Question 0?\n<|assistant|>Hm. Hm.") and "<|user|>Question 1?" in shown
    assert tokenizer.eos_token_id in read.ids_ST[0] and result["tokens"][str(data)] >= 64


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_of_pointers_is_refused_by_name(tmp_path: Path, name: str) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1)
    (model / name).write_text(POINTER)
    open_it = load_tokenizer if name == "tokenizer.json" else Checkpoint.open
    with pytest.raises((CheckpointError, CalibrationError), match=f"{name} is a Git LFS pointer.*git lfs pull"):
        open_it(model)


def test_a_cut_tokenizer_is_one_line(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1)
    (model / "tokenizer.json").write_text('{"version": "1.0", "cut')
    with pytest.raises(CalibrationError, match="no usable tokenizer in"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{GOOD}\nnull\n", r'q\.jsonl:2: expected {"pairs"'),
        (GOOD + '\n{"pairs": [["a", null], ["a", "b"]], "gold": 0}\n', r"q\.jsonl:2: expected"),
        (GOOD + '\n{"pairs": [["a\\ud83d", "x"], ["a", "b"]], "gold": 0}\n', r"q\.jsonl:2: half of a surrogate pair"),
        (f"{GOOD}\n{GOOD[:-9]}", r"q\.jsonl:2: expected"),
        (POINTER, r"q\.jsonl is a Git LFS pointer"),
        ("\n", "holds no questions"),
    ],
)
def test_a_bad_question_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read_items(str(path), None)


def test_marks_and_ends_of_lines_of_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode())
    assert len(read_items(str(path), None)) == 2
    path.write_bytes(GOOD.encode() + b'\n{"pairs": "\xff"}')
    with pytest.raises(CalibrationError, match=r"q\.jsonl:2: not UTF-8"):
        read_items(str(path), None)
    assert len(read_items(str(path), 1)) == 1, "a line that is not wanted is not read"


def test_prompts_are_read_as_texts_are(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama(tmp_path / "model", blocks=1))

    def read(name: str, content: bytes) -> list[list[int]]:
        (tmp_path / name).write_bytes(content)
        settings = ComparisonSettings.model_construct(prompts=str(tmp_path / name), new_tokens=1, bos="off")
        return read_prompts(settings, tokenizer, [])

    plain = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert read("p.txt", b"\xef\xbb\xbfhello\r\n") == [plain]
    with pytest.raises(CalibrationError, match=r"p\.jsonl:1: half of a surrogate pair"):
        read("p.jsonl", b'{"prompt": "\\ud83d"}')
    with pytest.raises(CalibrationError, match=r"p\.txt is a Git LFS pointer"):
        read("p.txt", POINTER.encode())
