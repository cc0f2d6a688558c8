"""Thresholds of the inputs of tiny models, and a slow reference that masks activations."""

from typing import Any

import torch
from torch import Tensor

from niwaki.model.anatomy import discover, find_blocks
from niwaki.model.hf import build_skeleton
from niwaki.runtime.contextual.places import Place, find_places, skipped_frac
from niwaki.runtime.contextual.predictor_files import InputShadow, Running
from support.contextual import ids_of


def places_of(model: Any) -> list[Place]:
    return find_places(discover(build_skeleton(model.config, torch.float32)))


def input_shadow_of(model: Any, *, quantile: float = 0.5, scaled: bool = False, **running: Any) -> InputShadow:
    """Return thresholds at a quantile of the inputs of random text; `scaled`: with random scales of the inputs."""
    places, blocks = places_of(model), find_blocks(model)[1]
    seen: dict[int, Tensor] = {}
    handles = [
        blocks[place.block]
        .get_submodule(place.names[0])
        .register_forward_pre_hook(lambda _, args, index=index: seen.__setitem__(index, args[0].abs().flatten()))
        for index, place in enumerate(places)
    ]
    with torch.no_grad():
        model(input_ids=ids_of(2, 24, seed=3))
    for handle in handles:
        handle.remove()
    threshold_P = torch.stack([seen[index].float().quantile(quantile) for index in range(len(places))])
    generator = torch.Generator().manual_seed(0)
    scale_N = 0.5 + torch.rand(sum(place.inputs for place in places), generator=generator) if scaled else None
    own = Running(**{"mean_fill": 0.0, **running})
    return InputShadow(tuple(places), (quantile,) * len(places), threshold_P, own, scale_N)


def masked_input_logits(model: Any, ids_BT: Tensor, prompt: int, shadow: InputShadow) -> tuple[Tensor, float]:
    """Return logits of one forward with small inputs at zero from token `prompt` on, and the share of the weights."""
    blocks, handles, skipped = find_blocks(model)[1], [], [0.0] * len(shadow.places)

    def hook(index: int) -> Any:
        def masked(_module: Any, args: tuple[Any, ...]) -> Any:
            x_BTI = args[0].reshape(*ids_BT.shape, -1).clone()
            small_BTI = x_BTI.abs() <= shadow.limits[index]
            small_BTI[:, :prompt] = False
            skipped[index] = float(small_BTI[:, prompt:].double().mean())
            return (x_BTI.masked_fill(small_BTI, 0).view(args[0].shape),)

        return masked

    for index, place in enumerate(shadow.places):
        layers = [blocks[place.block].get_submodule(name) for name in place.names]
        handles += [layer.register_forward_pre_hook(hook(index)) for layer in layers]
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, skipped_frac(shadow.places, skipped)
