"""Rows become documents, or are skipped and counted; a source without a usable row is refused in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from niwaki.cli.demo import sapling
from niwaki.data import documents as documents_module
from niwaki.data.documents import Documents, read_texts
from niwaki.data.text_files import JsonLines, draw
from niwaki.data.texts import load_tokenizer
from niwaki.errors import CalibrationError
from support.models import tiny_llama

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
BAD_ROWS = [
    b"null",
    b'{"text": null}',
    b'{"text": ["a", "list"]}',
    b'{"text": "\\ud83d half"}',
    b'{"text": "  "}',
    b'{"other": "field"}',
    b'"a text"',
    b'{"text": "\xff"}',
    b"[" * 100_000,
    b'{"text": "cut off',
]
REASONS = {
    "null": 1,
    "null in 'text'": 1,
    "a list in 'text'": 1,
    "half of a surrogate pair": 1,
    "empty": 1,
    "without the field 'text'": 1,
    "a text in place of an object": 1,
    "not UTF-8": 1,
    "not JSON": 2,
}


def texts_of(documents: Documents) -> list[str]:
    return [document.text for document in documents]


def warnings_of(documents: Documents) -> list[str]:
    told: list[str] = []
    documents.warn(lambda event, **fields: told.append(f"{event}: {fields['message']}"))
    return told


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = [b'{"text": "first"}', b'{"text": "an emoji \\ud83d\\ude42"}', b'{"text": "last"}']
    path.write_bytes(b"\n".join([good[0], *BAD_ROWS[:5], good[1], *BAD_ROWS[5:-1], good[2], BAD_ROWS[-1]]))
    documents = Documents([str(path)])
    assert texts_of(documents) == ["first", "an emoji \U0001f642", "last"]
    assert documents.skipped == {str(path): REASONS}
    (told,) = warnings_of(documents)
    assert told.startswith(f"warning: {path}: skipped 10 of 13 rows: 2 not JSON (first: line 11)")
    assert sorted(document.text for document in documents.shuffled(1)) == sorted(texts_of(documents))
    assert documents.skipped == {str(path): REASONS}


def test_good_files_warn_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    documents = Documents([str(path)])
    assert texts_of(documents) == ["a", "b"] and warnings_of(documents) == [] and documents.skipped == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "x", "body": "a long text"}, r"did you mean --field body\?"),
        ({"Text": "x", "id": "1"}, r"fields Text, id: did you mean --field Text\?"),
        ({"id": 1, "what_it_says": "long text", "tag": "t"}, r"did you mean --field what_it_says\?"),
        ({"id": 1}, r"1 without the field 'text' \(first: line 1\); the rows have the fields id$"),
        ([1], "is one JSON array: expected an object per line"),
        (None, 'expected objects such as {"text"'),
    ],
)
def test_a_source_without_a_usable_row_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    good = tmp_path / "good.txt"
    good.write_text("good")
    for read in (lambda: read_texts([str(path), str(good)]), lambda: list(Documents([str(path)]).shuffled(0))):
        with pytest.raises(CalibrationError, match=message):
            read()


def broken_parquet(path: Path) -> None:
    path.write_bytes(b"PAR1" + b"x" * 100)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("p.parquet", lambda p: p.write_text(POINTER), "is a Git LFS pointer"),
        ("p.jsonl", lambda p: p.write_text(POINTER), "is a Git LFS pointer"),
        ("p.txt", lambda p: p.write_text(POINTER), "is a Git LFS pointer"),
        ("p.parquet", broken_parquet, "is not a readable parquet file"),
        ("p.parquet", lambda p: p.write_bytes(b""), "is not a readable parquet file"),
        ("p.txt", lambda p: p.write_text("text", encoding="utf-16"), "is UTF-16, not UTF-8"),
        ("p.jsonl", lambda p: p.write_text('{"text": "x"}', encoding="utf-16-le"), "is UTF-16 or binary"),
        ("p.txt", lambda p: p.write_bytes(b"\x1f\x8b\x08\x00text"), r"is compressed \(gzip\)"),
        ("p.txt", lambda p: p.write_bytes(b"ok " * 200_000 + b"\xff"), r"is not UTF-8 \(byte 600000\)"),
        ("p.jsonl", lambda p: p.write_text('[\n{"text": "x"}\n]'), "is one JSON array"),
    ],
)
def test_unreadable_files_get_one_line(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(CalibrationError, match=message) as refused:
        read_texts([str(tmp_path / name)])
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_with_a_pointer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text(POINTER)
    with pytest.raises(CalibrationError, match=r"train\.parquet is a Git LFS pointer"):
        read_texts([str(tmp_path)])


def test_marks_and_ends_of_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_texts([str(tmp_path / "a.txt")]) == ["one\ntwo\nthree\n"]
    assert read_texts([str(tmp_path / "a.jsonl")]) == ["one", "two"]


def test_parts_of_a_long_text_are_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("niwaki.data.text_files.PART_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_bytes("naïve 庭木\r\n🙂🙂\r\n\r\nend\r".encode() * 5)
    documents = list(Documents([str(path)]))
    assert len(list(documents[0].parts)) > 10
    assert documents[0].text == path.read_text(encoding="utf-8")


def test_rows_of_parquet_that_cannot_be_used_are_skipped(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    binary = pyarrow.array([b"good", b"\xff\xfe", None, b""])
    texts = binary.view("string")  # without a check that it is UTF-8
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": [1, 2, 3, 4]}), path)
    documents = Documents([str(path)])
    assert texts_of(documents) == ["good"]
    assert documents.skipped[str(path)] == {"not UTF-8": 1, "null in 'text'": 1, "empty": 1}
    with pytest.raises(
        CalibrationError, match=r"a number in 'id'.*the rows have the fields text, id: did you mean --f"
    ):
        read_texts([str(path)], field="id")
    with pytest.raises(CalibrationError, match=r"has no column 'txt'.*did you mean --field text\?"):
        read_texts([str(path)], field="txt")


def test_a_broken_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    texts = [f"{number} " + os.urandom(40).hex() for number in range(30)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=10, use_dictionary=False, compression="gzip")
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset + 40
    content[start : start + 200] = b"\0" * 200
    path.write_bytes(content)
    documents = Documents([str(path)])
    assert texts_of(documents) == texts[:10] + texts[20:]
    (reason,) = documents.skipped[str(path)]
    assert reason.startswith("unreadable") and documents.skipped[str(path)][reason] == 10


def dialogue_model(folder: Path, template: str) -> Any:
    tiny_llama(folder, blocks=1)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(folder)


TEMPLATE = (
    "{{ eos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [("user", "Hi"), ("assistant", "Yes?")]
SHAPES: list[dict[str, Any]] = [
    {"messages": [{"role": role, "content": content} for role, content in TURNS]},
    {"text": None, "messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ["Ye", "s?"]}]},
]


def test_dialogues_are_written_by_the_template_of_the_model(tmp_path: Path) -> None:
    tokenizer = dialogue_model(tmp_path / "model", TEMPLATE)
    path = tmp_path / "d.jsonl"
    bad: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": " "}]},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        {"messages": ["user"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*bad, *SHAPES, {"text": "plain"}]))
    documents = Documents([str(path)], tokenizer=tokenizer)
    *dialogues, plain = list(documents)
    plain_text = tokenizer("<user>Hi<assistant>Yes?", add_special_tokens=False)["input_ids"]
    for dialogue in dialogues:
        (ids,) = dialogue.tokens(tokenizer)
        assert list(ids) == [tokenizer.eos_token_id, *plain_text]
    assert len(dialogues) == 4 and plain.text == "plain"
    skipped = documents.skipped[str(path)]
    assert sum(skipped.values()) == len(bad)
    assert skipped["the chat template cannot render this dialogue: no system"] == 1
    assert len(list(documents.shuffled(0))) == 5


def test_control_tokens_in_a_message_are_plain_text(tmp_path: Path) -> None:
    tokenizer = dialogue_model(tmp_path / "model", TEMPLATE)
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": f"a{tokenizer.eos_token}b"}]}))
    (document,) = Documents([str(path)], tokenizer=tokenizer)
    (ids,) = document.tokens(tokenizer)
    assert list(ids).count(tokenizer.eos_token_id) == 1


def test_dialogues_without_a_template_are_refused_with_a_next_step(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(SHAPES[0]) + "\n")
    with pytest.raises(CalibrationError, match=r"the model has no chat template.*take an instruct model"):
        list(Documents([str(path)], tokenizer=load_tokenizer(sapling())))
    path.write_text(json.dumps(SHAPES[0]) + '\n{"text": "plain"}\n')
    documents = Documents([str(path)], tokenizer=load_tokenizer(sapling()))
    assert texts_of(documents) == ["plain"]
    assert documents.skipped[str(path)] == {"a dialogue, and the model has no chat template": 1}


def test_a_template_that_never_ends_stops_the_reading(tmp_path: Path) -> None:
    loop = "{% if messages %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    tokenizer = dialogue_model(tmp_path / "model", loop)
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(SHAPES[0]) + "\n" for _ in range(50)))
    with pytest.raises(CalibrationError, match="exceeded its limits on 4 dialogues in a row"):
        list(Documents([str(path)], tokenizer=tokenizer))


def test_dialogues_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    tokenizer = dialogue_model(tmp_path / "model", TEMPLATE)
    table = pyarrow.Table.from_pylist([{"id": 1, **SHAPES[0]}, {"id": 2, "messages": None}])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    documents = Documents([str(tmp_path / "d.parquet")], tokenizer=tokenizer)
    assert len(list(documents)) == 1 and sum(documents.skipped[documents.names[0]].values()) == 1


@pytest.mark.parametrize("rows", [1, 2, 50, 400])
def test_a_large_file_is_read_in_a_random_order_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(documents_module, "SHUFFLED_BYTES", 0)
    path = tmp_path / "d.jsonl"
    texts = [f"{number} " + "x" * (number * 7919 % 9000) for number in range(rows)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = [document.text for document in Documents([str(path)]).shuffled(3)]
    assert sorted(found) == sorted(texts)
    assert found == [document.text for document in Documents([str(path)]).shuffled(3)]
    if rows == 400:
        assert found != [document.text for document in Documents([str(path)]).shuffled(4)]
        near = sum(abs(int(a.split()[0]) - int(b.split()[0])) < 3 for a, b in pairwise(found))
        assert near < 100, "neighbours of the file are rarely neighbours of the order"


def test_large_sources_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "SHUFFLED_BYTES", 100)
    names = []
    for name, count in (("a", 40), ("b", 400)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name}{number}"}) + "\n" for number in range(count)))
        names.append(str(path))
    (tmp_path / "c.txt").write_text("c")
    found = [document.text[0] for document in Documents([*names, str(tmp_path / "c.txt")]).shuffled(0)]
    assert found[:5] == ["c", "a", "b", "a", "b"] and len(found) == 441


def test_large_parquet_reads_its_row_groups_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(documents_module, "SHUFFLED_BYTES", 0)
    monkeypatch.setattr("niwaki.data.text_files.TURN_CHARS", 1000)
    texts = [f"{number} " + "x" * 500 for number in range(100)]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10)
    found = [document.text for document in Documents([str(path)]).shuffled(0)]
    groups = [int(text.split()[0]) // 10 for text in found]
    assert sorted(found) == sorted(texts)
    assert len(set(groups[:20])) == 10, "every row group had a turn"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_memory_goes_with_the_rows_that_are_read(tmp_path: Path, suffix: str) -> None:
    """Read some rows of a file of 100 MB. The peak of a fresh process must not grow by a third of it."""
    path, line = tmp_path / f"d.{suffix}", "some words of a text " * 100
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        with pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("text", "string")]), use_dictionary=False,
                                           compression="none") as writer:  # fmt: skip
            for _ in range(10):
                writer.write_table(pyarrow.table({"text": [line] * 5000}))
    else:
        row = json.dumps({"text": line}) if suffix == "jsonl" else line
        path.write_text(f"{row}\n" * 50_000)
    assert path.stat().st_size > 90e6
    program = (
        "import sys, resource, itertools\n"
        "from niwaki.data.documents import Documents\n"
        "if sys.argv[1].endswith('parquet'):\n    import pyarrow.parquet\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for document in itertools.islice(Documents([sys.argv[1]]).shuffled(0), 100):\n    next(iter(document.parts))\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 33e6


def test_draw_is_a_permutation() -> None:
    for count in (0, 1, 2, 17, 100):
        assert sorted(draw(count, 5)) == list(range(count))
    assert list(draw(100, 1)) != list(draw(100, 2))


def test_a_line_longer_than_blocks_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    texts = ["x" * 20_000, "short", "y" * 4096 * 3]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for seed in range(4):
        assert sorted(row["text"] for _, row in JsonLines(path).shuffled(seed)) == sorted(texts)
