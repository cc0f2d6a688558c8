"""Models whose blocks have widths of their own, which no config of transformers can say.

config.json then names, in niwaki's `quantization_config`, the shape of every matrix that the rest of the config would
build differently. Loading builds the model as always, on the meta device, and gives those matrices their shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from niwaki.errors import CheckpointError

HEADS = "num_heads"  # what attention of some families (OPT) keeps; all others count heads by the width they find

Shapes = Mapping[str, Sequence[int]]  # name of an nn.Linear → outputs, inputs


def resize(model: nn.Module, shapes: Shapes) -> None:
    """Gives matrices of a model on the meta device, and the biases beside them, the rows and columns of `shapes`.

    Raises CheckpointError for a name that is no linear layer of this model.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    narrowed: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in shapes.items():
        if name not in linears:
            raise CheckpointError(f"config.json gives {name} a shape, and this model has no such linear layer")
        linear = linears[name]
        if rows != linear.out_features:
            narrowed[name.rpartition(".")[0]] = rows, linear.out_features
        like = linear.weight
        linear.out_features, linear.in_features = rows, columns
        linear.weight = nn.Parameter(like.new_empty(rows, columns), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(like.new_empty(rows), requires_grad=False)
    for name, (rows, before) in narrowed.items():
        attention: Any = model.get_submodule(name)
        if HEADS in vars(attention):
            setattr(attention, HEADS, getattr(attention, HEADS) * rows // before)
