"""Observer of all products of an activation and a weight, whichever module or operation computes them.

The observer is a torch function mode and knows no layer class. `nn.Linear`, the `Conv1D` of GPT-2, `x @ weight.T` of
Falcon and the slices of fused 3-D expert tensors all end in one of a few products. The observer recognizes the weight
operand by its memory address.

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Observe = Callable[[str, Tensor, bool], None]


class MatmulObserver(TorchFunctionMode):
    """Function mode that calls `observe(name, x, transposed)` when `x` [..., I] is multiplied with the weight `name`.

    `pointers` maps the address of the first element of a weight to its name. `transposed` is True if the weight is
    stored [I, O] (used as `x @ W`), not [O, I]. A `dry` observer returns zeros and does not multiply, so it probes
    weights of any size without access to their memory.
    """

    def __init__(self, pointers: Mapping[int, str], observe: Observe, *, dry: bool = False) -> None:
        super().__init__()
        self.pointers = pointers
        self.observe = observe
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
                self.observe(name, x, stored_IO)
                if self.dry:
                    return x.new_zeros(*x.shape[:-1], weight.shape[1 if product else 0])
        return func(*args, **kwargs)


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, bool] | None:
    """Return activation, weight, and True for `x @ weight` or False for `x @ weight.T`; None for another call."""
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
