"""Passes over the values of packed matrices for their descriptors, in torch on any device.

The compiled kernels have the same passes at the bandwidth of the memory (`kernels.scans`).

Legend: O outputs, B bytes of eight columns, T tiles of 32 rows, R rows of a tile, N bytes of values.
"""

from typing import Protocol

import torch
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.formats.sparse import VALUES

_HALF_EXPONENT = 0x7C00  # all ones in NaN and infinite float16 numbers
_FIRST_OF_FOUR = 0x1111111111111111  # the lowest bit of every half byte of a word


class Scans(Protocol):
    """The passes that a descriptor needs, over tensors of the right dtypes and shapes."""

    def halves_finite(self, values: Tensor) -> bool:
        """Return whether all numbers are finite: float16 stored as int16."""

    def values_finite(self, bytes_N: Tensor, count: int, kind: str) -> bool:
        """Return whether the first `count` numbers are finite. The kind is one of `VALUES`."""

    def pairs_ascend(self, places_OB: Tensor) -> bool:
        """Return whether the indices of every pair ascend: bits 0 and 1 of a half byte are less than bits 2 and 3."""

    def tile_pairs_ascend(self, places_TBR: Tensor, rows: int) -> bool:
        """Return whether the indices of every pair in tiles ascend: those of neighbouring bytes, two bits each."""

    def bitmap(self, places_OB: Tensor, columns: int, starts_O: Tensor) -> tuple[int, bool, bool]:
        """Return the number of values, whether one lies after the last column, and whether the starts count them."""


class TorchScans:
    """The passes in torch, with some copies of what they read."""

    def halves_finite(self, values: Tensor) -> bool:
        """Implement `Scans.halves_finite`."""
        return not bool(((values & _HALF_EXPONENT) == _HALF_EXPONENT).any())

    def values_finite(self, bytes_N: Tensor, count: int, kind: str) -> bool:
        """Implement `Scans.values_finite`."""
        dtype = VALUES[kind]
        own = bytes_N[: count * dtype.itemsize]
        if not len(own):
            return True
        whole = own if own.storage_offset() % dtype.itemsize == 0 else own.clone()
        # Min and max of a tensor are NaN or infinite exactly if an element is.
        return bool(torch.stack(whole.view(dtype).aminmax()).isfinite().all())

    def pairs_ascend(self, places_OB: Tensor) -> bool:
        """Implement `Scans.pairs_ascend`."""
        words = _words(places_OB)
        low, high, low_2, high_2 = words, words >> 1, words >> 2, words >> 3
        ascends = (high_2 & ~high) | (~(high ^ high_2) & low_2 & ~low)
        missing = ~ascends & _FIRST_OF_FOUR
        if short := -places_OB.shape[-1] % 8:  # the filled bytes hold no pairs
            missing[:, -1] &= (1 << (8 * (8 - short))) - 1
        return not bool(missing.any())

    def tile_pairs_ascend(self, places_TBR: Tensor, rows: int) -> bool:
        """Implement `Scans.tile_pairs_ascend`."""
        words = _words(places_TBR)
        low, high, low_2, high_2 = words, words >> 1, words >> 8, words >> 9
        ascends = (high_2 & ~high) | (~(high ^ high_2) & low_2 & ~low)
        # Row r has the first and the third index of a byte, row 16 + r the others. Missing rows have no pairs.
        here = torch.arange(len(words) * TILE, device=words.device).view(-1, 2, TILE // 2) < rows
        needed = (here[:, 0] * 0x11 | here[:, 1] * 0x44).to(torch.int16).view(torch.int64)
        return not bool((~ascends & needed[:, None]).any())

    def bitmap(self, places_OB: Tensor, columns: int, starts_O: Tensor) -> tuple[int, bool, bool]:
        """Implement `Scans.bitmap`."""
        counts_O = row_counts(places_OB)
        beyond = columns % 8 != 0 and bool((places_OB[:, -1] >> (columns % 8)).any())
        return int(counts_O.sum()), beyond, torch.equal(counts_O.cumsum(0) - counts_O, starts_O.long())


def row_counts(bytes_OB: Tensor) -> Tensor:
    """Return the number of set bits of every row, int64 [O]."""
    words = _words(bytes_OB)
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56).sum(1)  # a byte holds at most 64, so its sign bit is never set


def _words(bytes_OB: Tensor) -> Tensor:
    """Return rows of bytes as rows of 64-bit words; the last word is filled with zeros."""
    short = -bytes_OB.shape[-1] % 8
    whole = torch.nn.functional.pad(bytes_OB, (0, short)) if short else bytes_OB.contiguous()
    return (whole if whole.storage_offset() % 8 == 0 else whole.clone()).view(torch.int64)
