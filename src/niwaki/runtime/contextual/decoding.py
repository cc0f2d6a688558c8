"""Decoding with a contextual model: text that the full model verifies, and a given text that is read.

`generate_verified` is speculative decoding with a part of the model as its own draft. The small matrices write `every`
tokens, then the full model reads them in one pass. It keeps the tokens that it would have written too. At the first
difference its own token replaces the drafted one, and the rest of the draft is removed. The cache holds what the full
model leaves in both cases. So with `min_probability` None the text equals greedy decoding of the dense model; the
predictor decides the speed alone.

With `min_probability` p a token also stays if the full model gives it at least p, the rule of Sirius (Zhou et al.
2024). Fewer tokens are removed, and the text may differ from the dense one.

Cost: one pass of the full model per `every` tokens, besides the small ones. One sequence at a time.

`read_text` returns what a pass token by token does, in two forwards where one choice after the prompt decides all. If a
refresh would follow, or the prompt is too short for a choice, it goes token by token. Logits are made when wanted.

Legend: T tokens, N positions, V vocabulary, D hidden size.

    text = generate_verified(contextual, ids_1T, max_new_tokens=128, every=8)
    logits_NV = read_text(niwaki.load("OUT").contextual, ids_T, prompt=128).logits(slice(128, 192))
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.model.logits import FinalStates, logits_of_part
from niwaki.runtime.contextual.compact import cut_cache
from niwaki.runtime.contextual.sparsity import Contextual


@dataclass
class VerifiedText:
    """A prompt with its continuation, and the counts of the verification.

    They are passes of the full model, tokens drafted, accepted and removed, and the sum of the divergence
    KL(full ‖ part) over the drafted tokens.
    """

    ids_1T: Tensor
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    removed: int = 0
    divergence: float = 0.0

    @property
    def agreement(self) -> float:
        """Return the share of drafted tokens that the full model accepted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def kl(self) -> float:
        """Return the mean KL divergence of the part from the full model, in nats per token."""
        return self.divergence / max(self.drafted, 1)


@torch.no_grad()
def generate_verified(
    contextual: Contextual,
    ids_1T: Tensor,
    *,
    max_new_tokens: int,
    every: int = 8,
    min_probability: float | None = None,
    stop_tokens: Collection[int] = (),
) -> VerifiedText:
    """Continue one prompt greedily, up to a stop token. Raises InputError for impossible settings."""
    from transformers import DynamicCache

    if len(ids_1T) != 1 or ids_1T.shape[1] < 1:
        raise InputError(f"verified writing continues one prompt, got {len(ids_1T)} of {ids_1T.shape[1]} tokens")
    if every < 1 or max_new_tokens < 1 or not (min_probability is None or 0 < min_probability <= 1):
        raise InputError("expected every ≥ 1, max_new_tokens ≥ 1 and min_probability in (0, 1] or None")
    model, text = contextual.model, VerifiedText(ids_1T)
    cache = DynamicCache(config=model.config)
    total = ids_1T.shape[1] + max_new_tokens

    def step(ids: Tensor) -> Tensor:
        logits_1V: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits_1V

    next_token = step(ids_1T).argmax(-1, keepdim=True)
    record = contextual.records[-1]
    while True:
        text.ids_1T = torch.cat([text.ids_1T, next_token], dim=1)
        if text.ids_1T.shape[1] >= total or next_token.item() in stop_tokens:
            return text
        draft, draft_logits = [next_token], []
        for _ in range(min(every, total - text.ids_1T.shape[1])):
            draft_logits.append(step(draft[-1]))
            draft.append(draft_logits[-1].argmax(-1, keepdim=True))
            if draft[-1].item() in stop_tokens:
                break
        logits_1TV = contextual.verify()
        if logits_1TV is None:  # the full model wrote these itself
            next_token = _append(text, draft[1:])
            continue
        text.passes += 1
        logits_1TV = logits_1TV[:, -len(draft_logits) :]
        text.divergence += _divergence(logits_1TV[0], torch.cat(draft_logits))
        next_token = _accept_draft(contextual, text, draft, logits_1TV, min_probability)
        record.verified = {"passes": text.passes, "agreement": text.agreement, "kl": text.kl}


