"""Contextual sparsity in a transformers model: prefill with all weights, decode with those that the prompt needs.

`attach.attach(model, shadow)` adds two hooks to a model. It rewrites no module, and `generate` works as before.
`inputs` does the same with other units: inputs of matrices, chosen for every token.


1. Prefill. A forward on an empty cache runs the full model. Hooks sum the activations (`contextual.prefill`), also over
   further chunks of the prompt.
2. Sparse decode. At the first single token the predictor scores all units, and the lowest are skipped. The matrices of
   the others are copied together, and the skipped heads leave the cache (`contextual.compact`). Every later token runs
   on the small matrices, until another sequence begins.
3. Refresh. It comes after `refresh_tokens` tokens, or before a longer input (the next turn of a dialogue). The cache
   gets back what the full model left, the full model reads the tokens generated since, and step 2 follows.

In a batch every sequence has heads of its own, and all run the same neurons (`contextual.selection.for_batch`). Their
order does not matter. A batch runs dense in these cases (`sequence.Decision`):

- it needs more than `max_kept_frac` of the weights, so skipping would not pay;
- its prompt is shorter than `min_prompt`;
- its prompt deviates by more than `max_deviation` from what is expected, or the mask holds less than `min_margin` of it
  (`measure.prompt_gate` sets both limits);
- its cache or attention mask is of a form that is not supported.

`records` holds the account of every batch.

Limits: a cache that is cropped while heads are missing in it (assisted decoding) is refused. After beam search reorders
the cache there is no refresh, and what needs the full cache (verification, a longer input) is refused.

Legend: B sequences, T tokens, U units, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.model.anatomy import find_blocks
from niwaki.runtime.contextual.compact import Buffers, compact
from niwaki.runtime.contextual.prefill import Prefill, PrefillStatistics, real_tokens
from niwaki.runtime.contextual.selection import for_batch, margin
from niwaki.runtime.contextual.sequence import ActiveUnits, ContextualSequence, Decision, Phase, Record, can_restore

MAX_RECORDS = 1000


@dataclass
class ContextualState:
    """Sequence in progress, and the memory of its compact matrices; a server holds one for each sequence."""

    buffers: Buffers = field(default_factory=Buffers)
    sequence: ContextualSequence | None = None


class Contextual:
    """Handle of a contextual model, made by `attach`. `records` holds the last batches, the newest at the end.

    While `enabled` is false the full model runs. `in_place`: kernels read the kept rows in the full matrices. None
    means on a GPU only.
    """

    def __init__(self, model: Any, shadow: Any, *, in_place: bool | None = None) -> None:
        self.model, self.shadow, self.in_place = model, shadow, in_place
        self.blocks: nn.ModuleList = find_blocks(model)[1]
        self.records: list[Record] = []
        self.enabled = True
        self.state = ContextualState()
        self._own_forward = False  # the hooks let a forward of this handle pass
        self._after_forward = ExitStack()  # closed by the hook after a forward

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose how this forward runs."""
        if self._own_forward or not self.enabled:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache, sequence = kwargs.get("past_key_values"), self.state.sequence
        if not isinstance(ids, Tensor):
            self.state.sequence = None  # embeddings instead of tokens: a refresh could not read them again
        elif sequence is not None and cache is not None and sequence.cache is cache:
            self._continue(sequence, ids, kwargs)
        else:
            self._begin(ids, cache, kwargs)

    def after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """Restore the full model, and remember the cache that a prompt filled. Runs after errors too."""
        if self._own_forward:
            return
        self._after_forward.close()
        sequence = self.state.sequence
        if sequence is None:
            return
        cache = output.get("past_key_values") if isinstance(output, dict) else None
        if isinstance(output, dict) and cache is None:
            sequence.record.note = "the model returned no cache of keys and values: every token runs dense"
        if cache is None or not hasattr(cache, "layers") or cache.get_seq_length() != sequence.length:
            self.state.sequence = None  # an error, no cache, or one that was not empty before
            return
        if sequence.phase is Phase.SPARSE and sequence.active is not None:
            sequence.active.blocks.account(sequence.record)
        sequence.bind(cache)

    def _begin(self, ids_BT: Tensor, cache: Any, kwargs: dict[str, Any]) -> None:
        self.state.sequence = None
        if cache is not None and cache.get_seq_length():
            return  # another owner filled it: no forward was observed
        record = Record(len(ids_BT), 0)
        self.records = [*self.records[1 - MAX_RECORDS :], record]
        self.state.sequence = ContextualSequence(self._statistics(), record)
        self._prefill(self.state.sequence, ids_BT, kwargs)

    def _statistics(self) -> Prefill:
        """Return empty statistics of a prompt."""
        return PrefillStatistics(self.shadow.layout)

    def _continue(self, sequence: ContextualSequence, ids_BT: Tensor, kwargs: dict[str, Any]) -> None:
        if (length := sequence.cache.get_seq_length()) != sequence.length:
            if not length:
                return self._begin(ids_BT, sequence.cache, kwargs)
            if sequence.phase is not Phase.SPARSE:
                self.state.sequence = None
                return None
            raise InputError(
                "the cache was cropped or grew while heads were missing in it: contextual sparsity cannot follow "
                "(assisted decoding?). Load the model with dense=True"
            )
        single = ids_BT.shape[1] == 1
        if sequence.phase is Phase.SPARSE:
            sequence.detect_reordering()
            if not single or self._refresh_is_due(sequence):
                self._restore(sequence, observe=True)
        if single and sequence.phase is Phase.PREFILL:
            active = sequence.active or self._choose(sequence, self.in_place)
            if active is not None:
                sequence.run_sparse(active)
        if not single or sequence.phase is Phase.PREFILL:
            return self._prefill(sequence, ids_BT, kwargs)
        sequence.length += 1
        sequence.record.count(1, sparse=sequence.phase is Phase.SPARSE)
        if sequence.phase is Phase.SPARSE:
            assert sequence.active is not None
            names = ("position_ids", "attention_mask")
            given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            sequence.generated.append({"input_ids": ids_BT, **given})
            self._after_forward.enter_context(sequence.active.blocks.applied())
        return None

    def _refresh_is_due(self, sequence: ContextualSequence) -> bool:
        refresh_tokens = self.shadow.running.refresh_tokens
        return bool(refresh_tokens) and len(sequence.generated) >= refresh_tokens and not sequence.reordered

    def _prefill(self, sequence: ContextualSequence, ids_BT: Tensor, kwargs: dict[str, Any]) -> None:
        """Run this forward with all weights, and observe it unless all later ones are dense."""
        sequence.length += ids_BT.shape[1]
        sequence.record.prompt_tokens += ids_BT.shape[1]
        if sequence.phase is Phase.DENSE:
            return
        real_BT = real_tokens(kwargs, ids_BT)
        if real_BT is None:
            sequence.run_dense(Decision.UNSUPPORTED, "the attention mask does not say which tokens are padding")
            return
        self._after_forward.enter_context(sequence.prefill.observe(self.blocks, real_BT.to(ids_BT.device)))

    def choose(self, *, in_place: bool | None = None) -> ActiveUnits | None:
        """Return the units for the prompts of the last prefill, None for all of them, and forget the sequence.

        The caller runs them with `applied`. `in_place` None: as the handle says.
        """
        sequence, self.state.sequence = self.state.sequence, None
        if sequence is None or sequence.phase is Phase.DENSE:
            return None
        active = self._choose(sequence, self.in_place if in_place is None else in_place)
        if active is None and sequence.phase is Phase.PREFILL:
            because = f"the prompt is shorter than {self.shadow.running.min_prompt} tokens"
            sequence.run_dense(Decision.UNREAD, because)
        return active

    @contextmanager
    def applied(self, active: ActiveUnits | None) -> Iterator[None]:
        """Run the forwards inside with these units, None for all, and leave them out of every record."""
        with nullcontext() if active is None else active.blocks.applied(), self._hooks_off():
            yield

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        self._own_forward = True
        try:
            yield
        finally:
            self._own_forward = False

    @contextmanager
    def switched(self, state: ContextualState) -> Iterator[None]:
        """Continue the sequence of `state` in the forwards inside; the handle gets its own back after them."""
        mine, self.state = self.state, state
        try:
            yield
        finally:
            self.state = mine

    @torch.no_grad()
    def _choose(self, sequence: ContextualSequence, in_place: bool | None) -> ActiveUnits | None:
        """Choose the units of the next tokens. Return None if all run (DENSE), or until more is read (PREFILL)."""
        record, running, layout = sequence.record, self.shadow.running, self.shadow.layout
        tokens_B = sequence.prefill.tokens_B
        if tokens_B is None or int(tokens_B.min()) < running.min_prompt:
            return None  # the next token asks again
        scores_BU = self._scores_within_limits(sequence)
        if scores_BU is None:
            return None
        heads_BLG, neurons_LG = for_batch(self.shadow.rule, scores_BU, layout, running.batch)
        same_L = (heads_BLG == heads_BLG[:1]).all(2).all(0)  # where heads differ the weights of all run
        run_LG = heads_BLG[0] | ~same_L[:, None]
        skipped_frac = float(layout.skipped_frac(layout.join(run_LG[None], neurons_LG[None]))[0])
        record.skipped_frac.append(skipped_frac)
        if 1 - skipped_frac > running.max_kept_frac:
            because = f"the batch together needs {1 - skipped_frac:.0%} of the weights"
            sequence.run_dense(Decision.BATCH, because)
            return None
        heads_BLG, neurons_LG = heads_BLG.cpu(), neurons_LG.cpu()
        kept = {"heads": heads_BLG[0].sum(1), "neurons": neurons_LG.sum(1)}
        record.kept.append({kind: kept_L.tolist() for kind, kept_L in kept.items()})
        record.decision = Decision.SPARSE
        assert isinstance(sequence.prefill, PrefillStatistics)
        mean_fills = self._mean_fills(sequence.prefill)
        in_place = in_place if in_place is not None else tokens_B.is_cuda
        blocks = compact(self.blocks, layout, heads_BLG, neurons_LG, self.state.buffers, mean_fills, in_place=in_place)
        return ActiveUnits(blocks, heads_BLG)

    def _scores_within_limits(self, sequence: ContextualSequence) -> Tensor | None:
        """Return the scores [B, U] of all units; None if the gate or the cache makes the sequence dense."""
        record, running, layout = sequence.record, self.shadow.running, self.shadow.layout
        if not self._can_restore(sequence):
            return None
        assert isinstance(sequence.prefill, PrefillStatistics)
        features = sequence.prefill.features
        predictor = self.shadow.predictor.to(features[0].device)
        deviation = float(predictor.deviation(*features).max())
        record.deviation.append(deviation)
        if running.max_deviation and deviation > running.max_deviation:
            because = f"the prompt deviates by {deviation:.3g} from what the predictor expects"
            sequence.run_dense(Decision.DEVIATION, because)
            return None
        scores_BU: Tensor = predictor.scores(*features)
        held_frac = float(margin(scores_BU, self.shadow.rule.select(scores_BU, layout), layout).min())
        record.margin.append(held_frac)
        if held_frac < running.min_margin:
            because = f"the mask would hold {held_frac:.1%} of what is expected to matter"
            sequence.run_dense(Decision.MARGIN, because)
            return None
        return scores_BU

    def _can_restore(self, sequence: ContextualSequence) -> bool:
        """Return True if the cache can lose tokens and heads and get them back; else the sequence becomes dense."""
        if can_restore(sequence.cache):
            return True
        because = "heads can leave caches that grow only, and this one has a fixed size"
        sequence.run_dense(Decision.UNSUPPORTED, because)
        return False

    def verify(self) -> Tensor | None:
        """Return logits [B, T, V] of the full model for the tokens since the last prefill or verification.

        The cache then holds what the full model leaves. None if no token ran on a part of the weights.
        """
        sequence = self.state.sequence
        if sequence is None or sequence.phase is not Phase.SPARSE or not sequence.generated:
            return None
        if not sequence.restorable:
            raise InputError(
                "the cache of this model cannot be put back, so nothing that it wrote can be verified: leave verify "
                "out, or load the model with dense=True"
            )
        logits: Tensor = self._restore(sequence, observe=False).logits
        return logits

    def roll_back(self, tokens: int) -> None:
        """Remove the last tokens from a verified cache."""
        sequence = self.state.sequence
        assert sequence is not None and sequence.phase is not Phase.SPARSE, "verify first"
        if tokens:
            sequence.cache.crop(-tokens)
            sequence.length -= tokens

    def _mean_fills(self, prefill: PrefillStatistics) -> dict[int, Tensor] | None:
        """Return what replaces skipped neurons: a share of their mean activations in the prompt, by block."""
        share, dtype = self.shadow.running.mean_fill, self.model.dtype
        if not share:
            return None
        return {index: (share * prefill.mean((index, "neurons"))).to(dtype) for index in range(len(self.blocks))}

    @torch.no_grad()
    def _restore(self, sequence: ContextualSequence, *, observe: bool) -> Any:
        """Put the full cache back, run the full model over the generated tokens, and return its output.

        With `observe` these tokens count for the next choice. Without it the same units run again.
        """
        missing = sequence.restore(keep_units=not observe)
        if not missing:
            return None
        given: dict[str, Any] = {"input_ids": torch.cat([step["input_ids"] for step in missing], dim=1)}
        if "position_ids" in missing[0]:
            given["position_ids"] = torch.cat([step["position_ids"] for step in missing], dim=-1)
        if "attention_mask" in missing[-1]:
            given["attention_mask"] = missing[-1]["attention_mask"]
        real_BT = torch.ones_like(given["input_ids"], dtype=torch.bool)
        with sequence.prefill.observe(self.blocks, real_BT) if observe else nullcontext(), self._hooks_off():
            return self.model(**given, past_key_values=sequence.cache, use_cache=True)
