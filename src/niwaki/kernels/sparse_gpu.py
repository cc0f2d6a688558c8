"""Products with pruned matrices (`sparse`, `sparse_tiles`) on a GPU: the choice of the kernel, as an operator.

Multiply-adds serve few tokens (`triton.sparse`, `triton.sparse_tiles`). Tensor cores serve more tokens
(`triton.sparse_dot`, `triton.sparse_tiles_dot`). Both read the stored form. For many tokens one kernel decodes rows of
the matrix and cuBLAS multiplies them. Sparse tensor cores (cuSPARSELt) need a second form of a two-four matrix, as
large as the first.

Legend: N tokens, O outputs, I inputs, R rows to decode, B bytes of eight columns, C chunks of 64 columns,
T tiles of 32 rows, G groups of columns that share a scale.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from niwaki.formats.quantized import TILE
from niwaki.formats.sparse import VALUES
from niwaki.kernels.types import CHUNK_BYTES, VALUE_BITS, GpuRecord

# Limits by layout, measured on an H100 with five shapes from 4096² to 28672 × 8192 (sparse-linear-h100.json). Tensor
# cores take the same time for 1 to 16 tokens. Above MAX_CORE_TOKENS decoding is faster.
MAX_FMA_TOKENS = {"bitmap": 16, "two_four": 2, "two_four_tiles": 4}
# Without a bitmap: tensor cores took 82 µs where decoding takes 46. Its 16 tokens are two blocks of multiply-adds.
MAX_CORE_TOKENS = {"two_four": 64, "two_four_tiles": 32}
MAX_FMA_TOKENS_WITHOUT_CORES = 12
MIN_SEMI_TOKENS = 65  # sparse tensor cores beat decoding: at 64 on four of five shapes, at 512 on all
CORE_GROUP = 64  # columns of the smallest tensor-core step, which must divide a group
# Max size of decoded rows. Most matrices (8192² in bf16) are one product; several products cost a copy of the outputs.
DECODED_BYTES = 128 * 2**20
MAX_SHORT = 2**16 - 1  # columns that 16 bits count
DTYPES = {**VALUES, "int8": torch.int8}


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
    """Return the stored tensors for the kernels, without a copy. A bitmap gets its rank table (0.25 bit per weight)."""
    typed = values if kind == "int4" else values.view(DTYPES[kind])
    half_scale = None if scale is None else scale.view(torch.float16)
    ranks = ranks_of(places) if layout == "bitmap" else None
    whole = scale is None or group >= columns
    return GpuRecord(
        rows, columns, 0 if whole else group, layout, VALUE_BITS[kind], places, typed, starts, ranks, half_scale
    )


def ranks_of(places_OB: Tensor) -> Tensor:
    """Return the number of values in a bitmap row up to the end of every chunk: [O, C], unsigned bits in int16.

    Rows with more than 2¹⁶ − 1 columns have int32.
    """
    dtype = torch.int16 if 8 * places_OB.shape[1] <= MAX_SHORT else torch.int32
    padded = torch.nn.functional.pad(places_OB, (0, -places_OB.shape[1] % CHUNK_BYTES))
    ranks_OC = padded.new_empty(len(padded), padded.shape[1] // CHUNK_BYTES, dtype=dtype)
    for some, out in zip(padded.split(1024), ranks_OC.split(1024), strict=True):  # bounds the copy
        counts = _counts(padded.device)[some.int()].view(len(some), -1, CHUNK_BYTES).sum(2, dtype=torch.int32)
        out.copy_(counts.cumsum(1).to(torch.int32))
    return ranks_OC


def _counts(device: torch.device) -> Tensor:
    """Return the number of set bits of all 256 bytes."""
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> bit) & 1).sum(1).to(torch.uint8)


def product(x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias in the dtype of `x_NI`, by the fastest kernel for this number of tokens."""
    x_NI, tokens = x_NI.contiguous(), len(x_NI)
    out_NO = x_NI.new_empty(tokens, record.rows)
    cores = cores_reach(x_NI, record)
    if tokens == 0:
        return out_NO
    if tokens <= (MAX_FMA_TOKENS[record.layout] if cores else MAX_FMA_TOKENS_WITHOUT_CORES):
        from niwaki.kernels.triton import sparse as triton_sparse
        from niwaki.kernels.triton import sparse_tiles as triton_sparse_tiles

        kernels: Any = triton_sparse_tiles if record.layout == "two_four_tiles" else triton_sparse
        kernels.fma_product(x_NI, record, bias_O, out_NO)
    elif cores and tokens <= MAX_CORE_TOKENS[record.layout]:
        from niwaki.kernels.triton import sparse_dot as triton_sparse_dot
        from niwaki.kernels.triton import sparse_tiles_dot as triton_sparse_tiles_dot

        kernels = triton_sparse_tiles_dot if record.layout == "two_four_tiles" else triton_sparse_dot
        kernels.core_product(x_NI, record, bias_O, out_NO)
    else:
        return _decoded_product(x_NI, record, bias_O)
    return out_NO


