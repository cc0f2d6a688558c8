"""Two-four matrices of 4-bit codes in tiles of 32 rows, as the kernel reads them: the fast form of `sparse`.

A tile has 32 bytes side by side: byte 2·r + j belongs to value j of rows r and 16 + r. For every four columns, a byte
of codes holds the codes of both rows, that of row r in the lower half byte. For every eight columns, a byte of metadata
holds their indices, of two bits each. Row r comes first, the first four columns are in the lower half byte. Scales are
float16, stored as int16, rows side by side. Missing rows hold zeros. A weight costs 3.125 bits in groups of 128
columns. The tensor of the metadata has the name `places` in the file.

Legend: O outputs, I inputs, T tiles, G groups of columns that share a scale, F groups of four columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.formats.sparse import Sparse

LAYOUT = "two_four_tiles"
BLOCK_COLUMNS = 32  # inputs that share a scale in the kernel; groups hold whole blocks
NAMES = ("places", "values", "scale")


@dataclass(frozen=True)
class Tiled:
    """Matrix [rows, columns]: metadata uint8 [T, I/8, 32], values uint8 [T, I/4, 32], scales int16 [G, 32·T]."""

    size: int
    columns: int
    group: int
    metadata_TBR: Tensor
    values_TFR: Tensor
    scale_GO: Tensor

    @classmethod
    def encode(cls, record: Sparse) -> "Tiled | None":
        """Return a record of `sparse` in tiles; None for another kind, or for columns that are not whole blocks."""
        whole = fits_tiles(record.columns, record.group)
        if (record.layout, record.values) != ("two_four", "int4") or not whole or record.scale_OG is None:
            return None
        rows, fours = len(record.metadata_OB), record.columns // 4
        codes_N = record.values_N[: rows * fours]
        codes_OFJ = torch.stack([codes_N & 15, codes_N >> 4], dim=1).view(rows, fours, 2)
        halves_OF = torch.stack([record.metadata_OB & 15, record.metadata_OB >> 4], dim=2).view(rows, fours)
        index_OFJ = torch.stack([halves_OF & 3, halves_OF >> 2], dim=2)
        codes_THFR, index_THFR = _side_by_side(codes_OFJ), _side_by_side(index_OFJ)
        keys_TFR = index_THFR[:, 0] | (index_THFR[:, 1] << 2)
        scale_GO = torch.nn.functional.pad(record.scale_OG.T, (0, -rows % TILE)).contiguous()
        metadata_TBR = keys_TFR[:, ::2] | (keys_TFR[:, 1::2] << 4)
        values_TFR = codes_THFR[:, 0] | (codes_THFR[:, 1] << 4)
        return cls(rows, record.columns, record.group, metadata_TBR, values_TFR, scale_GO)

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name."""
        return {"places": self.metadata_TBR, "values": self.values_TFR, "scale": self.scale_GO}

    def describe(self) -> dict[str, Any]:
        """Return the description that a reader needs beside the tensors."""
        about = {"layout": LAYOUT, "values": "int4", "bytes": self.values_TFR.numel(), "group": self.group}
        return {"shape": [self.size, self.columns], "sparse": about}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> "Tiled":
        """Return the record with these `tensors()` and this `describe()`."""
        rows, columns = about["shape"]
        return cls(rows, columns, about["sparse"]["group"], *(tensors[name] for name in NAMES))

    def rows(self, first: int, last: int) -> "Tiled":
        """Return rows [first, last) as a record; `first` begins a tile."""
        assert first % TILE == 0
        tiles = slice(first // TILE, -(-last // TILE))
        scale_GO = self.scale_GO[:, first : -(-last // TILE) * TILE]
        return Tiled(last - first, self.columns, self.group, self.metadata_TBR[tiles], self.values_TFR[tiles], scale_GO)

    def decode(self) -> Tensor:
        """Return the matrix [O, I] in float32."""
        keys_TFR = torch.stack([self.metadata_TBR & 15, self.metadata_TBR >> 4], dim=2).flatten(1, 2)
        index_OFJ = _in_rows(torch.stack([keys_TFR & 3, keys_TFR >> 2], dim=1))
        codes_OFJ = _in_rows(torch.stack([self.values_TFR & 15, self.values_TFR >> 4], dim=1)).to(torch.int8)
        signed_OFJ = torch.where(codes_OFJ < 8, codes_OFJ, codes_OFJ - 16).float()
        weight_OF4 = signed_OFJ.new_zeros(*signed_OFJ.shape[:2], 4)
        weight_OI = weight_OF4.scatter_(2, index_OFJ.long(), signed_OFJ).flatten(1)
        scale_OG = self.scale_GO.view(torch.float16).T.float()
        scale_OI = scale_OG.repeat_interleave(min(self.group, self.columns), dim=1)[:, : self.columns]
        return (weight_OI * scale_OI)[: self.size]


def fits_tiles(columns: int, group: int) -> bool:
    """Return whether columns and groups are whole blocks."""
    return columns % BLOCK_COLUMNS == 0 and (group >= columns or group % BLOCK_COLUMNS == 0)


def tile_bytes(rows: int, columns: int, group: int) -> int:
    """Return the bytes of a matrix of this shape."""
    padded = -(-rows // TILE) * TILE
    return padded * (columns // 8 + columns // 4 + 2 * -(-columns // group))


def _side_by_side(values_OFJ: Tensor) -> Tensor:
    """Transpose [O, F, 2] to [T, 2, F, 32]: the halves of a tile, and in each the two values of 16 rows."""
    rows, fours, _ = values_OFJ.shape
    padded = torch.nn.functional.pad(values_OFJ, (0, 0, 0, 0, 0, -rows % TILE))
    return padded.view(-1, 2, TILE // 2, fours, 2).transpose(2, 3).reshape(-1, 2, fours, TILE)


def _in_rows(values_THFR: Tensor) -> Tensor:
    """Invert `_side_by_side`, missing rows included."""
    tiles, _, fours, _ = values_THFR.shape
    return values_THFR.view(tiles, 2, fours, TILE // 2, 2).transpose(2, 3).reshape(tiles * TILE, fours, 2)
