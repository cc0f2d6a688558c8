"""A long text gives the tokens of the whole text, read piece by piece, in time and memory of the tokens wanted."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from niwaki.cli.demo import sapling
from niwaki.data import pieces
from niwaki.data.documents import Documents
from niwaki.data.pieces import token_pieces
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer

ODD = [
    "\n\n" + " " * 30,
    "庭木の木を切る。",
    "e\u0301",
    "9" * 40,
    "\r\n\t",
    "🙂👩‍👩‍👧",
    "<|endoftext|>",
    "naïve",
    "----",
]


def mixed_text(words: int) -> str:
    rng = random.Random(0)
    known = " ".join(topics.values()).split(" ")
    return " ".join(rng.choice(known if rng.random() < 0.8 else ODD) for _ in range(words))


def byte_level() -> Any:
    return load_tokenizer(sapling())


def sentence_pieces() -> Any:
    """Return BPE as in Llama 2: a space before the text, no words before the merges, bytes for unknown characters."""
    model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, max_token_length=12, show_progress=False)
    model.train_from_iterator([mixed_text(400)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model)


def unigram() -> Any:
    model = Tokenizer(models.Unigram())
    model.normalizer, model.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    model.train_from_iterator([mixed_text(1500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model)


def word_piece() -> Any:
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    model.train_from_iterator([mixed_text(1500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model)


TEXTS = {
    "mixed": lambda: mixed_text(3000),
    "digits": lambda: "words " + "1234567" * 1500 + " words",
    "spaces": lambda: "words" + " " * 7000 + "x" + "\n" * 7000 + "y words",
    "one letter": lambda: "a" * 9001,
    "no spaces": lambda: "庭木の" * 3000,
}


@pytest.mark.parametrize("make", [byte_level, sentence_pieces, unigram, word_piece])
def test_pieces_are_the_tokens_of_the_whole(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 1500)
    monkeypatch.setattr(pieces, "MARGIN_CHARS", 300)
    tokenizer = make()
    for name, text in TEXTS.items():
        whole = tokenizer(text(), add_special_tokens=False, verbose=False)["input_ids"]
        parts = [text()[first : first + 700] for first in range(0, len(text()), 700)]
        found = list(token_pieces(parts, tokenizer))
        assert [token for piece in found for token in piece] == whole, name
        assert len(found) > 5 or name != "mixed"


def test_a_short_text_is_tokenized_whole() -> None:
    calls = []

    class Counting:
        is_fast = True

        def __call__(self, text: str, **given: Any) -> dict[str, list[int]]:
            calls.append((text, given))
            return {"input_ids": [1]}

    assert list(token_pieces(["a", "b"], Counting())) == [[1]]
    assert calls == [("ab", {"add_special_tokens": False, "verbose": False})]


def test_only_what_is_wanted_of_a_long_text_is_read(tmp_path: Path) -> None:
    """Take 256 tokens of 2 MB and of 64 MB. The second must not take longer, up to a second of noise."""
    tokenizer, line = byte_level(), mixed_text(200) + "\n"
    text = line.replace("\r\n", "\n") * (2**21 // len(line))
    (tmp_path / "long.txt").write_text(text * 32, encoding="utf-8")
    size: dict[str, Any] = {"samples": 4, "seq_len": 64, "seed": 0, "bos": "off"}
    started = time.perf_counter()
    short = calibration_windows([text], tokenizer, **size)
    middle = time.perf_counter()
    assert (calibration_windows(Documents([str(tmp_path / "long.txt")]), tokenizer, **size) == short).all()
    assert time.perf_counter() - middle < 3 * (middle - started) + 1
    read: list[int] = []

    def parts() -> Iterator[str]:
        for number in range(1000):
            read.append(number)
            yield text[:100_000]

    next(token_pieces(parts(), tokenizer))
    assert len(read) < 4
    windows = evaluation_windows(Documents([str(tmp_path / "long.txt")]), tokenizer, seq_len=64, max_tokens=640)
    whole = tokenizer(text[:40_000], add_special_tokens=False)["input_ids"]
    assert windows.flatten().tolist() == whole[:640]
