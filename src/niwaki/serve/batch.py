"""Batch of sequences that generate one token each per step. A sequence can join or leave before any step.

`PaddedBatch` has one cache for all sequences. A sequence that is shorter than the longest has padding on the left, and
a mask and positions exclude it. A step is one forward pass, so it reads the weights once.
`PerSequence` has one cache per sequence and runs them one after another. Two kinds of models need it. In a contextual
model each sequence runs the units of its own prompt. Other models have caches that hold more than keys and values.
Both prefill a prompt in chunks, into its own cache.

In float32 a sequence gets the same logits in a batch as alone, except for rounding.

Cost: `PaddedBatch` copies keys and values when a sequence joins or leaves. `PerSequence` keeps one copy of the chosen
units per sequence of a contextual model.

Legend: B sequences, T tokens, V vocabulary.

    batch = batch_for(model)
    state = batch.begin()
    logits_TV = batch.read(state, ids, every=False)
    batch.join(state)
    logits_BV = batch.step([token])
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from niwaki.runtime.contextual.compact import Buffers
from niwaki.runtime.contextual.sequence import Record
from niwaki.runtime.contextual.sparsity import ContextualState


@dataclass(eq=False)
class SequenceState:
    """State of one sequence: its cache, and its contextual state and record if the model is contextual."""

    cache: Any
    contextual: ContextualState | None = None
    record: Record | None = None


class Batch(Protocol):
    """Interface of both kinds of batches."""

    def begin(self) -> SequenceState:
        """Return the state of a new, empty sequence."""
        ...

    def read(self, state: SequenceState, ids: Sequence[int], *, every: bool) -> Tensor:
        """Prefill the next tokens of a prompt. Return the logits [T, V] of all of them, or [1, V] of the last."""
        ...

    def join(self, state: SequenceState) -> None:
        """Add a sequence after its prefill, as the last row of each following step."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [B, V] after the next token of every row."""
        ...

    def leave(self, rows: Collection[int]) -> None:
        """Remove rows. The others keep their order."""
        ...

    def drop(self, state: SequenceState) -> None:
        """Release a sequence that did not join."""
        ...


