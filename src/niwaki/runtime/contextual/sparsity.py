"""A transformers model that reads a prompt with all of its weights and writes with those that this prompt needs.

`attach(model, shadow)` adds two hooks to a model; nothing of it is rewritten, and `generate` works as ever:

1. Reading. A forward on an empty cache is the full model. What it shows is summed on the way (`runtime.reading`), also
   over further pieces of the prompt.
2. Writing. At the first single token the predictor scores all units, the lowest are skipped, the matrices of the others
   are copied together and the heads that are gone leave the cache (`runtime.compact`). From here on every token runs on
   the small matrices, until another sequence begins.
3. Looking again. After `refresh_tokens` tokens, or when a longer piece follows (the next turn of a dialogue), the cache
   is put back to what the full model left, the tokens written since are read by the full model, and 2. follows.

In a batch every sequence has heads of its own, and all run the same neurons (`contextual.selection.for_batch`); their
order does not matter. When the batch together needs more than `max_kept_frac` of the weights, skipping would not pay,
and it runs dense; so do prompts until they are `min_prompt` long, those that deviate by more than `max_deviation`
from what is expected of them or whose mask holds less than `min_margin` of it (see `gating`), and caches or attention
masks that cannot be followed.
`records` says of every sequence what was done and why.

Not followed: caches that are cropped while small (assisted decoding) are refused; where beams changed places there is
no second look, and what needs the full cache again (checking, a longer piece) is refused.

Legend: B sequences, T tokens, U units, C channels.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.model.anatomy import find_blocks
from niwaki.runtime.contextual.compact import Buffers, Compact, Swap, check_linears, compact, cut_cache, leave
from niwaki.runtime.contextual.decisions import Record
from niwaki.runtime.contextual.prefill import Reading, real_tokens
from niwaki.runtime.contextual.record import Shadow
from niwaki.runtime.contextual.selection import for_batch, margin

KEPT_RECORDS = 1000


@dataclass(frozen=True)
class Choice:
    """What a batch runs: the small matrices, and the heads [B, L, G] whose keys and values stay."""

    small: Compact
    heads_BLG: Tensor


@dataclass
class _Sequence:
    """A batch on its way: the cache it is known by, what was read, and what was written since."""

    cache: Any
    length: int
    reading: Reading
    record: Record
    running: Choice | None = None
    parked: Choice | None = None
    full_cache: list[Any] = field(default_factory=list)
    written: list[dict[str, Tensor]] = field(default_factory=list)
    last_keys: Tensor | None = None  # of the first block, as our forward left them
    reordered: bool = False

    @property
    def alive(self) -> Any:
        """The cache, if its owner still has it."""
        return self.cache()


@dataclass
class Turn:
    """A batch that waits while others run: where it stands, and memory of its own for what was chosen for it."""

    buffers: Buffers = field(default_factory=Buffers)
    sequence: _Sequence | None = None


class Contextual:
    """The state of one model; made by `attach`."""

    def __init__(self, model: Any, shadow: Shadow) -> None:
        self.model, self.shadow = model, shadow
        self.blocks: nn.ModuleList = find_blocks(model)[1]
        self.records: list[Record] = []
        self.enabled = True
        self.in_place: bool | None = None  # whether rows are read where they are; None: on a GPU
        self._buffers = Buffers()
        self._sequence: _Sequence | None = None
        self._own_forward = False
        self._open: list[Any] = []  # what the hook after a forward has to close
        self._swapped: list[Swap] = []

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decides how this forward runs."""
        if self._own_forward or not self.enabled:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache, sequence = kwargs.get("past_key_values"), self._sequence
        if not isinstance(ids, Tensor):
            self._sequence = None  # embeddings instead of tokens: nothing can be read again later
        elif sequence is not None and cache is not None and sequence.alive is cache:
            self._go_on(sequence, ids, kwargs)
        else:
            self._begin(ids, cache, kwargs)

    def after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """Leaves the full model behind, and remembers the cache that a prompt filled. Runs after errors too."""
        if self._own_forward:
            return
        leave(self._swapped[::-1])
        self._swapped = []
        for closing in self._open:
            closing.__exit__(None, None, None)
        self._open = []
        sequence = self._sequence
        if sequence is None:
            return
        cache = output.get("past_key_values") if isinstance(output, dict) else None
        if cache is None or cache.get_seq_length() != sequence.length:
            self._sequence = None  # an error, no cache, or one that held something before
            return
        sequence.cache = weakref.ref(cache)
        sequence.last_keys = cache.layers[0].keys

    def _begin(self, ids_BT: Tensor, cache: Any, kwargs: dict[str, Any]) -> None:
        self._sequence = None
        if cache is not None and cache.get_seq_length():
            return  # filled by others: what it holds was not read
        reading = Reading(self.shadow.layout)
        record = Record(len(ids_BT), 0)
        self.records = [*self.records[1 - KEPT_RECORDS :], record]
        self._sequence = _Sequence(lambda: None, 0, reading, record)
        self._read(self._sequence, ids_BT, kwargs)

    def _go_on(self, sequence: _Sequence, ids_BT: Tensor, kwargs: dict[str, Any]) -> None:
        if (length := sequence.alive.get_seq_length()) != sequence.length:
            if not length:
                return self._begin(ids_BT, sequence.alive, kwargs)
            if sequence.running is None:
                self._sequence = None
                return None
            raise InputError(
                "the cache was cropped or grew while heads were missing in it: contextual sparsity cannot follow "
                "(assisted decoding?). Load the model with dense=True"
            )
        record = sequence.record
        refresh, one = self.shadow.running.refresh_tokens, ids_BT.shape[1] == 1
        if sequence.running is not None and sequence.alive.layers[0].keys is not sequence.last_keys:
            sequence.reordered = True
            record.note = "the cache was reordered (beams): there is no second look"
        due = refresh and len(sequence.written) >= refresh and not sequence.reordered
        if sequence.running is not None and (due or not one):
            self._reread(sequence, read=True)
        if one and sequence.running is None and not record.dense_because:
            choice = sequence.parked or self._choose(sequence)
            if choice is not None:
                self._cut(sequence, choice)
        if not one or (sequence.running is None and not record.dense_because):
            return self._read(sequence, ids_BT, kwargs)
        sequence.length += 1
        record.count(1, sparse=sequence.running is not None)
        if sequence.running is None:
            return None
        names = ("input_ids", "position_ids", "attention_mask")
        sequence.written.append({"input_ids": ids_BT} | {n: kwargs[n] for n in names[1:] if kwargs.get(n) is not None})
        self._swapped = sequence.running.small.enter()
        return None

    def _read(self, sequence: _Sequence, ids_BT: Tensor, kwargs: dict[str, Any]) -> None:
        """This forward is dense and read."""
        sequence.length += ids_BT.shape[1]
        sequence.record.prompt_tokens += ids_BT.shape[1]
        real_BT = real_tokens(kwargs, ids_BT)
        if real_BT is None:
            sequence.record.dense_because = "the attention mask does not say which tokens are padding"
            return
        opened = sequence.reading.open(self.blocks, real_BT.to(ids_BT.device))
        opened.__enter__()
        self._open.append(opened)

    def choose(self) -> Choice | None:
        """What the prompts just read lead to, for a caller that runs it by itself (`applied`); None: all runs."""
        sequence, self._sequence = self._sequence, None
        if sequence is None or sequence.record.dense_because:
            return None
        choice = self._choose(sequence)
        if choice is None and not sequence.record.dense_because:
            sequence.record.dense_because = f"the prompt is shorter than {self.shadow.running.min_prompt} tokens"
        return choice

    @contextmanager
    def applied(self, choice: Choice | None) -> Iterator[None]:
        """Forwards inside run what was chosen, and nothing else is decided about them."""
        before = [] if choice is None else choice.small.enter()
        self._own_forward = True
        try:
            yield
        finally:
            self._own_forward = False
            leave(before[::-1])

    @contextmanager
    def turn(self, turn: Turn) -> Iterator[None]:
        """Forwards inside go on with the batch of `turn`, whatever ran before."""
        mine = self._sequence, self._buffers
        self._sequence, self._buffers = turn.sequence, turn.buffers
        try:
            yield
        finally:
            turn.sequence = self._sequence
            self._sequence, self._buffers = mine

    @torch.no_grad()
    def _choose(self, sequence: _Sequence) -> Choice | None:
        """What runs from here on; None if everything does, or if more of the prompt has to be seen first."""
        from transformers.cache_utils import DynamicLayer

        record, running, layout = sequence.record, self.shadow.running, self.shadow.layout
        cache, tokens_B = sequence.alive, sequence.reading.tokens_B
        if tokens_B is None or int(tokens_B.min()) < running.min_prompt:
            return None  # looked at again at the next token
        if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            record.dense_because = "heads can leave caches that grow only, and this one has a fixed size"
            return None
        predictor = self.shadow.predictor.to(tokens_B.device)
        features = sequence.reading.features
        deviation = float(predictor.deviation(*features).max())
        record.deviation.append(deviation)
        if running.max_deviation and deviation > running.max_deviation:
            record.dense_because = f"the prompt deviates by {deviation:.3g} from what the predictor expects"
            return None
        scores_BU = predictor.scores(*features)
        held = float(margin(scores_BU, self.shadow.rule.select(scores_BU, layout), layout).min())
        record.margin.append(held)
        if held < running.min_margin:
            record.dense_because = f"the mask would hold {held:.1%} of what is expected to matter"
            return None
        heads_BLG, neurons_LG = for_batch(self.shadow.rule, scores_BU, layout, running.batch)
        same_L = (heads_BLG == heads_BLG[:1]).all(2).all(0)  # where heads differ the weights of all run
        run_LG = heads_BLG[0] | ~same_L[:, None]
        skipped_frac = float(layout.skipped_frac(layout.join(run_LG[None], neurons_LG[None]))[0])
        record.skipped_frac.append(skipped_frac)
        if 1 - skipped_frac > running.max_kept_frac:
            record.dense_because = f"the batch together needs {1 - skipped_frac:.0%} of the weights"
            return None
        heads_BLG, neurons_LG = heads_BLG.cpu(), neurons_LG.cpu()
        kept = {"heads": heads_BLG[0].sum(1), "neurons": neurons_LG.sum(1)}
        record.kept.append({kind: kept_L.tolist() for kind, kept_L in kept.items()})
        mean_fills = self._mean_fills(sequence.reading)
        in_place = self.in_place if self.in_place is not None else tokens_B.is_cuda
        small = compact(self.blocks, layout, heads_BLG, neurons_LG, self._buffers, mean_fills, in_place=in_place)
        return Choice(small, heads_BLG)

    def _cut(self, sequence: _Sequence, choice: Choice) -> None:
        """From here on `choice` runs; what the full model left in the cache is remembered."""
        sequence.full_cache = [copy.copy(layer) for layer in sequence.alive.layers]
        cut_cache(sequence.alive, choice.heads_BLG)
        sequence.running, sequence.parked = choice, None

    def verify(self) -> Tensor | None:
        """Logits [B, T, V] of the full model for the tokens written since the last look or verification.

        The cache is repaired on the way: it holds what the full model leaves. None if nothing was written by a part.
        """
        sequence = self._sequence
        if sequence is None or sequence.running is None or not sequence.written:
            return None
        logits: Tensor = self._reread(sequence, read=False).logits
        return logits

    def take_back(self, tokens: int) -> None:
        """Forgets the last tokens of a repaired cache, as if they had not been written."""
        sequence = self._sequence
        assert sequence is not None and sequence.running is None, "verify first"
        if tokens:
            sequence.alive.crop(-tokens)
            sequence.length -= tokens

    def _mean_fills(self, reading: Reading) -> dict[int, Tensor] | None:
        """Mean activations of the neurons of every block in the prompt, for those that are skipped."""
        share, dtype = self.shadow.running.mean_fill, self.model.dtype
        if not share:
            return None
        return {index: (share * reading.mean((index, "neurons"))).to(dtype) for index in range(len(self.blocks))}

    @torch.no_grad()
    def _reread(self, sequence: _Sequence, *, read: bool) -> Any:
        """Puts the full cache back, and the full model runs over what was written since; returns its output.

        With `read` these tokens count for the next look; without, the same units run on.
        """
        cache, written = sequence.alive, sequence.written
        if sequence.reordered:
            raise InputError(
                "the cache was reordered (beams) while heads were missing in it, so the full model cannot read again "
                "what was written: use one beam, or load the model with dense=True"
            )
        for layer, full in zip(cache.layers, sequence.full_cache, strict=True):
            vars(layer).update(vars(full))
        sequence.parked = None if read else sequence.running
        sequence.running, sequence.full_cache, sequence.written = None, [], []
        if not written:
            return None
        given: dict[str, Any] = {"input_ids": torch.cat([step["input_ids"] for step in written], dim=1)}
        if "position_ids" in written[0]:
            given["position_ids"] = torch.cat([step["position_ids"] for step in written], dim=-1)
        if "attention_mask" in written[-1]:
            given["attention_mask"] = written[-1]["attention_mask"]
        real_BT = torch.ones_like(given["input_ids"], dtype=torch.bool)
        self._own_forward = True
        try:
            with sequence.reading.open(self.blocks, real_BT) if read else nullcontext():
                return self.model(**given, past_key_values=cache, use_cache=True)
        finally:
            self._own_forward = False


def attach(model: Any, shadow: Shadow) -> Contextual:
    """Makes `model` skip what its inputs do not need; returns the handle that keeps `records`."""
    contextual = Contextual(model, shadow)
    if len(contextual.blocks) != shadow.layout.blocks:
        raise InputError(
            f"the predictor is of a model with {shadow.layout.blocks} blocks, this one has {len(contextual.blocks)}"
        )
    check_linears(contextual.blocks, shadow.layout)
    model.register_forward_pre_hook(contextual.before, with_kwargs=True)
    model.register_forward_hook(contextual.after, with_kwargs=True, always_call=True)
    return contextual
