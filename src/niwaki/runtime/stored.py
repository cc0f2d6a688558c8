"""Base of packed modules: buffers with the tensors of a descriptor, which are checked before a kernel reads them."""

from typing import Any

import torch
from torch import Tensor, nn

from niwaki.formats.descriptors import Descriptor
from niwaki.kernels.scans import scans_for


class StoredMatrix(nn.Module):
    """Module whose matrix is stored as the tensors of `descriptor`."""

    descriptor: Descriptor
    _names: tuple[str, ...]
    _checked: Tensor | None
    _prepared: Any

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
        if self._checked is not self._buffers.get(self._names[0]) and not torch.compiler.is_compiling():
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

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what is prepared; copies prepare and check again."""
        return {**self.__dict__, "_prepared": None, "_checked": None}
