"""Vocabulary of a checkpoint in GGUF.

Both kinds are byte-pair encodings from tokenizer.json. The first works on bytes (`gpt2` in GGUF), and llama.cpp finds
its word splitter only by the *name* of a pre-tokenizer. The second works on characters with a byte fallback (`llama`,
as SentencePiece trains it). The name is found by behaviour: `PRE_TOKENIZERS` holds the splitter of llama.cpp for each
name. The name whose splitter cuts a set of awkward texts as the tokenizer of the checkpoint does is taken. Without such
a name no file is written. llama.cpp does not compose characters (NFC) first, so a tokenizer that does gets a note.

`gguf.SpecialVocab` reads merges, special tokens and the chat template. Its `BpeVocab` and `LlamaHfVocab` are not used.
The one marks a special token of the base vocabulary as ordinary. The other gives all tokens one score, and llama.cpp
merges by score.

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

SPACE = "▁"  # the space in vocabularies of SentencePiece
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
    """Make a splitter along a pattern. Each match is a word, and so is the text between matches."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _letters_and_digits(digits: str) -> str:
    """Return the pattern of contractions in either case, letters with one mark, digits, marks, lines and spaces."""
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
# Name in llama.cpp → True if a word that is a token needs no merges there, and the word splitter.
PRE_TOKENIZERS: Mapping[str, tuple[bool, Any]] = {
    "gpt-2": (False, _WORDS),
    "llama-bpe": (True, _cut(_letters_and_digits(r"\p{N}{1,3}"))),
    "smaug-bpe": (False, _cut(_letters_and_digits(r"\p{N}{1,3}"))),
    "qwen2": (False, _cut(_letters_and_digits(r"\p{N}"))),
    "smollm": (False, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])),
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and the rules that turn text into tokens."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float]
    special: gguf.SpecialVocab
    space_first: bool
    notes: tuple[str, ...]

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write the vocabulary to the header of a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_first)
        self.special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read the vocabulary in `folder` for embeddings of `rows` tokens. Raises InputError if GGUF cannot hold it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json, from which the vocabulary of a GGUF is written: copy it there"
        )
    described = json.loads(path.read_text(encoding="utf-8"))
    model = described["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise InputError(f"{path} is of type {model['type']}: niwaki writes GGUF vocabularies from plain BPE only")
    tokenizer = load_tokenizer(folder)
    characters = bool(model.get("byte_fallback"))
    added = {token["id"]: token for token in described["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    if max(texts) >= rows:
        raise InputError(f"{path} has {max(texts) + 1} tokens and the model embeds {rows}: they do not belong together")
    with only_errors("gguf.vocab"):  # it guesses begin and end tokens, which are observed below
        special = gguf.SpecialVocab(folder, load_merges=not characters, n_vocab=rows)
    special.add_special_token = _added_ends(tokenizer)
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
    """Score each token by minus the rank of its first merge, since llama.cpp merges the pair of the highest score."""
    scores = [0.0] * rows
    made = set()
    for rank, merge in enumerate(model["merges"]):
        token = model["vocab"]["".join(merge.split(" ") if isinstance(merge, str) else merge)]
        if token not in made:
            made.add(token)
            scores[token] = -float(rank)
    return scores


def _added_ends(tokenizer: Any) -> dict[str, bool]:
    """Return if a text gets a begin token and an end token. Raises InputError for any other added token."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos == full:
                return {"bos": bos, "eos": eos}
    raise InputError(f"the tokenizer makes {full} of {bare}: GGUF can express a begin and an end token only")


def _pre_tokenizer(path: Path, tokenizer: Any, ignore_merges: bool) -> str:
    """Find the name under which llama.cpp splits the samples as this tokenizer does. Raises InputError without one."""
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
    """Return the words of a text and their positions."""
    return backend.pre_tokenizer.pre_tokenize_str(_normal(backend, text))


def _space_first(path: Path, tokenizer: Any) -> bool:
    """Return True if the tokenizer adds a space before a text. Raises InputError if it changes the text otherwise."""
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
    raise InputError(f"{path} changes text before it finds tokens, which a GGUF of this kind cannot express")
