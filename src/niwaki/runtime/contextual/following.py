"""Logits of a text that is given: a prompt that a contextual model reads, and a continuation as if it wrote it itself.

Where one look at the prompt decides everything, all of the continuation runs at once on what was chosen: the numbers
of a pass token by token in two forwards. Where the runtime would look again, or the prompt is too short for a look, it
does go token by token.

Legend: T tokens, V vocabulary.

    logits_TV = follow(niwaki.load("OUT").contextual, ids_T, prompt=128)
"""

import torch
from torch import Tensor

from niwaki.runtime.contextual.compact import cut_cache
from niwaki.runtime.contextual.sparsity import Contextual


@torch.no_grad()
def follow(contextual: Contextual, ids_T: Tensor, prompt: int) -> Tensor:
    """Logits [T, V] of one text, its first `prompt` tokens read. The last of `contextual.records` tells what ran."""
    from transformers import DynamicCache

    model, running, ids_1T = contextual.model, contextual.shadow.running, ids_T[None]
    cache, rest = DynamicCache(config=model.config), ids_1T[:, prompt:]
    found: list[Tensor] = [model(input_ids=ids_1T[:, :prompt], past_key_values=cache, use_cache=True).logits[0]]
    if not rest.shape[1]:
        return found[0]
    if running.refresh_tokens or prompt < running.min_prompt:
        steps = rest.split(1, dim=1)
        found += [model(input_ids=ids_11, past_key_values=cache, use_cache=True).logits[0] for ids_11 in steps]
        return torch.cat(found)
    where, contextual.in_place = contextual.in_place, False  # products that read rows in place are for few tokens
    choice = contextual.choose()
    contextual.in_place = where
    if choice is not None:
        cut_cache(cache, choice.heads_BLG)
    with contextual.applied(choice):
        found.append(model(input_ids=rest, past_key_values=cache, use_cache=True).logits[0])
    contextual.records[-1].count(rest.shape[1], sparse=choice is not None)
    return torch.cat(found)
