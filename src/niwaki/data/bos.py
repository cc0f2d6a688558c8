"""Beginning-of-text tokens: what every window and every text begins with, decided here for all that reads text.

A model that was trained with such a token is far worse without it. Perplexity of Gemma 3 270M is 140 in place of 31.
The policy `auto` follows the tokenizer, as lm-evaluation-harness does. What the tokenizer puts before a text by itself
begins every window. Usually this is its bos token, for some models another token, or two. A Gemma always gets its bos
token. `on` also puts the bos token of other tokenizers, `off` puts none.

    bos = find_bos(load_tokenizer("MODEL"), "auto")
    ids = bos.encode(tokenizer, "Hello")

Legend: S windows, T tokens per window, K tokens of the beginning.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from niwaki.config.recipe import BOS_POLICIES, BosPolicy
from niwaki.errors import CalibrationError, unknown

GEMMA = "gemma"


@dataclass(frozen=True)
class Bos:
    """Tokens that begin every window, () if there are none. `unused`: those that would begin it, but are off."""

    ids: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    name: str = ""

    @property
    def state(self) -> Literal["on", "off"]:
        """Return what was done, for records."""
        return "on" if self.ids else "off"

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """Return the tokens of a text with its beginning, once. No end token follows."""
        # verbose=False: a text longer than the model is cut or refused by the caller, so no warning is due
        return self.begin(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def begin(self, ids: Sequence[int]) -> list[int]:
        """Return tokens with their beginning. A text that holds it already, as a rendered chat does, gets no other."""
        return [*self.ids, *self.strip(ids)]

    def strip(self, ids: Sequence[int]) -> list[int]:
        """Return tokens without the beginning that the text itself holds."""
        count = len(self.ids)
        return list(ids[count:] if tuple(ids[:count]) == self.ids else ids)

    def begin_windows(self, ids_ST: Tensor) -> Tensor:
        """Return windows [S, K + T]."""
        return torch.cat([torch.tensor(self.ids, dtype=ids_ST.dtype).expand(len(ids_ST), -1), ids_ST], dim=1)

    def room(self, seq_len: int) -> int:
        """Return the tokens of text in a window of `seq_len`. Raises CalibrationError if there are none."""
        if seq_len <= len(self.ids):
            raise CalibrationError(
                f"seq_len {seq_len}: a window begins with {self.name} and holds no text: raise --seq-len, or --bos off"
            )
        return seq_len - len(self.ids)


def find_bos(tokenizer: Any, policy: BosPolicy = "auto") -> Bos:
    """Return what begins every text of this tokenizer. Raises CalibrationError for `on` without a bos token."""
    if policy not in BOS_POLICIES:
        raise CalibrationError(unknown("bos policy", str(policy), BOS_POLICIES))
    own = _own_beginning(tokenizer)
    ids = own or (() if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),))
    name = "".join(str(tokenizer.convert_ids_to_tokens(token)) for token in ids)
    if policy == "on" and not ids:
        raise CalibrationError(
            f"--bos on: the tokenizer in {tokenizer.name_or_path} has no beginning-of-text token: "
            "set bos_token in its tokenizer_config.json, or leave --bos at auto"
        )
    if policy == "on" or (policy == "auto" and (own or _is_gemma(tokenizer))):
        return Bos(ids, name=name)
    return Bos(unused=ids, name=name)


def puts_bos_itself(tokenizer: Any, bos: Bos) -> bool:
    """Check that the tokenizer begins a text as `bos` does."""
    return _own_beginning(tokenizer) == bos.ids


def _own_beginning(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that the tokenizer puts before a text by itself."""
    whole, bare = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    starts = (start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare)
    return tuple(int(token) for token in whole[: next(starts, 0)])


def _is_gemma(tokenizer: Any) -> bool:
    """Check by the class of the tokenizer, and by the config of the model beside it."""
    if GEMMA in type(tokenizer).__name__.lower():
        return True
    try:
        config = json.loads((Path(tokenizer.name_or_path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and GEMMA in str(config.get("model_type", "")).lower()
