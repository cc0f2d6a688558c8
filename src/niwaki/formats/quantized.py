"""Quantized columns as they are stored: integer codes, and the scales that turn them into weights.

A matrix is one part, or two parts with columns of different widths (4-bit salient columns beside 1-bit ones).
Codes lie in bit planes: plane k holds bit k of every code. So 1, 2, 3, 4 and 8 bits are one format, and a kernel that
multiplies one plane multiplies all. The file has the layout of the kernels: tiles of 32 rows, with a byte for every
eight columns of a row. All counted bytes are bytes of the file.

Scales and offsets are float16 numbers, stored as the int16 with the same bits. A loader that casts a model to another
dtype does not change them.

Legend: O outputs, I inputs, C columns of a part, G groups of columns that share a scale, K bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

GRIDS = ("affine", "symmetric", "midrise", "free")
SCALE_DTYPE = torch.float16
TILE = 32  # rows side by side
WEIGHT = ".weight"  # suffix of the parameter of a module


@dataclass(frozen=True)
class QuantizedColumns:
    """Some columns of a matrix: weight = code · scale + offset, per row and group of `group` columns.

    The source of the offset depends on `grid`:

    - `affine`: a stored zero code, offset = −zero · scale
    - `symmetric`: the middle code 2^(K−1)
    - `midrise`: the point between the two middle codes
    - `free`: a stored value
    """

    columns_C: Tensor
    bits: int
    grid: str
    group: int
    code_OC: Tensor
    scale_OG: Tensor
    offset_OG: Tensor | None = None
    zero_OG: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.grid in GRIDS
        assert (self.grid == "free") == (self.offset_OG is not None)
        assert (self.grid == "affine") == (self.zero_OG is not None)

    def decode(self) -> Tensor:
        """Return the weights [O, C] in float32."""
        scale_OG = self.scale_OG.float()
        if self.offset_OG is not None:
            offset_OG = self.offset_OG.float()
        elif self.zero_OG is not None:
            offset_OG = -self.zero_OG.float() * scale_OG
        else:
            offset_OG = -centre(self.bits, self.grid) * scale_OG
        sizes = self.code_OC.shape[1]
        return self.code_OC * widen(scale_OG, self.group, sizes) + widen(offset_OG, self.group, sizes)

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name: planes (see `pack_planes`), scales [G, O], and offsets or zero codes."""
        tensors = {"planes": pack_planes(self.code_OC, self.bits), "scale": _as_int16(self.scale_OG)}
        if self.offset_OG is not None:
            tensors["offset"] = _as_int16(self.offset_OG)
        if self.zero_OG is not None:
            tensors["zero"] = pack_codes(self.zero_OG.T, self.bits)
        return tensors

    def describe(self) -> dict[str, Any]:
        """Return the description that a reader needs beside the tensors."""
        return {"bits": self.bits, "grid": self.grid, "group": self.group, "columns": len(self.columns_C)}


def centre(bits: int, grid: str) -> float:
    """Return the code of weight zero on a grid without a stored offset."""
    return 2.0 ** (bits - 1) - (0.5 if grid == "midrise" else 0.0)


def widen(values_OG: Tensor, group: int, columns: int) -> Tensor:
    """Repeat the value of each group for its columns [O, C]; the last group may be shorter."""
    if values_OG.shape[1] == 1:
        return values_OG.expand(-1, columns)
    return values_OG.repeat_interleave(group, dim=1)[:, :columns]


