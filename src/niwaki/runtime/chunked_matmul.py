"""Products of many tokens on the CPU with a stored matrix, in chunks of rows.

A chunk is decoded, and multiplied while the CPU cache holds it.

    y_NO = multiply_in_chunks(x_NI, rows, layer, lambda first, last: record.rows(first, last).decode())

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from niwaki.formats.quantized import TILE

CHUNK_BYTES = 4 * 2**20  # of decoded weights


def multiply_in_chunks(x_NI: Tensor, rows: int, layer: Any | None, decode: Callable[[int, int], Tensor]) -> Tensor:
    """Return x Wᵀ [N, O] in the dtype of `x_NI`, for a matrix with `rows` rows.

    `layer` is the matrix of the compiled kernels. If it is None, `decode(first, last)` returns rows in float32; `first`
    begins a tile.
    """
    out_NO = x_NI.new_empty(len(x_NI), rows)
    dtype = x_NI.dtype if x_NI.dtype in (torch.float32, torch.bfloat16) else torch.float32
    step = max(CHUNK_BYTES // (dtype.itemsize * x_NI.shape[1]) // TILE, 1) * TILE
    chunk_OI = x_NI.new_empty(min(step, rows), x_NI.shape[1], dtype=dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weight_OI = decode(first, last) if layer is None else decode_rows(layer, first, chunk_OI[: last - first])
        out_NO[:, first:last] = linear(x_NI, weight_OI.to(x_NI.dtype))
    return out_NO


def decode_rows(layer: Any, first: int, out_OI: Tensor, path: int = 0) -> Tensor:
    """Fill `out_OI`, float32 or bfloat16, with the rows of a matrix from `first` on, and return it."""
    last, narrow = first + len(out_OI), out_OI.dtype == torch.bfloat16
    layer.decode(out_OI.data_ptr(), first, last, narrow, torch.get_num_threads(), path)
    return out_OI
