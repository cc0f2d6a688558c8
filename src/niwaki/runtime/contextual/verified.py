"""Writing with a part of the model and checking it with the whole: the greedy text is that of the dense model.

The small matrices write `every` tokens, then the full model reads them in one pass, all at once. What it would have
written too is kept; at the first difference its own token takes the place, what followed is taken back, and the cache
holds what the full model leaves either way. Nothing the small matrices wrote survives unless the full model agrees, so
that with `min_probability` None the result equals greedy decoding of the dense model, whatever the predictor chose:
that decides the speed alone. (This is speculative decoding with a part of the model as its own draft.)

With `min_probability` p a token also stands when the full model gives it at least p, the rule of Sirius (Zhou et al.
2024): fewer tokens are taken back, and the text may differ from the dense one.

Cost: one pass of the full model every `every` tokens beside the small ones. One sequence at a time.

Legend: T tokens, V vocabulary.

    found = write(model, ids_1T, max_new_tokens=128, every=8)
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.runtime.contextual.sparsity import Contextual


@dataclass
class Written:
    """The prompt and its continuation, and what checking found: passes of the full model, tokens drafted, kept and
    taken back, and the sum over the drafted of the divergence KL(full ‖ part).
    """

    ids_1T: Tensor
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    taken_back: int = 0
    divergence: float = 0.0

    @property
    def agreement(self) -> float:
        """The share of drafted tokens that the full model accepted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def kl(self) -> float:
        """Mean KL divergence of the part from the full model, nats a token."""
        return self.divergence / max(self.drafted, 1)


@torch.no_grad()
def write(
    contextual: Contextual,
    ids_1T: Tensor,
    *,
    max_new_tokens: int,
    every: int = 8,
    min_probability: float | None = None,
    ends: Collection[int] = (),
) -> Written:
    """Continues one prompt greedily; `ends` are the tokens that stop it. Raises InputError for impossible settings."""
    from transformers import DynamicCache

    if len(ids_1T) != 1 or ids_1T.shape[1] < 1:
        raise InputError(f"verified writing continues one prompt, got {len(ids_1T)} of {ids_1T.shape[1]} tokens")
    if every < 1 or max_new_tokens < 1 or not (min_probability is None or 0 < min_probability <= 1):
        raise InputError("expected every ≥ 1, max_new_tokens ≥ 1 and min_probability in (0, 1] or None")
    model, found = contextual.model, Written(ids_1T)
    cache = DynamicCache(config=model.config)
    total = ids_1T.shape[1] + max_new_tokens

    def step(ids: Tensor) -> Tensor:
        logits_1V: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits_1V

    following = step(ids_1T).argmax(-1, keepdim=True)
    record = contextual.records[-1]
    while True:
        found.ids_1T = torch.cat([found.ids_1T, following], dim=1)
        if found.ids_1T.shape[1] >= total or following.item() in ends:
            return found
        draft, drafted = [following], []
        for _ in range(min(every, total - found.ids_1T.shape[1])):
            drafted.append(step(draft[-1]))
            draft.append(drafted[-1].argmax(-1, keepdim=True))
            if draft[-1].item() in ends:
                break
        logits_1TV = contextual.verify()
        if logits_1TV is None:  # the full model wrote these itself
            following = _append(found, draft[1:])
            continue
        found.passes += 1
        logits_1TV = logits_1TV[:, -len(drafted) :]
        found.divergence += _divergence(logits_1TV[0], torch.cat(drafted))
        following = _settle(contextual, found, draft, logits_1TV, min_probability)
        record.verified = {"passes": found.passes, "agreement": found.agreement, "kl": found.kl}


def _divergence(full_TV: Tensor, part_TV: Tensor) -> float:
    """Sum over tokens of KL(full ‖ part)."""
    full_TV, part_TV = full_TV.float().log_softmax(-1), part_TV.float().log_softmax(-1)
    return float((full_TV.exp() * (full_TV - part_TV)).sum())


def _append(found: Written, draft: list[Tensor]) -> Tensor:
    """All but the last drafted token join the text; the last is the one that follows."""
    found.ids_1T = torch.cat([found.ids_1T, *draft[:-1]], dim=1)
    return draft[-1]


def _settle(
    contextual: Contextual, found: Written, draft: list[Tensor], logits_1TV: Tensor, min_probability: float | None
) -> Tensor:
    """Keeps what the full model accepts of a draft, of which `draft[0]` is in the text; returns the token to follow."""
    wanted_T = logits_1TV[0].argmax(-1)
    probability_TV = logits_1TV[0].float().softmax(-1)
    drafted_T = torch.cat(draft[1:], dim=1)[0]
    good_T = wanted_T == drafted_T
    if min_probability is not None:
        good_T |= probability_TV.gather(1, drafted_T[:, None])[:, 0] >= min_probability
    count = int(good_T.long().cumprod(0).sum())
    found.drafted += len(drafted_T)
    found.accepted += count
    if count == len(drafted_T):
        return _append(found, draft[1:])
    # The full model read draft[0..count]; its own token follows, and what it read behind that never was.
    unread = len(drafted_T) - 1 - count
    found.taken_back += len(drafted_T) - count
    contextual.take_back(unread)
    found.ids_1T = torch.cat([found.ids_1T, *draft[1 : count + 1]], dim=1)
    return wanted_T[None, count : count + 1]
