"""Pruned matrices as they are stored: the remaining weights in row order, and metadata with their columns.

There are two layouts, both with a byte of metadata for every eight columns:

- `bitmap`: bit c mod 8 is set if column c has a value. A row may have any number of values.
- `two_four`: two values for every four columns, and a 2-bit index for each, the lower first, as sparse tensor cores
  take them. A group with fewer values holds zeros.

Values are the weights in the dtype of the checkpoint, or signed codes of 8 or 4 bits. Codes have a float16 scale for
each group of columns of a row.

At half zeros a weight costs, in both layouts, 9 bits with 16-bit values, and 3.125 bits with 4-bit codes in groups
of 128. A bitmap adds the position of the first value of every row.

All tensors are integers: a loader that casts a model to another dtype does not change them. The tensor of the metadata
has the name `places` in the file.

    record = Sparse.encode(weight_OI)
    assert torch.equal(record.decode(), weight_OI.float())

Legend: O outputs, I inputs, B bytes of eight columns, G groups of columns that share a scale, N values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from niwaki.formats.quantized import SCALE_DTYPE, QuantizedColumns, centre, widen

LAYOUTS = ("bitmap", "two_four")
VALUES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CODES = {"int8": 8, "int4": 4}
BITS = {name: 8 * dtype.itemsize for name, dtype in VALUES.items()} | CODES
KINDS = (*VALUES, *CODES)  # in the order of the kernels' arguments
SLACK_BYTES = 64  # after the values; kernels may read them
FAST_SHARE = 1.25  # two-four with 4-bit codes may take this share of a bitmap's bytes: its tiles are far faster
MAX_VALUES = 2**31 - 1  # positions of values are int32


@dataclass(frozen=True)
class Sparse:
    """Pruned matrix [rows, columns] as the tensors of its file (see the module), with its description.

    `metadata_OB` uint8, `values_N` uint8 with `SLACK_BYTES` after them, `starts_O` int32 for a bitmap, `scale_OG` int16
    (the bits of float16) for codes.
    """

    columns: int
    layout: str
    values: str
    group: int
    metadata_OB: Tensor
    values_N: Tensor
    starts_O: Tensor | None = None
    scale_OG: Tensor | None = None

    @classmethod
    def encode(cls, weight_OI: Tensor, dtype: torch.dtype | None = None, layout: str | None = None) -> "Sparse":
        """Store the nonzeros of a matrix as values of `dtype` (default: its own) in `layout` (default: the best)."""
        weight_OI = weight_OI.detach().cpu()
        dtype = dtype or weight_OI.dtype
        name = next(name for name, known in VALUES.items() if known == dtype)
        cast_OI = weight_OI.to(dtype)
        return cls._store(cast_OI, cast_OI != 0, layout, name, 0, None)

    @classmethod
    def encode_codes(
        cls, part: QuantizedColumns, keep_OI: Tensor | None = None, layout: str | None = None
    ) -> "Sparse | None":
        """Store the codes of a quantized matrix where `keep_OI`, by default all that are not zero; None if impossible.

        Possible for one symmetric grid of 4 or 8 bits, in groups of whole bytes of columns.
        """
        columns = part.code_OC.shape[1]
        name = next((name for name, bits in CODES.items() if bits == part.bits), None)
        if name is None or part.grid != "symmetric" or (part.group < columns and part.group % 8):
            return None
        signed_OI = (part.code_OC.cpu().to(torch.int16) - int(centre(part.bits, part.grid))).to(torch.int8)
        keep_OI = signed_OI != 0 if keep_OI is None else keep_OI.cpu() & (signed_OI != 0)
        scale_OG = part.scale_OG.to(SCALE_DTYPE).cpu().contiguous().view(torch.int16)
        return cls._store(signed_OI, keep_OI, layout, name, part.group, scale_OG)

    @classmethod
    def _store(
        cls, stored_OI: Tensor, keep_OI: Tensor, layout: str | None, values: str, group: int, scale_OG: Tensor | None
    ) -> "Sparse":
        columns = stored_OI.shape[1]
        stored_OI, keep_OI = (torch.nn.functional.pad(t, (0, -columns % 8)) for t in (stored_OI, keep_OI))
        layout = layout or best_layout(keep_OI, 8 * stored_OI.element_size() if values != "int4" else 4)
        if layout == "two_four":
            keep_OI = _fill_two(keep_OI)
            metadata_OB, starts_O = _indices(keep_OI), None
        else:
            metadata_OB, counts_O = _bits(keep_OI), keep_OI.sum(1)
            assert int(counts_O.sum()) <= MAX_VALUES, "a matrix of 2³¹ values"
            starts_O = (counts_O.cumsum(0) - counts_O).to(torch.int32)
        values_N = _as_bytes(stored_OI[keep_OI], values)
        values_N = torch.nn.functional.pad(values_N, (0, SLACK_BYTES))
        return cls(columns, layout, values, group, metadata_OB, values_N, starts_O, scale_OG)

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name."""
        tensors = {"places": self.metadata_OB, "values": self.values_N, "starts": self.starts_O, "scale": self.scale_OG}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def describe(self) -> dict[str, Any]:
        """Return the description that a reader needs beside the tensors."""
        about: dict[str, Any] = {"layout": self.layout, "values": self.values, "bytes": len(self.values_N)}
        about |= {"group": self.group} if self.group else {}
        return {"shape": [len(self.metadata_OB), self.columns], "sparse": about}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> "Sparse":
        """Return the record with these `tensors()` and this `describe()`."""
        kind = about["sparse"]
        return cls(
            about["shape"][1],
            kind["layout"],
            kind["values"],
            kind.get("group", 0),
            tensors["places"],
            tensors["values"],
            tensors.get("starts"),
            tensors.get("scale"),
        )

    def rows(self, first: int, last: int) -> "Sparse":
        """Return rows [first, last) as a record without a copy; its values may continue after those of the rows."""
        starts_O, scale_OG = self.starts_O, self.scale_OG
        at = 4 * first * self.metadata_OB.shape[1] if starts_O is None else int(starts_O[first])
        offset = at % 2 if self.values == "int4" else 0
        return Sparse(
            self.columns,
            self.layout,
            self.values,
            self.group,
            self.metadata_OB[first:last],
            self.values_N[_bytes_of(at - offset, self.values) :],
            None if starts_O is None else starts_O[first:last] - (at - offset),
            None if scale_OG is None else scale_OG[first:last],
        )

    def decode(self) -> Tensor:
        """Return the matrix [O, I] in float32."""
        keep_OI = _kept(self.metadata_OB, self.layout)
        first = 0 if self.starts_O is None or not len(self.starts_O) else int(self.starts_O[0])
        count = int(keep_OI.sum())
        weight_OI = keep_OI.new_zeros(keep_OI.shape, dtype=torch.float32)
        weight_OI[keep_OI] = _from_bytes(self.values_N, self.values, first + count)[first:].float()
        weight_OI = weight_OI[:, : self.columns]
        if self.scale_OG is None:
            return weight_OI
        return weight_OI * widen(self.scale_OG.view(SCALE_DTYPE).float(), self.group, self.columns)


