"""The vocabulary of a checkpoint as GGUF holds it.

Two kinds, both byte-pair encodings from tokenizer.json: on bytes (`gpt2` in GGUF), where llama.cpp knows how to cut a
text into words only by the *name* of a pre-tokenizer, and on characters with bytes to fall back on (`llama`, what
SentencePiece trains). The name is found by behaviour: `PRE_TOKENIZERS` says how llama.cpp cuts under each name, and
the one that cuts a set of awkward texts as the checkpoint's own tokenizer does is taken. No name, no file. llama.cpp
composes no characters (NFC) first; a tokenizer that does gets a note.

`gguf.SpecialVocab` reads merges, special tokens and the chat template. Its `BpeVocab` and `LlamaHfVocab` are not used:
one marks a special token of the base vocabulary as an ordinary one, the other gives all tokens one score, and
llama.cpp merges by score.

    vocabulary = read_vocabulary(Path("MODEL"), rows=32000)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from tokenizers import Regex, pre_tokenizers

from niwaki.data.texts import load_tokenizer
from niwaki.errors import InputError
from niwaki.model.hf import only_errors

SPACE = "▁"  # what stands for a space in vocabularies of SentencePiece
COMPOSES = "the tokenizer composes characters (NFC), which llama.cpp does not: feed it composed text"
SAMPLES = (
    "It's, I'LL; they'd say we'VE 'tis — l'été d'Été.",
    "x = [1, 22, 333, 4444, 55555]; y=3.14159e-10 1234567 v2.0 ４５６ ²³",
    "  two  spaces,\ttabs\t\tand   trails   \n\n\n  new\r\nlines \n \n x\n",
    "naïve CamelCase HTTPServer snake_case kebab-case (a){b}[c] <tag/> ## !!! ...?! $€£ ~`^|\\",
    "日本語のテキスト、漢字とカナ。 Привет, мир! مرحبا 안녕하세요 नमस्ते",
    "🙂👩‍👩‍👧 é \u00a0nbsp \u2003em\u200bzero",
)


def _cut(pattern: str) -> Any:
    """Cuts along a pattern; every match and what lies between matches is a word."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _letters_and_digits(digits: str) -> str:
    """Contractions in either case, letters with one mark before them, digits, marks, lines, spaces."""
    return "|".join(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            digits,
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )


_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# Name in llama.cpp → whether a word that is a token needs no merges there, and how words are cut.
PRE_TOKENIZERS: Mapping[str, tuple[bool, Any]] = {
    "gpt-2": (False, _WORDS),
    "llama-bpe": (True, _cut(_letters_and_digits(r"\p{N}{1,3}"))),
    "smaug-bpe": (False, _cut(_letters_and_digits(r"\p{N}{1,3}"))),
    "qwen2": (False, _cut(_letters_and_digits(r"\p{N}"))),
    "smollm": (False, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])),
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how text becomes tokens."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float]
    special: gguf.SpecialVocab
    space_first: bool
    notes: tuple[str, ...]

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Puts everything in the header of a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_first)
        self.special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary in `folder` for embeddings of `rows` tokens. Raises InputError for one that GGUF cannot say."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json, which a GGUF's vocabulary is written from: put it there")
    described = json.loads(path.read_text(encoding="utf-8"))
    model = described["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise InputError(f"{path} is of type {model['type']}: GGUF vocabularies are written from plain BPE alone")
    tokenizer = load_tokenizer(folder)
    characters = bool(model.get("byte_fallback"))
    added = {token["id"]: token for token in described["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    if max(texts) >= rows:
        raise InputError(f"{path} has {max(texts) + 1} tokens and the model embeds {rows}: they do not belong together")
    with only_errors("gguf.vocab"):  # it guesses what stands before and after a text; below that is observed
        special = gguf.SpecialVocab(folder, load_merges=not characters, n_vocab=rows)
    special.add_special_token = _ends(tokenizer)
    return Vocabulary(
        model="llama" if characters else "gpt2",
        pre="default" if characters else _pre_tokenizer(path, tokenizer, bool(model.get("ignore_merges"))),
        tokens=[texts.get(index, f"[PAD{index}]") for index in range(rows)],
        types=[_type(index, texts, added, model) for index in range(rows)],
        scores=_scores(model, rows) if characters else [],
        special=special,
        space_first=characters and _space_first(path, tokenizer),
        notes=(COMPOSES,) if _normal(tokenizer.backend_tokenizer, "e\u0301") == "é" else (),
    )


def _type(index: int, texts: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any]) -> TokenType:
    if index not in texts:
        return TokenType.UNUSED
    if model.get("byte_fallback"):
        if texts[index] == model.get("unk_token"):
            return TokenType.UNKNOWN
        if len(texts[index]) == 6 and texts[index].startswith("<0x"):
            return TokenType.BYTE
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    return TokenType.NORMAL


def _scores(model: Mapping[str, Any], rows: int) -> list[float]:
    """Minus the place of the first merge that makes a token: llama.cpp merges the pair of the highest score."""
    scores = [0.0] * rows
    made = set()
    for place, merge in enumerate(model["merges"]):
        token = model["vocab"]["".join(merge.split(" ") if isinstance(merge, str) else merge)]
        if token not in made:
            made.add(token)
            scores[token] = -float(place)
    return scores


def _ends(tokenizer: Any) -> dict[str, bool]:
    """Whether text gets a token before and after it. Raises InputError for other tokens than begin and end."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos == full:
                return {"bos": bos, "eos": eos}
    raise InputError(f"the tokenizer makes {full} of {bare}: GGUF can say a begin and an end token, nothing else")


def _pre_tokenizer(path: Path, tokenizer: Any, ignore_merges: bool) -> str:
    """The name under which llama.cpp cuts the samples as this tokenizer does."""
    backend = tokenizer.backend_tokenizer
    for name, (merged_first, reference) in PRE_TOKENIZERS.items():
        same = backend.pre_tokenizer is not None and ignore_merges == merged_first
        if same and all(_cuts(backend, text) == reference.pre_tokenize_str(text) for text in SAMPLES):
            return name
    raise InputError(
        f"{path} cuts text into words in none of the ways niwaki has a llama.cpp name for "
        f"({', '.join(PRE_TOKENIZERS)}): convert it with llama.cpp's own convert_hf_to_gguf.py"
    )


def _normal(backend: Any, text: str) -> str:
    return str(backend.normalizer.normalize_str(text)) if backend.normalizer else text


def _cuts(backend: Any, text: str) -> Any:
    """The words of a text and where they lie."""
    return backend.pre_tokenizer.pre_tokenize_str(_normal(backend, text))


def _space_first(path: Path, tokenizer: Any) -> bool:
    """Whether a space is put before a text. Raises InputError if anything else is done to it."""
    backend = tokenizer.backend_tokenizer
    before = set()
    for text in (text for text in SAMPLES if not text.startswith(" ")):
        normal = _normal(backend, text)
        words = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer else [(normal, None)]
        plain, found = text.replace(" ", SPACE), "".join(word for word, _ in words)
        before.add(found.removesuffix(plain) if found.endswith(plain) and len(words) == 1 else None)
    if before == {SPACE}:
        return True
    if before == {""}:
        return False
    raise InputError(f"{path} changes text before it looks for tokens, which a GGUF of this kind cannot say")
