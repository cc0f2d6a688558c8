"""Trellis-coded columns as they are stored: a ring of bits per column and tile, 256 levels, and a scale per row.

A ring holds 32 rows of one column with K bits each, from 1 to 4. The state of a row is the byte that begins at its own
bits: `state_r = (ring >> K·r) mod 256`, and the end of the ring continues at its beginning. So neighboring rows share
most of their bits. The weight is `level[state] · scale`. A row chooses among 2^K levels, and all 256 are in use. So a
trellis loses less than a grid of 2^K levels. At two bits it loses 8 % of the energy of normal weights instead of 12 %.

    ring of 2 bits   r0 r0 r1 r1 r2 r2 r3 r3 r4 r4 …       state of row 1: r1 r1 r2 r2 r3 r3 r4 r4

A matrix is one part, or two parts with columns of different K. Every bit pattern is a valid ring.

Legend: O outputs, C columns of a part, T tiles of 32 rows, U rows of whole tiles, S states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from niwaki.formats.quantized import SCALE_DTYPE, TILE, pack_codes, unpack_codes

RING = TILE  # rows whose bits form a ring
STATE_BITS = 8
STATES: int = 2**STATE_BITS
MAX_TRELLIS_BITS = 4
MAX_LEVEL = 127


@dataclass(frozen=True)
class TrellisColumns:
    """Some columns of a matrix: weight = level · scale, the level of its state and the scale of its row.

    `state_UC` (uint8) has whole tiles of rows. `level_S` is int8, and `scale_O` float16.
    """

    columns_C: Tensor
    bits: int
    state_UC: Tensor
    level_S: Tensor
    scale_O: Tensor

    def decode(self) -> Tensor:
        """Return the weights [O, C] in float32."""
        return self.level_S.float()[self.state_UC[: len(self.scale_O)].int()] * self.scale_O.float()[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name: rings [T, C, 4·K], levels [256] and scales [1, O]."""
        return {
            "rings": pack_rings(self.state_UC, self.bits),
            "levels": self.level_S.view(torch.uint8),
            "scale": self.scale_O.to(SCALE_DTYPE)[None].contiguous().view(torch.int16),
        }

    def describe(self) -> dict[str, Any]:
        """Return the description that a reader needs beside the tensors."""
        return {"bits": self.bits, "columns": len(self.columns_C)}


def pack_rings(state_UC: Tensor, bits: int) -> Tensor:
    """Pack states into rings [T, C, 4·K] uint8. The K bits from K·r on are the lowest ones of the state of row r."""
    state_TRC = state_UC.view(-1, RING, state_UC.shape[1])
    places_K = torch.arange(bits, dtype=torch.uint8, device=state_UC.device)
    bits_TCRK = (state_TRC.transpose(1, 2)[..., None] >> places_K) & 1
    lanes_8 = torch.arange(8, dtype=torch.uint8, device=state_UC.device)
    bytes_TCB8 = bits_TCRK.flatten(2).unflatten(2, (-1, 8))
    packed: Tensor = (bytes_TCB8 << lanes_8).sum(-1, dtype=torch.uint8)
    return packed


def unpack_rings(rings_TCB: Tensor) -> Tensor:
    """Return the states [U, C] uint8 that `pack_rings` packed."""
    bits = rings_TCB.shape[2] * 8 // RING
    lanes_8 = torch.arange(8, dtype=torch.uint8, device=rings_TCB.device)
    bits_TCN = ((rings_TCB[..., None] >> lanes_8) & 1).flatten(2)
    bits_TCN = torch.cat([bits_TCN, bits_TCN[..., :STATE_BITS]], dim=2)
    state_TCR = torch.zeros(*rings_TCB.shape[:2], RING, dtype=torch.uint8, device=rings_TCB.device)
    for place in range(STATE_BITS):
        state_TCR |= bits_TCN[..., place : place + bits * RING : bits] << place
    return state_TCR.transpose(1, 2).reshape(-1, rings_TCB.shape[1])


def stored_trellis(parts: Sequence[TrellisColumns], columns: int) -> dict[str, Tensor]:
    """Return the tensors of all parts of a matrix, and of two parts also the mask of the first part's columns."""
    tensors = {f"{name}_{number}": t for number, part in enumerate(parts) for name, t in part.tensors().items()}
    if len(parts) > 1:
        first_I = torch.zeros(columns, dtype=torch.uint8)
        first_I[parts[0].columns_C.cpu()] = 1
        tensors["columns"] = pack_codes(first_I, 1)[0]
    return tensors


def trellis_columns(tensors: Mapping[str, Tensor], parts: int, columns: int) -> list[Tensor]:
    """Return the columns of every part."""
    if parts == 1:
        return [torch.arange(columns, device=tensors["rings_0"].device)]
    first_I = unpack_codes(tensors["columns"][None], columns).bool()
    return [first_I.nonzero().view(-1), (~first_I).nonzero().view(-1)]


def read_trellis(
    tensors: Mapping[str, Tensor], described: Sequence[Mapping[str, Any]], columns: int
) -> list[TrellisColumns]:
    """Return the parts that `stored_trellis` wrote, from their `describe()`."""
    return [
        TrellisColumns(
            columns_C,
            about["bits"],
            unpack_rings(tensors[f"rings_{number}"]),
            tensors[f"levels_{number}"].view(torch.int8),
            tensors[f"scale_{number}"].view(SCALE_DTYPE)[0],
        )
        for number, (about, columns_C) in enumerate(
            zip(described, trellis_columns(tensors, len(described), columns), strict=True)
        )
    ]


def assemble_trellis(parts: Sequence[TrellisColumns]) -> Tensor:
    """Return the matrix [O, I] in float32."""
    if len(parts) == 1:
        return parts[0].decode()
    columns = sum(len(part.columns_C) for part in parts)
    weight_OI = parts[0].scale_O.new_empty((len(parts[0].scale_O), columns), dtype=torch.float32)
    for part in parts:
        weight_OI[:, part.columns_C] = part.decode()
    return weight_OI


def trellis_bytes(rows: int, counts: Mapping[int, int]) -> int:
    """Return the bytes of a matrix with these numbers of columns by bits, as `stored_trellis` stores it."""
    parts = {bits: count for bits, count in counts.items() if count}
    rings: int = sum(-(-rows // RING) * RING * bits * count // 8 for bits, count in parts.items())
    mask = -(-sum(parts.values()) // 8) if len(parts) > 1 else 0
    return rings + len(parts) * (STATES + 2 * rows) + mask
