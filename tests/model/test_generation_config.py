"""generation_config.json with odd values: refused with one line by every reader, or generated with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.errors import CheckpointError, NiwakiError
from niwaki.model.checkpoint import Checkpoint
from support.models import tiny_llama

NAME = "generation_config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("generation") / "model", blocks=1)


def with_field(folder: Path, target: Path, text: str) -> Path:
    shutil.copytree(folder, target)
    (target / NAME).write_text(text)
    return target


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("eos_token_id", "x", "a token id, or a list of them"),
        ("eos_token_id", 10**30, "a token id"),
        ("eos_token_id", [[]], "a token id"),
        ("pad_token_id", True, "a token id"),
        ("suppress_tokens", ["a"], "a token id"),
        ("num_beams", 10**9, "a whole number from 1 to 1,024"),
        ("num_return_sequences", 10**6, "a whole number"),
        ("top_k", "a", "a whole number"),
        ("max_new_tokens", 0, "a whole number from 1"),
        ("temperature", float("nan"), "a number from 0"),
        ("temperature", "x", "a number from 0"),
        ("top_p", 7, "a number from 0 to 1"),
        ("do_sample", "yes", "true or false"),
        ("custom_generate", "../code", "null, for niwaki generates without it"),
        ("stop_strings", ["a"], "null"),
    ],
)
def test_a_value_that_no_generation_can_use_is_named(
    folder: Path, tmp_path: Path, field: str, value: Any, expected: str
) -> None:
    target = with_field(folder, tmp_path / "m", json.dumps({field: value}))
    with pytest.raises(CheckpointError, match=rf"{NAME}: {field} is .*: expected {expected}") as caught:
        Checkpoint.open(target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "", '"x"', "[" * 5000])
def test_a_file_that_is_no_object_is_named(folder: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=NAME) as caught:
        Checkpoint.open(with_field(folder, tmp_path / "m", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": [1, 2], "temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_length": 4096},
        {"eos_token_id": None, "pad_token_id": -1, "unknown": {"a": [1]}, "num_beams": 2},
        {"watermarking_config": 3},
        {"cache_implementation": "nope"},
        {"bad_words_ids": 7},
        {"sequence_bias": None, "repetition_penalty": 0},
        {"begin_suppress_tokens": [10**9], "min_length": 10**8},
    ],
)
def test_other_values_generate_or_are_one_line(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    target = with_field(folder, tmp_path / "m", json.dumps(fields))
    Checkpoint.open(target)
    try:
        assert niwaki.generate(target, "some text", max_new_tokens=2, device="cpu")
    except NiwakiError as error:
        assert str(target) in str(error) and "\n" not in str(error)
