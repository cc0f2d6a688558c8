"""Sees every activation that meets a weight, whatever module or operation brings them together.

A tap is a torch function mode. It needs no knowledge of layer classes: `nn.Linear`, GPT-2's `Conv1D`,
Falcon's `x @ weight.T` and the slices of fused 3-D expert tensors all end in one of a few products with
a weight operand, and that operand is recognised by the memory it points to.

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Seen = Callable[[str, Tensor, bool], None]


class MatmulObserver(TorchFunctionMode):
    """Calls `seen(name, x, transposed)` when `x` [..., I] is multiplied with the weight `name`.

    `pointers` maps the address of a weight's first element to its name. `transposed` tells that the weight
    is stored [I, O] (it is used as `x @ W`), not [O, I]. A `dry` tap answers zeros instead of multiplying, so
    that weights of any size can be probed without touching their memory.
    """

    def __init__(self, pointers: Mapping[int, str], seen: Seen, *, dry: bool = False) -> None:
        super().__init__()
        self.pointers = pointers
        self.seen = seen
        self.dry = dry

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = _operands(func, args, kwargs)
        if operands is not None:
            x, weight, product = operands
            name = self.pointers.get(weight.data_ptr()) if weight.dim() == 2 else None
            if name is not None:
                # In `x @ W.T` the view has the strides of a transposed [O, I] weight.
                stored_IO = product and weight.stride(-1) == 1
                self.seen(name, x, stored_IO)
                if self.dry:
                    return x.new_zeros(*x.shape[:-1], weight.shape[1 if product else 0])
        return func(*args, **kwargs)


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, bool] | None:
    """(activation, weight, whether the product is `x @ weight` rather than `x @ weight.T`)."""
    if func is torch.nn.functional.linear:
        found = (args[0], args[1] if len(args) > 1 else kwargs["weight"], False)
    elif func is torch.addmm and len(args) == 3:
        found = (args[1], args[2], True)
    elif func in _PRODUCTS and len(args) == 2:
        found = (args[0], args[1], True)
    else:
        return None
    return found if isinstance(found[1], Tensor) else None


_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm}
