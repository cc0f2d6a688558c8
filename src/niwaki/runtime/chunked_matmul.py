"""Many tokens on the CPU: a stored matrix decoded some rows at a time, which are multiplied while a cache holds them.

    y_NO = by_pieces(x_NI, rows, layer, lambda first, last: record.rows(first, last).decode())

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from niwaki.formats.quantized import TILE

DECODED_BYTES = 4 * 2**20  # of the matrix at a time


def by_pieces(x_NI: Tensor, rows: int, layer: Any | None, decode: Callable[[int, int], Tensor]) -> Tensor:
    """x Wᵀ [N, O] in the dtype of `x_NI`, of a matrix with so many rows.

    `layer` is that of the compiled kernels; where there is none, `decode(first, last)` gives rows in float32, `first`
    at the beginning of a tile.
    """
    out_NO = x_NI.new_empty(len(x_NI), rows)
    dtype = x_NI.dtype if x_NI.dtype in (torch.float32, torch.bfloat16) else torch.float32
    step = max(DECODED_BYTES // (dtype.itemsize * x_NI.shape[1]) // TILE, 1) * TILE
    room_OI = x_NI.new_empty(min(step, rows), x_NI.shape[1], dtype=dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weight_OI = decode(first, last) if layer is None else decoded(layer, first, room_OI[: last - first])
        out_NO[:, first:last] = linear(x_NI, weight_OI.to(x_NI.dtype))
    return out_NO


def decoded(layer: Any, first: int, out_OI: Tensor, path: int = 0) -> Tensor:
    """`out_OI`, float32 or bfloat16, filled by the compiled kernels with the rows of a matrix from `first` on."""
    last, narrow = first + len(out_OI), out_OI.dtype == torch.bfloat16
    layer.decode(out_OI.data_ptr(), first, last, narrow, torch.get_num_threads(), path)
    return out_OI