def cores_reach(x_NI: Tensor, record: GpuRecord) -> bool:
    """Return whether tensor cores take the product: two-four values, inputs of 16 bits, groups of whole steps."""
    narrow = x_NI.dtype in (torch.bfloat16, torch.float16)
    return record.layout in MAX_CORE_TOKENS and narrow and record.group % CORE_GROUP == 0


def decoded(record: GpuRecord, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return rows [first, last) of the matrix. With tiles, `first` is the first row of a tile."""
    from niwaki.kernels.triton.sparse_dot import decode

    out_RI = torch.empty(last - first, record.columns, dtype=dtype, device=record.places.device)
    decode(record, first, out_RI)
    return out_RI


def _decoded_product(x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None) -> Tensor:
    """Decode rows of up to `DECODED_BYTES` by one kernel and multiply them, then the next rows."""
    tiles = -(-record.rows // TILE)
    max_tiles = max(DECODED_BYTES // (TILE * record.columns * x_NI.element_size()), 1)  # per product
    step = TILE * -(-tiles // -(-tiles // max_tiles))  # rows per product, about equal
    products = []
    for first in range(0, record.rows, step):
        last = min(first + step, record.rows)
        bias = None if bias_O is None else bias_O[first:last].to(x_NI.dtype)
        products.append(linear(x_NI, decoded(record, first, last, x_NI.dtype), bias))
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def semi_structured(record: GpuRecord, dtype: torch.dtype) -> Any:
    """Return a two-four matrix in the form of sparse tensor cores (9/16 of the dense bytes), or None.

    None means that sparse tensor cores do not take this layout, shape or dtype. The conversion holds the whole dense
    matrix.
    """
    fits = record.layout != "bitmap" and record.rows % 16 == 0 and record.columns % 16 == 0
    if not fits or dtype not in (torch.bfloat16, torch.float16):
        return None
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    return SparseSemiStructuredTensorCUSPARSELT.from_dense(decoded(record, 0, record.rows, dtype))


def _product(
    x_NI: Tensor,
    places: Tensor,
    values: Tensor,
    starts: Tensor | None,
    ranks: Tensor | None,
    scale: Tensor | None,
    bias_O: Tensor | None,
    numbers: Sequence[int],
    layout: str,
) -> Tensor:
    rows, columns, group, bits = numbers
    record = GpuRecord(rows, columns, group, layout, bits, places, values, starts, ranks, scale)
    return product(x_NI.detach(), record, bias_O)


product_op = torch.library.custom_op("niwaki::sparse_gpu_product", _product, mutates_args=())


@product_op.register_fake
def _(
    x_NI: Tensor,
    _places: Tensor,
    _values: Tensor,
    _starts: Tensor | None,
    _ranks: Tensor | None,
    _scale: Tensor | None,
    _bias_O: Tensor | None,
    numbers: Sequence[int],
    _layout: str,
) -> Tensor:
    """Return an empty tensor with shape and dtype of the product."""
    return x_NI.new_empty(len(x_NI), numbers[0])


def multiply(x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None) -> Tensor:
    """Call `product`, as an operator while a graph is traced."""
    if not torch.compiler.is_compiling():
        return product(x_NI, record, bias_O)
    numbers = [record.rows, record.columns, record.group, record.bits]
    out_NO: Tensor = product_op(x_NI, *record[5:], bias_O, numbers, record.layout)
    return out_NO
