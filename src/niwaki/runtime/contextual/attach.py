"""Attachment of a contextual runtime to a transformers model: checks that both belong together, and adds the hooks."""

from typing import Any

import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.model.anatomy import discover, find_blocks
from niwaki.model.hf import build_skeleton, resize
from niwaki.runtime.contextual.compact import check_linears
from niwaki.runtime.contextual.inputs import TokenContextual, check_places
from niwaki.runtime.contextual.predictor_files import InputShadow, Shadow
from niwaki.runtime.contextual.sparsity import Contextual
from niwaki.runtime.contextual.units import UnitLayout, find_layout


def attach(model: Any, shadow: Shadow | InputShadow, *, in_place: bool | None = None) -> Contextual:
    """Make `model` skip what its inputs do not need, and return the handle.

    Raises InputError if the predictor is of another model, and ArchitectureError for matrices that cannot be cut.
    """
    if isinstance(shadow, InputShadow):
        check_places(find_blocks(model)[1], shadow.places)
        contextual: Contextual = TokenContextual(model, shadow)
    else:
        contextual = Contextual(model, shadow, in_place=in_place)
        _check(contextual, shadow)
    model.register_forward_pre_hook(contextual.before, with_kwargs=True)
    model.register_forward_hook(contextual.after, with_kwargs=True, always_call=True)
    return contextual


def _check(contextual: Contextual, shadow: Shadow) -> None:
    """Raise an error if the predictor is not of this model."""
    if len(contextual.blocks) != shadow.layout.blocks:
        raise InputError(
            f"the predictor is of a model with {shadow.layout.blocks} blocks, this one has {len(contextual.blocks)}"
        )
    check_linears(contextual.blocks, shadow.layout)
    _check_units(contextual.model, contextual.blocks, shadow.layout)
    consumer: Any = contextual.blocks[0].get_submodule(shadow.layout.units["heads"].consumer)
    width: int = consumer.in_features
    sizes = {"last": width, "mean": width, "prompt": shadow.layout.size}
    if (inputs := sum(sizes[name] for name in shadow.predictor.features)) != len(shadow.predictor.center_F):
        raise InputError(f"the predictor takes {len(shadow.predictor.center_F)} features, this model has {inputs}")


def _check_units(model: Any, blocks: nn.ModuleList, layout: UnitLayout) -> None:
    """Raise InputError if the units are not those of this model: kernels would read rows that it lacks."""
    skeleton = build_skeleton(model.config, torch.float32)
    path, own_blocks = find_blocks(skeleton)
    shapes = {}
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            like: Any = own_blocks.get_submodule(name)
            if (module.out_features, module.in_features) != (like.out_features, like.in_features):
                shapes[f"{path}.{name}"] = [module.out_features, module.in_features]
    resize(skeleton, shapes)
    own = find_layout(discover(skeleton), skeleton, layout.width)
    for kind, unit in own.units.items():
        if unit != layout.units[kind] or own.weights[kind] != layout.weights[kind]:
            raise InputError(f"the predictor has other {kind} than this model: compress the model again")