def _divergence(full_TV: Tensor, part_TV: Tensor) -> float:
    """Return the sum over tokens of KL(full ‖ part)."""
    full_TV, part_TV = full_TV.float().log_softmax(-1), part_TV.float().log_softmax(-1)
    return float((full_TV.exp() * (full_TV - part_TV)).sum())


def _append(text: VerifiedText, draft: list[Tensor]) -> Tensor:
    """Append all drafted tokens but the last to the text, and return the last, which follows."""
    text.ids_1T = torch.cat([text.ids_1T, *draft[:-1]], dim=1)
    return draft[-1]


def _accept_draft(
    contextual: Contextual, text: VerifiedText, draft: list[Tensor], logits_1TV: Tensor, min_probability: float | None
) -> Tensor:
    """Keep what the full model accepts of a draft, and return the next token. `draft[0]` is in the text already."""
    greedy_T = logits_1TV[0].argmax(-1)
    probability_TV = logits_1TV[0].float().softmax(-1)
    drafted_T = torch.cat(draft[1:], dim=1)[0]
    accepted_T = greedy_T == drafted_T
    if min_probability is not None:
        accepted_T |= probability_TV.gather(1, drafted_T[:, None])[:, 0] >= min_probability
    count = int(accepted_T.long().cumprod(0).sum())
    text.drafted += len(drafted_T)
    text.accepted += count
    if count == len(drafted_T):
        return _append(text, draft[1:])
    # The full model read draft[0..count], and its own token follows; the cache loses what it read after that.
    text.removed += len(drafted_T) - count
    contextual.roll_back(len(drafted_T) - 1 - count)
    text.ids_1T = torch.cat([text.ids_1T, *draft[1 : count + 1]], dim=1)
    return greedy_T[None, count : count + 1]


@dataclass(frozen=True)
class ReadText:
    """A text that a contextual model has read: its hidden states after the last block, and its logits on demand."""

    contextual: Contextual
    states: FinalStates
    ids_1T: Tensor
    x_1TD: Tensor

    def logits(self, part: slice) -> Tensor:
        """Return the logits [N, V] of the positions `part`."""
        with self.contextual.applied(None):
            return logits_of_part(self.states.logits, self.ids_1T, self.x_1TD, part)


@torch.no_grad()
def read_text(contextual: Contextual, ids_T: Tensor, prompt: int) -> ReadText:
    """Read one text, of which the first `prompt` tokens are prefill.

    The last of `contextual.records` is the account of this text.
    """
    from transformers import DynamicCache

    model, running, ids_1T = contextual.model, contextual.shadow.running, ids_T[None]
    cache, rest_1T = DynamicCache(config=model.config), ids_1T[:, prompt:]
    states = FinalStates(model)

    def read(ids: Tensor) -> Tensor:
        return states.run(ids, past_key_values=cache, use_cache=True)

    chunks = [read(ids_1T[:, :prompt])]
    if rest_1T.shape[1] and (running.refresh_tokens or prompt < running.min_prompt):
        chunks += map(read, rest_1T.split(1, dim=1))
    elif rest_1T.shape[1]:
        active = contextual.choose(in_place=False)  # products that read rows in place are for few tokens
        if active is not None and active.heads_BLG is not None:
            cut_cache(cache, active.heads_BLG)
        with contextual.applied(active):
            chunks.append(read(rest_1T))
        if active is not None:
            active.blocks.account(contextual.records[-1])
        contextual.records[-1].count(rest_1T.shape[1], sparse=active is not None)
    return ReadText(contextual, states, ids_1T, torch.cat(chunks, dim=1))
