"""Sequences that write one token each per step, joining and leaving whenever they like.

`PaddedBatch`: one cache for all, padded on the left where a sequence is shorter than the longest, with a mask and
positions that say so; a step is one forward, so the weights are read once for all. `PerSequence`: a cache each, one
after another, for models whose sequences cannot share a forward: contextual ones, where each runs the units that its
own prompt chose, and caches that are more than keys and values. Both read a
prompt in chunks into a cache of its own first.

In float32 a sequence gets the same logits in a batch as alone but for rounding.

Cost: `PaddedBatch` copies keys and values when a sequence joins or leaves; `PerSequence` keeps one copy of the chosen
units for each sequence of a contextual model.

Legend: B sequences, T tokens, V vocabulary.

    batch = batch_for(model)
    place = batch.begin()
    logits_TV = batch.read(place, ids, every=False)
    batch.join(place)
    logits_BV = batch.step([token])
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from niwaki.runtime.contextual.compact import Buffers
from niwaki.runtime.contextual.decisions import Record
from niwaki.runtime.contextual.sparsity import Turn


@dataclass(eq=False)
class SequenceState:
    """Where one sequence stands: its cache, and what a contextual model knows of it."""

    cache: Any
    turn: Turn | None = None
    record: Record | None = None


class Batch(Protocol):
    """What the engine asks of both."""

    def begin(self) -> SequenceState:
        """A new, empty sequence."""
        ...

    def read(self, place: SequenceState, ids: Sequence[int], *, every: bool) -> Tensor:
        """Reads the next tokens of a prompt: logits [T, V] behind each of them, or [1, V] behind the last."""
        ...

    def join(self, place: SequenceState) -> None:
        """This sequence, read to its end, is the last row of every step from here on."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits [B, V] behind the next token of every row."""
        ...

    def leave(self, rows: Collection[int]) -> None:
        """These rows end; the others keep their order."""
        ...

    def drop(self, place: SequenceState) -> None:
        """A sequence that ends before it joined."""
        ...


def batch_for(model: Any) -> Batch:
    """The one that this model can be run by."""
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
    return logits_TV if every else logits_TV[-1:]  # not every model keeps the last only


class PaddedBatch:
    """All rows in one cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache: Any = None
        self._real_BT = torch.zeros(0, 0, dtype=torch.int64, device=model.device)

    def begin(self) -> SequenceState:
        """An empty cache."""
        from transformers.cache_utils import DynamicCache

        return SequenceState(DynamicCache(config=self.model.config))

    def read(self, place: SequenceState, ids: Sequence[int], *, every: bool) -> Tensor:
        """One forward of the whole model."""
        return _read(self.model, place.cache, ids, every)

    def join(self, place: SequenceState) -> None:
        """Both caches get as long as the longer one, then the new row follows the others."""
        own = place.cache.get_seq_length()
        real_1T = torch.ones(1, own, dtype=torch.int64, device=self._real_BT.device)
        if self._cache is None:
            self._cache, self._real_BT = place.cache, real_1T
            return
        length = max(own, self._real_BT.shape[1])
        for mine, new in zip(self._cache.layers, place.cache.layers, strict=True):
            kept = _kept(mine, length)
            mine.keys = torch.cat([_lengthened(mine.keys, kept), _lengthened(new.keys, kept)])
            mine.values = torch.cat([_lengthened(mine.values, kept), _lengthened(new.values, kept)])
            _tell_length(mine, length)
        real = (self._real_BT, real_1T)
        self._real_BT = torch.cat([pad(real_BT, (length - real_BT.shape[1], 0)) for real_BT in real])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One forward for all rows."""
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
        """Their rows go, and the padding that only they needed."""
        staying = [row for row in range(len(self._real_BT)) if row not in rows]
        if not staying:
            self._cache, self._real_BT = None, self._real_BT[:0, :0]
            return
        keep_B = torch.tensor(staying, device=self._real_BT.device)
        real_BT = self._real_BT[keep_B]
        length = int(real_BT.sum(1).max())
        self._real_BT = real_BT[:, real_BT.shape[1] - length :]
        for layer in self._cache.layers:
            start = layer.keys.shape[2] - _kept(layer, length)
            layer.keys, layer.values = layer.keys[keep_B, :, start:], layer.values[keep_B, :, start:]
            _tell_length(layer, length)

    def drop(self, place: SequenceState) -> None:
        """Nothing is shared yet."""


def _kept(layer: Any, length: int) -> int:
    """How many of `length` tokens a layer holds: all of them, or those within its window."""
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def _lengthened(states_BGTC: Tensor, length: int) -> Tensor:
    """Zeros before the first token."""
    return pad(states_BGTC, (0, 0, length - states_BGTC.shape[2], 0))


def _tell_length(layer: Any, length: int) -> None:
    if layer.is_sliding:
        layer.cumulative_length = length


class PerSequence:
    """A cache for every row, one forward after another."""

    def __init__(self, model: Any) -> None:
        self.model, self.contextual = model, getattr(model, "contextual", None)
        self._rows: list[SequenceState] = []
        self._free: list[Buffers] = []  # to map fresh memory takes longer than to fill it again

    def begin(self) -> SequenceState:
        """An empty cache, and with a contextual model memory for what will be chosen."""
        from transformers.cache_utils import DynamicCache

        place = SequenceState(DynamicCache(config=self.model.config))
        if self.contextual is not None:
            place.turn = Turn(self._free.pop() if self._free else Buffers())
        return place

    def read(self, place: SequenceState, ids: Sequence[int], *, every: bool) -> Tensor:
        """One forward of the whole model."""
        if self.contextual is None or place.turn is None:
            return _read(self.model, place.cache, ids, every)
        with self.contextual.turn(place.turn):
            logits_TV = _read(self.model, place.cache, ids, every)
        place.record = place.record or self.contextual.records[-1]
        return logits_TV

    def join(self, place: SequenceState) -> None:
        """The last in turn."""
        self._rows.append(place)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One forward for each row."""
        logits = [self.read(place, [token], every=False) for place, token in zip(self._rows, tokens, strict=True)]
        return torch.cat(logits)

    def leave(self, rows: Collection[int]) -> None:
        """Their memory serves those that come."""
        for row in rows:
            self.drop(self._rows[row])
        self._rows = [place for row, place in enumerate(self._rows) if row not in rows]

    def drop(self, place: SequenceState) -> None:
        """Its memory serves the next."""
        if place.turn is not None:
            self._free.append(place.turn.buffers)
            place.turn = None
