"""The vocabulary of a GGUF: tokens, kinds, merges, and a name for how text is cut that is found by behaviour."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import niwaki
from niwaki.errors import InputError
from niwaki.exporters.gguf_vocabulary import PRE_TOKENIZERS
from support.models import tiny_llama, tokenizer_like, write_sentencepiece


def fields(model: Path, dest: Path) -> dict[str, Any]:
    niwaki.export(model, dest, to="gguf")
    reader = gguf.GGUFReader(dest / "model.gguf")
    return {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.")
    }


def test_a_vocabulary_of_bytes(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", vocab_size=4100)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    found = fields(model, tmp_path / "dest")
    described = json.loads((model / "tokenizer.json").read_text())
    ids = described["model"]["vocab"]
    assert found["ggml.tokens"][:4096] == sorted(ids, key=ids.__getitem__)
    assert found["ggml.tokens"][4096:] == ["[PAD4096]", "[PAD4097]", "[PAD4098]", "[PAD4099]"]
    assert found["ggml.token_type"] == [TokenType.CONTROL] + [TokenType.NORMAL] * 4095 + [TokenType.UNUSED] * 4
    assert found["ggml.merges"] == [" ".join(merge) for merge in described["model"]["merges"]]
    assert found["ggml.model"] == "gpt2" and found["ggml.pre"] == "gpt-2" and "ggml.scores" not in found
    assert found["ggml.bos_token_id"] == found["ggml.eos_token_id"] == 0
    assert found["ggml.add_bos_token"] is False and found["ggml.add_eos_token"] is False
    assert found["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_name_is_found_by_behaviour(pre: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    tokenizer = tokenizer_like(pre)
    end = "<|endoftext|>"
    tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(model / "tokenizer.json"))
    found = fields(model, tmp_path / "dest")
    assert found["ggml.pre"] == pre and found["ggml.add_bos_token"] is True
    record = json.loads((tmp_path / "dest/niwaki/run.json").read_text())
    assert record["export"]["notes"] == [
        "the tokenizer composes characters (NFC), which llama.cpp does not: feed it composed text"
    ]


@pytest.mark.parametrize("of", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_a_vocabulary_of_characters(of: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", vocab_size=1000)
    write_sentencepiece(model, tokens=1000)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": of}))
    found = fields(model, tmp_path / "dest")
    assert found["ggml.model"] == "llama" and found["ggml.pre"] == "default" and "ggml.merges" not in found
    assert found["ggml.tokens"][:5] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    kinds = [TokenType.UNKNOWN] + [TokenType.CONTROL] * 2 + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * 741
    assert found["ggml.token_type"] == kinds
    assert found["ggml.add_bos_token"] is True and found["ggml.add_space_prefix"] is True
    assert merged_by_score(found, "a text with  words") == AutoTokenizer.from_pretrained(model).tokenize(
        "a text with  words"
    )


def merged_by_score(found: dict[str, Any], text: str) -> list[str]:
    """What llama.cpp does with these fields: the neighbours of the highest score are merged, the first on a tie."""
    score = dict(zip(found["ggml.tokens"], found["ggml.scores"], strict=True))
    pieces = list(("▁" if found["ggml.add_space_prefix"] else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(score[a + b], -at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in score]
        if not pairs:
            return pieces
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def with_split(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def with_lower_case(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def with_a_token_around(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 5)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_split, "cuts text into words in none of the ways niwaki has a llama.cpp name for (gpt-2, llama-bpe"),
        (with_lower_case, "cuts text into words in none of the ways"),
        (with_a_token_around, "GGUF can express a begin and an end token only"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(
    change: Callable[[Tokenizer], None], message: str, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model")
    tokenizer = tokenizer_like("gpt-2")
    change(tokenizer)
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(InputError) as error:
        niwaki.export(model, tmp_path / "dest", to="gguf")
    assert message in str(error.value) and not list(tmp_path.glob("dest*"))


def test_other_kinds_of_vocabularies_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", vocab_size=4000)
    with pytest.raises(InputError, match="has 4096 tokens and the model embeds 4000: they do not belong together"):
        niwaki.export(model, tmp_path / "dest", to="gguf")
    described = json.loads((model / "tokenizer.json").read_text())
    described["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}
    (model / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="is of type Unigram: niwaki writes GGUF vocabularies from plain BPE only"):
        niwaki.export(model, tmp_path / "dest", to="gguf")
