"""Texts become the windows that the protocol prescribes, or one clear error."""

import json
from pathlib import Path

import pytest
import torch

from niwaki.cli.demo import sapling
from niwaki.data.documents import Documents, read_texts
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer, owned_windows, sampled_windows
from niwaki.errors import CalibrationError
from support.models import tiny_llama, write_texts


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(sapling())


def test_evaluation_windows_are_the_concatenated_documents(tokenizer: object) -> None:
    texts = ["one two three", "four five six seven"]
    stream = []
    for text in texts:
        stream += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]  # type: ignore[operator,attr-defined]
    windows = evaluation_windows(texts, tokenizer, seq_len=3)
    assert windows.flatten().tolist() == stream[: len(stream) // 3 * 3]
    assert evaluation_windows(texts, tokenizer, seq_len=3, max_tokens=7).shape == (2, 3)


def test_calibration_is_shuffled_by_seed_and_reproducible(tokenizer: object) -> None:
    texts = [f"document number {i} says hello" for i in range(40)]

    def windows(seed: int) -> torch.Tensor:
        return calibration_windows(texts, tokenizer, samples=4, seq_len=16, seed=seed)

    assert torch.equal(windows(0), windows(0))
    assert not torch.equal(windows(0), windows(1))


def test_too_little_text_says_how_much_is_missing(tokenizer: object) -> None:
    with pytest.raises(CalibrationError, match=r"64 windows × 512 need 32,768: add text"):
        calibration_windows(["short"], tokenizer, samples=64, seq_len=512, seed=0)
    with pytest.raises(CalibrationError, match="one window needs 512"):
        evaluation_windows(["short"], tokenizer, seq_len=512)


def test_all_formats_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    documents = ["first", "second\nline"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    for number, text in enumerate(documents):
        (tmp_path / f"{number}.txt").write_text(text)
    assert read_texts([str(tmp_path / "a.jsonl")]) == documents
    assert read_texts([str(tmp_path / "a.parquet")]) == documents
    assert read_texts([str(tmp_path / "0.txt"), str(tmp_path / "1.txt")]) == documents


def test_a_folder_loads_as_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "hello"}\n{"body": "there"}\n')
    assert read_texts([str(folder)], field="body") == ["hello", "there"]


def test_wrong_files_get_one_line(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("naïve".encode("latin-1"))
    blank = tmp_path / "blank.txt"
    blank.write_text("  \n\n")
    for path, message in [
        (latin, r"is not UTF-8 \(byte 2\)"),
        (blank, "no text in"),
        (tmp_path / "gone.txt", "no such text file"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            read_texts([str(path)])


def test_model_without_tokenizer(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CalibrationError, match="no usable tokenizer"):
        load_tokenizer(folder)


def test_sampled_text_has_the_shape_asked_for_and_follows_the_seed(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", blocks=1)

    def windows(seed: int) -> torch.Tensor:
        return sampled_windows(folder, samples=3, seq_len=12, seed=seed, device="cpu")

    assert windows(0).shape == (3, 12)
    assert torch.equal(windows(0), windows(0))
    assert not torch.equal(windows(0), windows(1))


def test_demo_texts_are_disjoint(tmp_path: Path) -> None:
    from niwaki.cli.demo import demo_texts

    calibration, evaluation = demo_texts()
    assert calibration and evaluation
    assert not set(calibration) & set(evaluation)
    assert write_texts(tmp_path / "t.jsonl").exists()


def test_what_cannot_be_text_is_refused_without_looking_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(datasets, "load_dataset", fetched)
    readme = tmp_path / "README.md"
    readme.write_text("hello")
    for source, message in [
        (str(readme), "is not a text file: expected .txt, .jsonl, .parquet"),
        (str(tmp_path / "gone.md"), "no such text file"),
        ("./gone", "no such text file"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            read_texts([source])


def test_suffixes_may_be_upper_case(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("hello")
    assert read_texts([str(tmp_path / "A.TXT")]) == ["hello"]


def test_sampling_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))
    folder = tiny_llama(tmp_path / "model", blocks=1)
    events = []

    def report(event: str, **fields: object) -> None:
        events.append((event, fields))

    sampled_windows(folder, samples=18, seq_len=40, seed=0, device="cpu", report=report)
    event, fields = events[0]
    assert event == "warning" and "writes 32 windows of 40 tokens itself" in str(fields["message"])
    assert [(event, fields["done"], fields["of"]) for event, fields in events[1:]] == [
        ("sample", 32 * 32, 32 * 40),
        ("sample", 32 * 40, 32 * 40),
    ]


def test_documents_keep_their_domain_and_tokens_their_document(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.jsonl"
    rows = [{"text": "one two", "domain": "a"}, {"text": " "}, {"text": "three", "domain": 7}, {"text": "four five"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = list(Documents([str(path)]))
    assert [(document.text, document.domain) for document in documents] == [
        ("one two", "a"), ("three", "7"), ("four five", None)
    ]  # fmt: skip
    table = pyarrow.table({"text": ["a", "b"], "domain": ["x", None], "more": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    found = list(Documents([str(tmp_path / "d.parquet")]))
    assert [(document.text, document.domain) for document in found] == [("a", "x"), ("b", None)]
    tokenizer = load_tokenizer(sapling())
    texts = read_texts([str(path)])
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts]
    ids_ST, owners_ST = owned_windows(texts, tokenizer, seq_len=2)
    assert torch.equal(ids_ST, evaluation_windows(texts, tokenizer, seq_len=2))
    wanted = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert owners_ST.flatten().tolist() == wanted[: ids_ST.numel()]
