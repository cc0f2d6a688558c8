"""Text comes whole: characters, stop strings, and names of tokens."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from niwaki.cli.demo import sapling
from niwaki.data.texts import load_tokenizer
from niwaki.serve.text import MAX_PENDING, Detokenizer, IncrementalDetokenizer, StopStrings, TokenNames
from support.models import write_sentencepiece

TEXT = "Die Gärtnerin sah 庭木 und 🌳🌳, naïve façade — そして終わり. \n\n  x"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(sapling())


def test_pieces_are_whole_characters_and_add_up(tokenizer: Any) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    words = Detokenizer(tokenizer)
    pieces = [words.feed(token) for token in ids]
    assert "".join(pieces) + words.flush() == TEXT
    assert "" in pieces, "no character had to be held back: this text tests nothing"
    assert not [piece for piece in pieces if "\ufffd" in piece]


def test_random_tokens_add_up_to_what_the_tokenizer_makes_of_all(tokenizer: Any) -> None:
    chosen = random.Random(0)
    for _ in range(20):
        ids = [chosen.randrange(1, 4096) for _ in range(40)]
        words = Detokenizer(tokenizer)
        text = "".join(words.feed(token) for token in ids) + words.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_half_a_character_at_the_end_is_shown_as_broken(tokenizer: Any) -> None:
    half = tokenizer.encode("庭", add_special_tokens=False)[0]
    words = Detokenizer(tokenizer)
    assert words.feed(half) == "" and words.flush() == "\ufffd"
    assert words.flush() == ""


def test_what_never_becomes_a_character_is_not_held_back_forever(tokenizer: Any) -> None:
    half = tokenizer.encode("庭", add_special_tokens=False)[0]
    words = Detokenizer(tokenizer)
    shown = [words.feed(half) for _ in range(MAX_PENDING)]
    assert not any(shown[:-1]) and set(shown[-1]) == {"\ufffd"}
    assert words.feed(tokenizer.encode("x", add_special_tokens=False)[0]) == "x"


def test_spaces_of_sentencepiece_stay_between_prompt_and_answer(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, 600)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tmp_path)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    ids = tokenizer.encode("the class the name 庭", add_special_tokens=False)
    words = Detokenizer(tokenizer, ids[:1])
    assert tokenizer.decode(ids[:1]) + "".join(words.feed(token) for token in ids[1:]) == "the class the name 庭"
    names = TokenNames(tokenizer)
    byte = tokenizer.convert_tokens_to_ids("<0xE5>")
    assert names.of(byte) == ("bytes:\\xe5", (0xE5,))
    assert names.of(tokenizer.encode("the name", add_special_tokens=False)[-1])[0].strip() != ""
    assert "".join(names.of(token)[0] for token in ids[:2]).startswith(" the")


def test_names_are_text_or_bytes(tokenizer: Any) -> None:
    names = TokenNames(tokenizer)
    ids = tokenizer.encode("a 庭", add_special_tokens=False)
    assert b"".join(bytes(names.of(token)[1] or ()) for token in ids).decode() == "a 庭"
    assert names.of(ids[0]) == ("a", (97,))
    assert names.of(ids[-1])[0].startswith("bytes:\\x")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_across_any_border(size: int) -> None:
    text = "one\n\nUser: two"
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    stops = StopStrings(["\n\nUser", "never"])
    shown, met = "", False
    for piece in pieces:
        part, met = stops.feed(piece)
        shown += part
        assert "\n" not in shown, "a part of the stop string was shown"
        if met:
            break
    assert met and shown == "one"


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    stops = StopStrings(["aab"])
    assert stops.feed("xaa") == ("x", False)
    assert stops.feed("a") == ("a", False), "the first a cannot begin it any more"
    assert stops.feed("b") == ("", True)
    stops = StopStrings(["aab"])
    assert stops.feed("xaa") == ("x", False) and stops.flush() == "aa"
    assert StopStrings(["b", "ab"]).feed("ab") == ("", True), "the earliest counts"


def test_a_stop_string_in_what_the_end_lets_go(tokenizer: Any) -> None:
    half = tokenizer.encode("庭", add_special_tokens=False)[0]
    spoken = IncrementalDetokenizer(tokenizer, [], ["\ufffd"])
    assert spoken.feed(half) == ("", False)
    assert spoken.flush() == ("", True)
