"""Masks of the inputs of matrices after a prompt: which inputs a rule skips, and a model that runs under such rules.

A place is the set of matrices of one block that read the same input. A rule says which share of the inputs is skipped,
when the choice is made, and by what score. The prompt runs dense. The choices, `WHEN`:

- `prompt`: once, by the tokens of the prompt
- `16 tokens` and `1 token`: again every 16 tokens and every token, by the `memory` tokens before
- `token`: every token by its own input, which is known before the product
- `token, threshold`: as `token`, by a threshold measured before and not by rank, so that the share is one on average
- `prompt, oracle` and `16 tokens, oracle`: by the tokens that the mask is for; ceilings, no methods

The scores: `size` is the square of the input, `weighted` multiplies it by the square of the norm of its weights.
`centred` takes the distance from the mean of the input in calibration text, which also stands in for what is skipped.

Legend: B sequences, T tokens, C inputs of a matrix, U units of equal numbers of neighbouring inputs (one, or a head's).

    masks = InputMasks(model, find_places(decoder, model), prompt=128)
    logits = masks.logits(ids_BT, {place: Rule(0.5, "token") for place in masks.places})
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from niwaki.model.decoder import Decoder
from niwaki.model.prunable import block_units

RENEWED = {"16 tokens": 16, "1 token": 1, "16 tokens, oracle": 16}
WHEN = ("prompt", "prompt, oracle", *RENEWED, "token", "token, threshold")
SCORES = ("size", "weighted", "centred")


@dataclass(frozen=True)
class Rule:
    """The share of inputs to skip, when they are chosen (`WHEN`), by what score, and in how many units."""

    share: float
    when: str = "token"
    score: str = "size"
    units: int | None = None


@dataclass(frozen=True, eq=False)
class Place:
    """The matrices `names` of one block that read the same input; norms2_C are the squared norms of its weights."""

    block: int
    kind: str
    names: tuple[str, ...]
    weights: int
    norms2_C: Tensor


def find_places(decoder: Decoder, model: Any) -> list[Place]:
    """Return the places of a dense decoder whose weights `model` holds: qkv, o, gate/up (or up) and down by block."""
    places = []
    for index, block in enumerate(decoder.anatomy.blocks):
        units = block_units(block, decoder.checkpoint.config)
        heads, neurons = units["heads"], units["neurons"]
        up = "gate/up" if len(neurons.producers) > 1 else "up"
        kinds = {heads.producers[0]: "q/k/v", heads.consumer: "o", neurons.producers[0]: up, neurons.consumer: "down"}
        prefix = decoder.anatomy.prefix(index)
        for group in block.sharing(block.linears):
            kind = next(kinds[name] for name in group if name in kinds)
            views = [block.linears[n].view(model.get_parameter(prefix + block.linears[n].parameter)) for n in group]
            norms2_C = sum(view.detach().float().square().sum(0) for view in views)
            weights = sum(view.numel() for view in views)
            places.append(Place(index, kind, tuple(prefix + name for name in group), weights, norms2_C))
    return places


def skipped_bytes(rules: Mapping[Place, Rule], places: Sequence[Place]) -> float:
    """Return the share of all weights that the rules do not read."""
    return sum(rule.share * place.weights for place, rule in rules.items()) / sum(p.weights for p in places)


def chosen_by(score_BTU: Tensor, prompt: int, when: str, memory: int) -> Tensor:
    """Return the values [B, T - prompt or 1, U] that the masks of the tokens after the prompt are chosen by."""
    after_BTU = score_BTU[:, prompt:]
    if when.startswith("token"):
        return after_BTU
    if when.startswith("prompt"):
        return (after_BTU if when.endswith("oracle") else score_BTU[:, :prompt]).mean(1, keepdim=True)
    every = RENEWED[when]
    if when.endswith("oracle"):
        means_BNU = after_BTU.unflatten(1, (-1, every)).mean(2)
    else:
        means_BNU = score_BTU[:, prompt - memory : -every].unfold(1, memory, every).mean(3)
    return means_BNU.repeat_interleave(every, dim=1)


def keep_largest(value_BTU: Tensor, share: float) -> Tensor:
    """Return the mask of all units but the given share with the smallest values."""
    count = value_BTU.shape[2] - round(share * value_BTU.shape[2])
    kept = value_BTU.topk(count, dim=2, sorted=False).indices
    return torch.zeros_like(value_BTU, dtype=torch.bool).scatter_(2, kept, True)


def score_of(x_BTC: Tensor, rule: Rule, place: Place, mean_C: Tensor | None) -> Tensor:
    """Return the score [B, T, U] of every unit of an input."""
    if rule.score == "centred":
        x_BTC = x_BTC - mean_C
    score_BTC = x_BTC.square() * place.norms2_C.to(x_BTC) if rule.score == "weighted" else x_BTC.square()
    return score_BTC if rule.units is None else score_BTC.unflatten(2, (rule.units, -1)).sum(3)


class InputMasks:
    """A model, its places, and hooks that mask the inputs of the places after the prompt.

    `means` holds the mean input of a place, for `centred`; `thresholds` the threshold of a place, a share and a score.
    """

    def __init__(self, model: Any, places: Sequence[Place], prompt: int, memory: int = 16) -> None:
        self.model, self.places, self.prompt, self.memory = model, places, prompt, memory
        self.means: dict[Place, Tensor] = {}
        self.thresholds: dict[tuple[Place, float, str], Tensor] = {}

    def masked(self, x_BTC: Tensor, place: Place, rule: Rule) -> Tensor:
        """Return the input with what the rule skips after the prompt at zero, or at the mean for `centred`."""
        mean_C = self.means.get(place)
        score_BTU = score_of(x_BTC, rule, place, mean_C)
        value_BTU = chosen_by(score_BTU, self.prompt, rule.when, self.memory)
        if rule.when == "token, threshold":
            kept = value_BTU > self.thresholds[place, rule.share, rule.score]
        else:
            kept = keep_largest(value_BTU, rule.share)
        if rule.units is not None:
            kept = kept.repeat_interleave(x_BTC.shape[2] // rule.units, dim=2)
        fill = mean_C if rule.score == "centred" else x_BTC.new_zeros(())
        return torch.cat([x_BTC[:, : self.prompt], torch.where(kept, x_BTC[:, self.prompt :], fill)], dim=1)

    def logits(self, ids_BT: Tensor, rules: Mapping[Place, Rule]) -> Tensor:
        """Return the logits [B, T - prompt, V] of the tokens after the prompt under the rules."""
        return self._run(ids_BT, lambda place, x_BTC: self.masked(x_BTC, place, rules[place]), list(rules))

    def observe(self, ids_BT: Tensor, see: Callable[[Place, Tensor], None]) -> None:
        """Show the input [B, T, C] of every place in the dense model."""
        self._run(ids_BT, see, self.places)

    def _run(self, ids_BT: Tensor, change: Callable[[Place, Tensor], Tensor | None], places: Sequence[Place]) -> Tensor:
        handles = []
        for place in places:
            hook = _shared(place, change, ids_BT.shape)
            handles += [self.model.get_submodule(name).register_forward_pre_hook(hook) for name in place.names]
        try:
            with torch.no_grad():
                found = self.model(
                    input_ids=ids_BT, use_cache=False, logits_to_keep=ids_BT.shape[1] - self.prompt
                ).logits
        finally:
            for handle in handles:
                handle.remove()
        return found.float()


def _shared(place: Place, change: Callable[[Place, Tensor], Tensor | None], shape: torch.Size) -> Callable[..., Any]:
    """Return a hook that changes the input once for all matrices of a place."""
    last: list[Any] = [None, None]

    def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if last[0] is not args[0]:
            changed = change(place, args[0].reshape(*shape, -1))
            last[:] = args[0], None if changed is None else (changed.view(args[0].shape),)
        return last[1]

    return hook