def sparse_bytes(rows: int, columns: int, count: int, value_bits: int, layout: str) -> int:
    """Return the bytes of `count` values of a matrix and their metadata; two_four stores two of every four columns."""
    metadata = rows * -(-columns // 8)
    count, starts = (4 * metadata, 0) if layout == "two_four" else (count, 4 * rows)
    return metadata + starts + -(-count * value_bits // 8) + SLACK_BYTES


def fits_two_four(keep_OI: Tensor) -> bool:
    """Return whether each four neighbours of a row keep at most two; missing columns count as zeros."""
    padded_OI = torch.nn.functional.pad(keep_OI, (0, -keep_OI.shape[1] % 4))
    return int(padded_OI.view(len(keep_OI), -1, 4).sum(-1).max()) <= 2


def best_layout(keep_OI: Tensor, value_bits: int) -> str:
    """Return the layout with fewer bytes, or two_four if it fits, has few bytes more and is faster.

    In 2:4 matrices some kept weights round to zero. A bitmap leaves these out, two_four does not.
    """
    rows, columns = keep_OI.shape
    bitmap, two_four = (sparse_bytes(rows, columns, int(keep_OI.sum()), value_bits, layout) for layout in LAYOUTS)
    allowed = FAST_SHARE * bitmap if value_bits == 4 else bitmap
    return "two_four" if two_four <= allowed and fits_two_four(keep_OI) else "bitmap"


def _fill_two(keep_OI: Tensor) -> Tensor:
    """Return `keep_OI` with exactly two of every four true: the first false ones fill a group with fewer."""
    keep_OGM = keep_OI.view(len(keep_OI), -1, 4)
    # Kept ones first, each in order of its column: a stable rank of eight numbers.
    order = torch.arange(4, device=keep_OI.device) + 4 * (~keep_OGM).to(torch.int16)
    chosen = order.argsort(-1)[..., :2]
    return torch.zeros_like(keep_OGM).scatter_(-1, chosen, True).view_as(keep_OI)


def _indices(keep_OI: Tensor) -> Tensor:
    """Return two 2-bit indices for every four columns, [O, B] uint8: the lower half byte belongs to the first four."""
    pairs = keep_OI.view(len(keep_OI), -1, 4).nonzero()[:, 2].view(len(keep_OI), -1, 4)
    shifts_4 = torch.arange(0, 8, 2, device=keep_OI.device)
    return (pairs << shifts_4).sum(-1).to(torch.uint8)


def _bits(keep_OI: Tensor) -> Tensor:
    bits_8 = torch.arange(8, dtype=torch.uint8, device=keep_OI.device)
    return (keep_OI.to(torch.uint8).view(len(keep_OI), -1, 8) << bits_8).sum(-1, dtype=torch.uint8)


def _kept(metadata_OB: Tensor, layout: str) -> Tensor:
    """Return a mask of the columns that have a value: boolean [O, 8·B]."""
    device, rows = metadata_OB.device, len(metadata_OB)
    if layout == "bitmap":
        bits_8 = torch.arange(8, dtype=torch.uint8, device=device)
        return ((metadata_OB[..., None] >> bits_8) & 1).bool().view(rows, -1)
    shifts_4 = torch.arange(0, 8, 2, dtype=torch.uint8, device=device)
    index = ((metadata_OB[..., None] >> shifts_4) & 3).view(rows, -1, 2).long()
    return torch.zeros(*index.shape[:2], 4, dtype=torch.bool, device=device).scatter_(-1, index, True).view(rows, -1)


def _as_bytes(values_N: Tensor, kind: str) -> Tensor:
    if kind != "int4":
        return values_N.contiguous().view(torch.uint8)
    low_N = torch.nn.functional.pad(values_N, (0, len(values_N) % 2)).view(torch.uint8) & 15
    return low_N[::2] | (low_N[1::2] << 4)


def _from_bytes(bytes_N: Tensor, kind: str, count: int) -> Tensor:
    """Return the first `count` values."""
    if kind == "int8":
        return bytes_N[:count].view(torch.int8)
    if kind == "int4":
        some_N = bytes_N[: -(-count // 2)]
        codes_N = torch.stack([some_N & 15, some_N >> 4], dim=1).view(-1)[:count].to(torch.int8)
        return torch.where(codes_N < 8, codes_N, codes_N - 16)
    dtype = VALUES[kind]
    return bytes_N[: count * dtype.itemsize].clone().view(dtype)  # a copy: their offset in a file may be odd


def _bytes_of(count: int, kind: str) -> int:
    return count // 2 if kind == "int4" else count * (1 if kind == "int8" else VALUES[kind].itemsize)