def batch_for(model: Any) -> Batch:
    """Return the kind of batch that this model supports."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain = {type(layer) for layer in DynamicCache(config=model.config).layers} <= {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }
    return PaddedBatch(model) if plain and getattr(model, "contextual", None) is None else PerSequence(model)


def _read(model: Any, cache: Any, ids: Sequence[int], every: bool) -> Tensor:
    ids_1T = torch.tensor([list(ids)], device=model.device)
    output = model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=0 if every else 1)
    logits_TV: Tensor = output.logits[0]
    return logits_TV if every else logits_TV[-1:]  # some models return the logits of all tokens


class PaddedBatch:
    """Batch with all rows in one cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache: Any = None
        self._real_BT = torch.zeros(0, 0, dtype=torch.int64, device=model.device)

    def begin(self) -> SequenceState:
        """Return the state of an empty cache."""
        from transformers.cache_utils import DynamicCache

        return SequenceState(DynamicCache(config=self.model.config))

    def read(self, state: SequenceState, ids: Sequence[int], *, every: bool) -> Tensor:
        """Run one forward pass of the whole model."""
        return _read(self.model, state.cache, ids, every)

    def join(self, state: SequenceState) -> None:
        """Pad both caches to the longer one, then append the new row."""
        own = state.cache.get_seq_length()
        real_1T = torch.ones(1, own, dtype=torch.int64, device=self._real_BT.device)
        if self._cache is None:
            self._cache, self._real_BT = state.cache, real_1T
            return
        length = max(own, self._real_BT.shape[1])
        for mine, new in zip(self._cache.layers, state.cache.layers, strict=True):
            held = _held_tokens(mine, length)
            mine.keys = torch.cat([_padded(mine.keys, held), _padded(new.keys, held)])
            mine.values = torch.cat([_padded(mine.values, held), _padded(new.values, held)])
            _set_length(mine, length)
        real = (self._real_BT, real_1T)
        self._real_BT = torch.cat([pad(real_BT, (length - real_BT.shape[1], 0)) for real_BT in real])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run one forward pass for all rows."""
        ids_B1 = torch.tensor(tokens, device=self._real_BT.device)[:, None]
        self._real_BT = pad(self._real_BT, (0, 1), value=1)
        positions_B1 = self._real_BT.sum(1, keepdim=True) - 1
        output = self.model(
            input_ids=ids_B1, attention_mask=self._real_BT, position_ids=positions_B1, past_key_values=self._cache,
            use_cache=True,
        )  # fmt: skip
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def leave(self, rows: Collection[int]) -> None:
        """Remove rows, and the padding that only these rows needed."""
        staying = [row for row in range(len(self._real_BT)) if row not in rows]
        if not staying:
            self._cache, self._real_BT = None, self._real_BT[:0, :0]
            return
        keep_B = torch.tensor(staying, device=self._real_BT.device)
        real_BT = self._real_BT[keep_B]
        length = int(real_BT.sum(1).max())
        self._real_BT = real_BT[:, real_BT.shape[1] - length :]
        for layer in self._cache.layers:
            start = layer.keys.shape[2] - _held_tokens(layer, length)
            layer.keys, layer.values = layer.keys[keep_B, :, start:], layer.values[keep_B, :, start:]
            _set_length(layer, length)

    def drop(self, state: SequenceState) -> None:
        """Ignore the sequence, which has no row in the shared cache yet."""


def _held_tokens(layer: Any, length: int) -> int:
    """Return how many of `length` tokens a layer holds: all, or those within its window."""
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def _padded(states_BGTC: Tensor, length: int) -> Tensor:
    """Pad states with zeros before the first token."""
    return pad(states_BGTC, (0, 0, length - states_BGTC.shape[2], 0))


def _set_length(layer: Any, length: int) -> None:
    if layer.is_sliding:
        layer.cumulative_length = length


class PerSequence:
    """Batch with one cache and one forward pass per row."""

    def __init__(self, model: Any) -> None:
        self.model, self.contextual = model, getattr(model, "contextual", None)
        self._rows: list[SequenceState] = []
        self._free: list[Buffers] = []  # new memory is slower than used memory

    def begin(self) -> SequenceState:
        """Return the state of an empty cache. A contextual model adds memory for the chosen units."""
        from transformers.cache_utils import DynamicCache

        state = SequenceState(DynamicCache(config=self.model.config))
        if self.contextual is not None:
            state.contextual = ContextualState(self._free.pop() if self._free else Buffers())
        return state

    def read(self, state: SequenceState, ids: Sequence[int], *, every: bool) -> Tensor:
        """Run one forward pass of the whole model."""
        if self.contextual is None or state.contextual is None:
            return _read(self.model, state.cache, ids, every)
        with self.contextual.switched(state.contextual):
            logits_TV = _read(self.model, state.cache, ids, every)
        state.record = state.record or self.contextual.records[-1]
        return logits_TV

    def join(self, state: SequenceState) -> None:
        """Append the sequence as the last row."""
        self._rows.append(state)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run one forward pass per row."""
        logits = [self.read(state, [token], every=False) for state, token in zip(self._rows, tokens, strict=True)]
        return torch.cat(logits)

    def leave(self, rows: Collection[int]) -> None:
        """Remove rows, and keep their memory for the next sequences."""
        for row in rows:
            self.drop(self._rows[row])
        self._rows = [state for row, state in enumerate(self._rows) if row not in rows]

    def drop(self, state: SequenceState) -> None:
        """Keep the memory of the sequence for the next one."""
        if state.contextual is not None:
            self._free.append(state.contextual.buffers)
            state.contextual = None
