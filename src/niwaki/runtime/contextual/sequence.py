"""State of one batch of sequences: its phase, the transitions between phases, and the record of its decisions.

    PREFILL ──choice──► SPARSE       the next token runs on the kept units only
       │                   │
       │                   └─restore─► PREFILL: the cache is full again (refresh, longer input, verification)
       └────refused────► DENSE       all weights run to the end of the sequence

Legend: B sequences, L blocks, T tokens, G units of a kind in one block.
"""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from torch import Tensor

from niwaki.errors import InputError
from niwaki.runtime.contextual.compact import CompactBlocks, cut_cache
from niwaki.runtime.contextual.prefill import Prefill


class Phase(Enum):
    """Kind of the next forward of a sequence."""

    PREFILL = "prefill"  # all weights run, and the forward is observed
    SPARSE = "sparse"  # the kept units run, and the cache holds their heads only
    DENSE = "dense"  # all weights run, and no choice follows


class Decision(StrEnum):
    """Result of the last choice for a batch of sequences; all but `SPARSE` run with all weights."""

    UNREAD = "unread"  # no choice yet: the prompt is too short, or no token followed it
    SPARSE = "sparse"
    DEVIATION = "deviation"  # the prompt deviates from what the predictor expects
    MARGIN = "margin"  # the mask holds too little of what is expected to matter
    BATCH = "batch"  # the batch together needs too many of the weights
    UNSUPPORTED = "unsupported"  # a cache or an attention mask of another form


@dataclass
class Record:
    """Account of one batch of sequences: its tokens, the last decision, and the values of every choice.

    `dense_because` explains a decision for all weights to a person.
    """

    sequences: int
    prompt_tokens: int
    sparse_tokens: int = 0
    dense_tokens: int = 0
    skipped_frac: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    kept: list[dict[str, list[int]]] = field(default_factory=list)
    decision: Decision = Decision.UNREAD
    dense_because: str = ""
    note: str = ""
    verified: dict[str, float] = field(default_factory=dict)

    def count(self, tokens: int, *, sparse: bool) -> None:
        """Add tokens that each sequence generated."""
        if sparse:
            self.sparse_tokens += tokens
        else:
            self.dense_tokens += tokens


@dataclass(frozen=True)
class ActiveUnits:
    """Units that a batch runs: the compact matrices, and the heads [B, L, G] whose keys and values stay (None: all)."""

    blocks: CompactBlocks
    heads_BLG: Tensor | None


def _no_cache() -> None:
    """Return no cache: the first forward has not ended."""


def can_restore(cache: Any) -> bool:
    """Return True for a cache of layers that grow only: it can lose tokens and heads, and get them back."""
    from transformers.cache_utils import DynamicLayer

    return all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def _first_keys(cache: Any) -> Tensor | None:
    """Return the keys of the first block, None if it has none: linear attention keeps a state."""
    return getattr(cache.layers[0], "keys", None)


@dataclass
class ContextualSequence:
    """A batch of sequences and its phase. The cache identifies it; only a weak reference to the cache is held.

    `active`: the units that run in the phase SPARSE. In the phase PREFILL the next token takes them without a choice.
    `generated`: the inputs of the tokens since the last prefill, `full_cache` the cache layers from before them.
    """

    prefill: Prefill
    record: Record
    phase: Phase = Phase.PREFILL
    length: int = 0
    active: ActiveUnits | None = None
    full_cache: list[Any] = field(default_factory=list)
    generated: list[dict[str, Tensor]] = field(default_factory=list)
    reordered: bool = False
    restorable: bool = True
    _cache: Callable[[], Any] = _no_cache
    _first_keys: Tensor | None = None  # of the first block, after the last forward

    @property
    def cache(self) -> Any:
        """Return the cache, or None if its owner dropped it."""
        return self._cache()

    def bind(self, cache: Any) -> None:
        """Remember the cache that a forward filled."""
        self._cache, self._first_keys = weakref.ref(cache), _first_keys(cache)

    def run_sparse(self, active: ActiveUnits) -> None:
        """Enter SPARSE from PREFILL: keep the full cache layers, and cut the skipped heads from the cache."""
        assert self.phase is Phase.PREFILL, self.phase
        self.restorable = can_restore(self.cache)
        self.full_cache = [copy.copy(layer) for layer in self.cache.layers] if self.restorable else []
        if active.heads_BLG is not None:
            cut_cache(self.cache, active.heads_BLG)
        self.phase, self.active = Phase.SPARSE, active

    def run_dense(self, decision: Decision, because: str) -> None:
        """Enter DENSE from PREFILL, and record why."""
        assert self.phase is Phase.PREFILL, self.phase
        self.phase, self.active = Phase.DENSE, None
        self.record.decision, self.record.dense_because = decision, because

    def restore(self, *, keep_units: bool) -> list[dict[str, Tensor]]:
        """Enter PREFILL from SPARSE: put the full cache back, and return the inputs that it lacks.

        With `keep_units` the next token runs the same units. A cache that is not restorable stays as it is, and lacks
        nothing. Raises InputError if the cache was reordered.
        """
        assert self.phase is Phase.SPARSE, self.phase
        if not self.restorable:
            self.phase, self.active, self.generated = Phase.PREFILL, self.active if keep_units else None, []
            return []
        if self.reordered:
            raise InputError(
                "the cache was reordered (beams) while heads were missing in it, so the full model cannot read the "
                "generated tokens again: use one beam, or load the model with dense=True"
            )
        for layer, full in zip(self.cache.layers, self.full_cache, strict=True):
            vars(layer).update(vars(full))
        missing, self.generated, self.full_cache = self.generated, [], []
        self.phase, self.active = Phase.PREFILL, self.active if keep_units else None
        return missing

    def detect_reordering(self) -> None:
        """Note if another owner replaced the keys since the last forward, as beam search does."""
        if _first_keys(self.cache) is not self._first_keys:
            self.reordered = True
            self.record.note = "the cache was reordered (beams): no refresh follows"
