"""Products with pruned matrices (`sparse`, `sparse_tiles`) on a GPU: which kernel, for how many tokens, as operators.

Legend: N tokens, O outputs, I inputs, B bytes of eight columns, C chunks of 64 columns, T tiles of 32 rows, F groups of
four columns, G groups of columns that share a scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 8  # of places, whose first value the table of a bitmap tells
MOST_COLUMNS = 2**16  # that the table counts
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "int8": 8, "int4": 4}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
TILE = 32  # rows


class GpuRecord(NamedTuple):
    """A stored matrix as the kernels take it: its own tensors, and for a bitmap a table beside them.

    `places` [O, B] and `values` in their own dtype, `starts` [O] and `ranks` [O, C] (int16, to be read unsigned) of a
    bitmap, `scale` float16 [O, G], of tiles as `sparse_tiles` has them. `group` is 0 for one scale a row, or none.
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


def gpu_record(
    rows: int,
    columns: int,
    group: int,
    layout: str,
    kind: str,
    places: Tensor,
    values: Tensor,
    starts: Tensor | None,
    scale: Tensor | None,
) -> GpuRecord:
    """What is stored, for the kernels. Nothing is copied; a bitmap gets its table (0.25 bit a weight)."""
    typed = values if kind == "int4" else values.view(DTYPES[kind])
    found = None if scale is None else scale.view(torch.float16)
    ranks = ranks_of(places) if layout == "bitmap" else None
    whole = scale is None or group >= columns
    return GpuRecord(rows, columns, 0 if whole else group, layout, BITS[kind], places, typed, starts, ranks, found)


def ranks_of(places_OB: Tensor) -> Tensor:
    """How many values of its row come before every chunk of a bitmap: [O, C] int16, the bits of unsigned ones."""
    padded = torch.nn.functional.pad(places_OB, (0, -places_OB.shape[1] % CHUNK_BYTES))
    ranks_OC = padded.new_empty(len(padded), padded.shape[1] // CHUNK_BYTES, dtype=torch.int16)
    for some, out in zip(padded.split(1024), ranks_OC.split(1024), strict=True):  # a bounded copy
        counts = _counts(padded.device)[some.int()].view(len(some), -1, CHUNK_BYTES).sum(2, dtype=torch.int32)
        out.copy_((counts.cumsum(1) - counts).to(torch.int32))
    return ranks_OC


def _counts(device: torch.device) -> Tensor:
    """Set bits of all bytes."""
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> bit) & 1).sum(1).to(torch.uint8)
