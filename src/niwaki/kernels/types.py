"""Types that the kernels and their callers share: matrices, levels and launches as the kernels take them.

Legend: O rows, I columns, G groups of columns that share a scale, B bytes of eight columns, C columns of a part or
chunks of 64 columns, T tiles of 32 rows, K bits, M parts, P parts of a trellis, S states.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from niwaki.formats.sparse import CODES, VALUES

# Activations that `rows_gate` computes, and the max tokens of the products with kept rows.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
MAX_TOKENS = 8
CHUNK_BYTES = 8  # bytes of places per entry in the rank table of a bitmap
VALUE_BITS = {**{kind: 8 * dtype.itemsize for kind, dtype in VALUES.items()}, **CODES}


@dataclass(frozen=True)
class Grid:
    """Levels code · scale + offset for the codes 0 … top of every column. `group_I` is the scale index of a column."""

    scale_OG: Tensor
    offset_OG: Tensor
    group_I: Tensor
    top_I: Tensor

    def columns(self, start: int, end: int) -> "Grid":
        """Return the grid of the columns [start, end)."""
        return Grid(self.scale_OG, self.offset_OG, self.group_I[start:end], self.top_I[start:end])


@dataclass(frozen=True)
class Fit:
    """Rule that derives the levels of a row from its weights: codes 0 … `top`, scales of at least `smallest`.

    `centre` is the code of zero in a symmetric range. With None the range extends from the lowest weight (or zero) to
    the highest weight (or zero).
    """

    top: int
    centre: float | None
    smallest: float


@dataclass(frozen=True)
class ColumnGroups:
    """Groups of columns that share a scale per row, and the order of the columns.

    The first column of every group and the end of the last one stand in `bounds`, and as int32 in `bounds_G1`. The
    highest codes are `tops_G`. The int64 tensor `order_I` maps every column of V to its column in the matrix.
    """

    bounds: tuple[int, ...]
    bounds_G1: Tensor
    tops_G: Tensor
    order_I: Tensor


@dataclass(frozen=True)
class Levels:
    """Levels of every row and group: offset + scale · {0, …, top}."""

    groups: ColumnGroups
    scale_OG: Tensor
    offset_OG: Tensor

    def by_group(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield the columns, scales [O, 1], offsets [O, 1] and highest code of every group."""
        for number, (start, end) in enumerate(pairwise(self.groups.bounds)):
            scale_O1, offset_O1 = self.scale_OG[:, number, None], self.offset_OG[:, number, None]
            yield slice(start, end), scale_O1, offset_O1, self.groups.tops_G[number]


class NMTarget(Protocol):
    """N:M sparsity: `keep` weights stay in every `group` neighbours."""

    @property
    def keep(self) -> int: ...

    @property
    def group(self) -> int: ...


class PanelParts(NamedTuple):
    """Rows and zeros of every matrix in a panel. `about_M3` (int64) holds first row, rows and zeros on the device."""

    rows: list[int]
    zeros: list[int]
    about_M3: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], zeros: Sequence[int], device: torch.device) -> "PanelParts":
        """Build the parts once for all panels, because a GPU waits for the copy."""
        about = [list(part) for part in zip(accumulate(rows, initial=0), rows, zeros, strict=False)]
        return cls(list(rows), list(zeros), torch.tensor(about, device=device))

    def zeros_within(self, start: int, end: int, columns: int) -> list[int]:
        """Return the zeros of the columns [start, end), spread evenly. The sum over all `columns` is exact."""
        return [zeros * end // columns - zeros * start // columns for zeros in self.zeros]


class PlanePart(NamedTuple):
    """One part of a bit-plane matrix as the kernels take it: the tensors of `quantized`, zero codes uint8 [G, O].

    `columns_C` (int32) maps the columns to inputs; None means all inputs in order.
    """

    planes_TKBR: Tensor
    scale_GO: Tensor
    offset_GO: Tensor | None
    zero_GO: Tensor | None
    columns_C: Tensor | None
    centre: float
    columns: int
    group: int

    def for_gpu(self) -> "PlanePart":
        """Pad rows of scales to words of four, and store `columns_C` by lane: [8, B], −1 for no column."""
        places = self.columns_C
        if places is not None:
            places = torch.nn.functional.pad(places, (0, -len(places) % 8), value=-1).view(-1, 8).T.contiguous()
        scale_GO, offset_GO, zero_GO = (_whole_words(t) for t in (self.scale_GO, self.offset_GO, self.zero_GO))
        assert scale_GO is not None
        return self._replace(scale_GO=scale_GO, offset_GO=offset_GO, zero_GO=zero_GO, columns_C=places)


class TrellisPart(NamedTuple):
    """One part of a matrix that a trellis codes: the stored tensors [T, C, 4·K], [256] and [O] (see `formats.trellis`).

    `columns_C` (int32) maps the columns to inputs; None means all inputs in order.
    """

    rings_TCB: Tensor
    levels_S: Tensor
    scale_O: Tensor
    columns_C: Tensor | None

    @property
    def bits(self) -> int:
        """Return the bits of a weight."""
        return self.rings_TCB.shape[2] // 4


class TrellisLaunch(NamedTuple):
    """Launch of a product with a matrix that a trellis codes."""

    cores: bool  # tensor cores, for 16-bit floats
    warps: int  # of a program
    unroll: int  # columns of a thread in a step
    registers: int | None = None  # of a thread at most


class Codebook(NamedTuple):
    """Levels of one or two parts with their bits, and the scale of every row in each: level[part, state] · scale."""

    bits: Sequence[int]
    level_PS: Tensor
    scale_OP: Tensor


class Start(NamedTuple):
    """Values [O, C] and states [U, C] of columns that a descent begins with; U are O rows in whole rings."""

    value_OC: Tensor
    state_UC: Tensor


Rounded = tuple[Tensor, Tensor]  # states [U, C] of columns, and the change [O, C] of their values


def _whole_words(values_GO: Tensor | None) -> Tensor | None:
    if values_GO is None or values_GO.shape[1] % 4 == 0:
        return values_GO
    return torch.nn.functional.pad(values_GO, (0, -values_GO.shape[1] % 4))


class GpuRecord(NamedTuple):
    """Pruned matrix as the GPU kernels take it: the stored tensors, and the rank table of a bitmap.

    The shape of `places` is [O, B]. The dtype of `values` is the stored one. A bitmap has `starts` [O] and `ranks`
    [O, C]. The float16 `scale` is [O, G], and of tiles in the order of `sparse_tiles`. A `group` of 0 means one scale
    per row, or no scale.
    """

    rows: int
    columns: int
    group: int
    layout: str
    bits: int
    places: Tensor
    values: Tensor
    starts: Tensor | None
    ranks: Tensor | None
    scale: Tensor | None


class TileLaunch(NamedTuple):
    """Launch of a kernel whose program owns one tile of 32 rows."""

    warps: int  # per program
    unroll: int  # bytes of columns in flight per thread
