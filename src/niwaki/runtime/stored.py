"""Base of packed modules: buffers with the tensors of a descriptor, which are checked before a kernel reads them."""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from niwaki.formats.descriptors import Descriptor
from niwaki.kernels.scans import scans_for

_NUMBERS = count()
_MODULES: "WeakValueDictionary[int, StoredMatrix]" = WeakValueDictionary()


class StoredMatrix(nn.Module):
    """Module whose matrix is stored as the tensors of `descriptor`.

    A graph of torch.compile holds tensors only. It names the module by its `_ticket`, so that it computes with what is
    prepared and checked once, as the module does without a graph.
    """

    descriptor: Descriptor
    _ticket: Tensor
    _names: tuple[str, ...]
    _checked: Tensor | None
    _prepared: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._number()

    def _number(self) -> None:
        """Take a number that no other module of this process has."""
        self._ticket = torch.tensor([next(_NUMBERS)], device="cpu")
        _MODULES[int(self._ticket)] = self

    def register(self, descriptor: Descriptor) -> None:
        """Register empty buffers. Integers are not parameters, and casts of the model leave them as they are."""
        self.descriptor, self._checked, self._prepared = descriptor, None, None
        tensors = descriptor.empty()
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors of the matrix by their names in the file."""
        return {name: self.get_buffer(name) for name in self._names}

    def check(self) -> None:
        """Raise CheckpointError if the tensors are not what their format allows: once after a load or a move."""
        if not torch.compiler.is_compiling() and self._checked is not self._buffers.get(self._names[0]):
            tensors = self.stored()
            self.descriptor.check(tensors, scans_for(tensors))
            self._checked = tensors[self._names[0]]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load and check. Drop what was prepared from the old tensors: torch copies new ones into the same buffers."""
        self._prepared = self._checked = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = any(prefix + name in state_dict for name in self._names)
        if loaded and not any(tensor.is_meta for tensor in self.stored().values()):
            self.check()

    def cpu_product(self, x_NI: Tensor) -> Tensor:
        """Return x Wᵀ + b on the CPU, [N, O] in the dtype of `x_NI`."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what is prepared; copies prepare and check again."""
        return {**self.__dict__, "_prepared": None, "_checked": None, "_ticket": None}

    def __setstate__(self, state: Any) -> None:
        """Restore the state of a copy, which is another module."""
        super().__setstate__(state)
        self._number()


@torch.library.custom_op("niwaki::stored_product", mutates_args=())
def stored_product_op(x_NI: Tensor, ticket: Tensor, rows: int) -> Tensor:
    """Call `cpu_product` of the module with this ticket, in a graph."""
    module = _MODULES.get(int(ticket))
    if module is None:
        raise RuntimeError("the model of this compiled graph is gone: keep it as long as its graph, or compile again")
    return module.cpu_product(x_NI)


@stored_product_op.register_fake
def _(x_NI: Tensor, _ticket: Tensor, rows: int) -> Tensor:
    """Return an empty tensor with shape and dtype of the product."""
    return x_NI.new_empty(x_NI.shape[0], rows)