def pack_planes(code_OC: Tensor, bits: int) -> Tensor:
    """Pack codes < 2^K into bit planes [T, K, B, 32] uint8: T tiles of 32 rows, B bytes of eight columns.

    Bit c mod 8 of byte c // 8 belongs to column c; missing rows and columns are zero.
    """
    rows, columns = code_OC.shape
    padded = torch.nn.functional.pad(code_OC.to(torch.uint8), (0, -columns % 8, 0, -rows % TILE))
    code_TRBC = padded.view(-1, TILE, padded.shape[1] // 8, 8)
    lanes_C = torch.arange(8, dtype=torch.uint8, device=code_OC.device)
    planes = [(((code_TRBC >> k) & 1) << lanes_C).sum(-1, dtype=torch.uint8).transpose(1, 2) for k in range(bits)]
    return torch.stack(planes, dim=1).contiguous()


def unpack_planes(planes_TKBR: Tensor, rows: int, columns: int) -> Tensor:
    """Return the codes [O, C] uint8 that `pack_planes` packed."""
    tiles, bits, width, _ = planes_TKBR.shape
    lanes_C = torch.arange(8, dtype=torch.uint8, device=planes_TKBR.device)
    code = torch.zeros(tiles * TILE, width * 8, dtype=torch.uint8, device=planes_TKBR.device)
    for k in range(bits):
        plane_TRB = planes_TKBR[:, k].transpose(1, 2)
        code |= (((plane_TRB[..., None] >> lanes_C) & 1) << k).reshape(code.shape)
    return code[:rows, :columns]


def unpack_rows(planes_TKBR: Tensor, rows_N: Tensor, columns: int) -> Tensor:
    """Return the codes [N, C] uint8 of some rows of `pack_planes`: row r lies in tile r // 32, lane r mod 32."""
    picked_NKB = planes_TKBR[rows_N // TILE, :, :, rows_N % TILE]
    bits_K1 = torch.arange(picked_NKB.shape[1], device=planes_TKBR.device)[:, None]
    code_NB = (_spread(planes_TKBR.device)[picked_NKB.int()] << bits_K1).sum(1)  # eight columns in eight bytes
    return code_NB.view(torch.uint8)[:, :columns]


@cache
def _spread(device: torch.device) -> Tensor:
    """Return [256] int64: for each byte, its eight bits as eight bytes, the lowest bit first in memory."""
    lanes_8 = torch.arange(8, device=device)
    bits_B8 = ((torch.arange(256, device=device)[:, None] >> lanes_8) & 1).to(torch.uint8)
    return bits_B8.view(torch.int64).view(-1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes < 2^K of any shape into K planes [K, ⌈n/8⌉] uint8. Bit i mod 8 of byte i // 8 belongs to code i."""
    flat_N = torch.nn.functional.pad(codes.reshape(-1).to(torch.uint8), (0, -codes.numel() % 8))
    lanes_8 = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [(((flat_N >> k) & 1).view(-1, 8) << lanes_8).sum(-1, dtype=torch.uint8) for k in range(bits)]
    return torch.stack(planes)


def unpack_codes(planes_KB: Tensor, count: int) -> Tensor:
    """Return the first `count` codes of `pack_codes`, [count] uint8."""
    lanes_8 = torch.arange(8, dtype=torch.uint8, device=planes_KB.device)
    codes_N = torch.zeros(planes_KB.shape[1] * 8, dtype=torch.uint8, device=planes_KB.device)
    for k, plane_B in enumerate(planes_KB):
        codes_N |= ((plane_B[:, None] >> lanes_8) & 1).reshape(-1) << k
    return codes_N[:count]


def stored_tensors(parts: Sequence[QuantizedColumns], columns: int) -> dict[str, Tensor]:
    """Return the tensors of all parts of a matrix, and of two parts also the mask of the first part's columns."""
    tensors = {f"{name}_{number}": t for number, part in enumerate(parts) for name, t in part.tensors().items()}
    if len(parts) > 1:
        first_I = torch.zeros(columns, dtype=torch.uint8)
        first_I[parts[0].columns_C.cpu()] = 1
        tensors["columns"] = pack_codes(first_I, 1)[0]
    return tensors


def part_columns(tensors: Mapping[str, Tensor], described: Sequence[Mapping[str, Any]], columns: int) -> list[Tensor]:
    """Return the columns of every part."""
    if len(described) == 1:
        return [torch.arange(columns, device=tensors["planes_0"].device)]
    first_I = unpack_codes(tensors["columns"][None], columns).bool()
    return [first_I.nonzero().view(-1), (~first_I).nonzero().view(-1)]


def read_parts(
    tensors: Mapping[str, Tensor],
    described: Sequence[Mapping[str, Any]],
    columns: int,
    rows_N: Tensor | None = None,
) -> list[QuantizedColumns]:
    """Return the parts that `stored_tensors` wrote, from their `describe()`; only `rows_N` (int64) if given."""
    parts = []
    for number, (about, columns_C) in enumerate(zip(described, part_columns(tensors, described, columns), strict=True)):
        planes_TKBR = tensors[f"planes_{number}"]
        scale_GO = tensors[f"scale_{number}"].view(SCALE_DTYPE)
        offset_GO = tensors.get(f"offset_{number}")
        offset_GO = None if offset_GO is None else offset_GO.view(SCALE_DTYPE)
        zero = tensors.get(f"zero_{number}")
        zero_GO = None if zero is None else _read_zeros(zero, scale_GO.shape, rows_N)
        if rows_N is None:
            code_OC = unpack_planes(planes_TKBR, scale_GO.shape[1], about["columns"])
        else:
            code_OC = unpack_rows(planes_TKBR, rows_N, about["columns"])
            scale_GO, offset_GO = scale_GO[:, rows_N], None if offset_GO is None else offset_GO[:, rows_N]
        parts.append(
            QuantizedColumns(
                columns_C,
                about["bits"],
                about["grid"],
                about["group"],
                code_OC,
                scale_GO.T,
                offset_OG=None if offset_GO is None else offset_GO.T,
                zero_OG=None if zero_GO is None else zero_GO.T,
            )
        )
    return parts


def _read_zeros(planes_KB: Tensor, shape: torch.Size, rows_N: Tensor | None) -> Tensor:
    """Return the zero codes uint8 [G, O], or [G, N] of the rows `rows_N`; `shape` is [G, O]."""
    if rows_N is None:
        return unpack_codes(planes_KB, shape.numel()).view(shape)
    position_GN = torch.arange(shape[0], device=rows_N.device)[:, None] * shape[1] + rows_N
    bits_K11 = torch.arange(len(planes_KB), device=rows_N.device)[:, None, None]
    return (((planes_KB[:, position_GN >> 3] >> (position_GN & 7)) & 1) << bits_K11).sum(0, dtype=torch.uint8)


def assemble(parts: Sequence[QuantizedColumns]) -> Tensor:
    """Return the matrix [O, I] in float32."""
    if len(parts) == 1:
        return parts[0].decode()  # all columns, in order
    rows = len(parts[0].code_OC)
    weight_OI = parts[0].scale_OG.new_empty((rows, sum(len(part.columns_C) for part in parts)), dtype=torch.float32)
    for part in parts:
        weight_OI[:, part.columns_C] = part.decode()
    return weight_OI


def _as_int16(values_OG: Tensor) -> Tensor:
    """Return float16 values as int16 [G, O]: the rows of a tile lie side by side."""
    return values_OG.to(SCALE_DTYPE).T.contiguous().view(torch.int16)
