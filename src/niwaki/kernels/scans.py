"""Passes over the values of packed matrices in the compiled kernels, at the bandwidth of the memory.

A descriptor (`formats.descriptors`) takes them for tensors on the CPU:

    descriptor.check(tensors, scans_for(tensors))
"""

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from niwaki.formats.scans import Scans, TorchScans
from niwaki.formats.sparse import KINDS
from niwaki.kernels.cpu_module import as_array, cpu_module

_HALVES = KINDS.index("float16")


class CompiledScans:
    """The passes of `formats.scans.Scans` in C++: they read every byte once and copy none."""

    def __init__(self, compiled: ModuleType) -> None:
        self._compiled = compiled

    def halves_finite(self, values: Tensor) -> bool:
        """Implement `Scans.halves_finite`."""
        return bool(self._compiled.all_finite(_bytes_of(values), values.numel(), _HALVES))

    def values_finite(self, bytes_N: Tensor, count: int, kind: str) -> bool:
        """Implement `Scans.values_finite`."""
        return bool(self._compiled.all_finite(_bytes_of(bytes_N), count, KINDS.index(kind)))

    def pairs_ascend(self, places_OB: Tensor) -> bool:
        """Implement `Scans.pairs_ascend`."""
        return bool(self._compiled.pairs_ascend(_bytes_of(places_OB)))

    def tile_pairs_ascend(self, places_TBR: Tensor, rows: int) -> bool:
        """Implement `Scans.tile_pairs_ascend`."""
        return bool(self._compiled.tile_pairs_ascend(_bytes_of(places_TBR), rows))

    def bitmap(self, places_OB: Tensor, columns: int, starts_O: Tensor) -> tuple[int, bool, bool]:
        """Implement `Scans.bitmap`."""
        count, beyond, ordered = self._compiled.scan_bitmap(_bytes_of(places_OB), columns, as_array(starts_O))
        return int(count), bool(beyond), bool(ordered)


def _bytes_of(tensor: Tensor) -> object:
    """Return the bytes of a tensor for C++, which reads them from any address."""
    return tensor.contiguous().view(torch.uint8).numpy()


def scans_for(tensors: Mapping[str, Tensor]) -> Scans:
    """Return the fastest passes for these tensors: those in torch without compiled kernels, or on another device."""
    compiled = cpu_module() if all(tensor.device.type == "cpu" for tensor in tensors.values()) else None
    return TorchScans() if compiled is None else CompiledScans(compiled)
