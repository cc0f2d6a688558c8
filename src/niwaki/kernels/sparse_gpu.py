"""Products with pruned matrices (`sparse`, `sparse_tiles`) on a GPU: which way, for how many tokens, as an operator.

A few tokens are multiplied by multiply-adds (`triton_sparse`, `triton_sparse_tiles`), some by tensor cores
(`triton_sparse_dot`, `triton_sparse_tiles_dot`), both straight from what is stored; for many, one kernel makes rows of
the matrix dense and cuBLAS multiplies them. Sparse tensor cores (cuSPARSELt) need a second form of a two-four matrix,
as large as the first.

Legend: N tokens, O outputs, I inputs, B bytes of eight columns, C chunks of 64 columns, T tiles of 32 rows, F groups of
four columns, G groups of columns that share a scale.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

# Up to so many tokens, by layout, measured on an H100 with five shapes from 4096² to 28672 × 8192
# (sparse-linear-h100.json). Tensor cores take as long for 1 to 16 tokens; beyond CORE_TOKENS decoding is faster, as it
# is for a bitmap beyond two blocks of eight tokens of multiply-adds.
FEW_TOKENS = {"bitmap": 16, "two_four": 2, "two_four_tiles": 4}
CORE_TOKENS = {"two_four": 64, "two_four_tiles": 32}  # of a bitmap, 82 µs where decoding takes 46: left out
FEW_TOKENS_ALONE = 12  # where tensor cores do not reach
SEMI_TOKENS = 65  # from so many on, sparse tensor cores beat decoding: at 64 on four of five shapes, at 512 on all
CORE_GROUP = 64  # columns, of which groups hold whole ones: the least that tensor cores take at a time
# Of rows decoded at once: most matrices (8192² in bf16) are one product; the outputs of several are joined by a copy.
DECODED_BYTES = 128 * 2**20
CHUNK_BYTES = 8  # of places, to whose end the table of a bitmap counts values
MAX_SHORT = 2**16 - 1  # columns that 16 bits count
# Kinds of values as in niwaki.formats.sparse, which stands above the kernels.
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "int8": 8, "int4": 4}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
TILE = 32  # rows


class GpuRecord(NamedTuple):
    """A stored matrix as the kernels take it: its own tensors, and for a bitmap a table beside them.

    `places` [O, B] and `values` in their own dtype, `starts` [O] and `ranks` [O, C] (`ranks_of`) of a
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
    """How many values a row of a bitmap has up to the end of every chunk: [O, C] int16, the bits of unsigned ones.

    int32 where rows are too wide for that.
    """
    dtype = torch.int16 if 8 * places_OB.shape[1] <= MAX_SHORT else torch.int32
    padded = torch.nn.functional.pad(places_OB, (0, -places_OB.shape[1] % CHUNK_BYTES))
    ranks_OC = padded.new_empty(len(padded), padded.shape[1] // CHUNK_BYTES, dtype=dtype)
    for some, out in zip(padded.split(1024), ranks_OC.split(1024), strict=True):  # a bounded copy
        counts = _counts(padded.device)[some.int()].view(len(some), -1, CHUNK_BYTES).sum(2, dtype=torch.int32)
        out.copy_(counts.cumsum(1).to(torch.int32))
    return ranks_OC


def _counts(device: torch.device) -> Tensor:
    """Set bits of all bytes."""
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> bit) & 1).sum(1).to(torch.uint8)


def product(x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + bias in the dtype of `x_NI`, in the way that is fastest for so many tokens."""
    x_NI, tokens = x_NI.contiguous(), len(x_NI)
    out_NO = x_NI.new_empty(tokens, record.rows)
    cores = cores_reach(x_NI, record)
    if tokens == 0:
        return out_NO
    if tokens <= (FEW_TOKENS[record.layout] if cores else FEW_TOKENS_ALONE):
        from niwaki.kernels.triton import sparse as triton_sparse
        from niwaki.kernels.triton import sparse_tiles as triton_sparse_tiles

        kernels: Any = triton_sparse_tiles if record.layout == "two_four_tiles" else triton_sparse
        kernels.few_tokens(x_NI, record, bias_O, out_NO)
    elif cores and tokens <= CORE_TOKENS[record.layout]:
        from niwaki.kernels.triton import sparse_dot as triton_sparse_dot
        from niwaki.kernels.triton import sparse_tiles_dot as triton_sparse_tiles_dot

        kernels = triton_sparse_tiles_dot if record.layout == "two_four_tiles" else triton_sparse_dot
        kernels.some_tokens(x_NI, record, bias_O, out_NO)
    else:
        return _decoded_product(x_NI, record, bias_O)
    return out_NO


def cores_reach(x_NI: Tensor, record: GpuRecord) -> bool:
    """Whether tensor cores take it: two values for four columns, inputs of 16 bits, groups of whole steps."""
    narrow = x_NI.dtype in (torch.bfloat16, torch.float16)
    return record.layout in CORE_TOKENS and narrow and record.group % CORE_GROUP == 0


def decoded(record: GpuRecord, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows [first, last) of the matrix; of tiles, `first` begins one."""
    from niwaki.kernels.triton.sparse_dot import decode

    out_RI = torch.empty(last - first, record.columns, dtype=dtype, device=record.places.device)
    decode(record, first, out_RI)
    return out_RI


def _decoded_product(x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None) -> Tensor:
    """As many rows as `DECODED_BYTES` hold are decoded by one kernel and multiplied, then the next."""
    tiles = -(-record.rows // TILE)
    most = max(DECODED_BYTES // (TILE * record.columns * x_NI.element_size()), 1)  # tiles at once
    step = TILE * -(-tiles // -(-tiles // most))  # rows at once, about the same each time
    found = []
    for first in range(0, record.rows, step):
        last = min(first + step, record.rows)
        bias = None if bias_O is None else bias_O[first:last].to(x_NI.dtype)
        found.append(linear(x_NI, decoded(record, first, last, x_NI.dtype), bias))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def semi_structured(record: GpuRecord, dtype: torch.dtype) -> Any:
    """A two-four matrix in the form of sparse tensor cores (9/16 of the dense bytes), by torch; None if they can not.

    The whole matrix exists while it is made.
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
    """Shape and dtype of the product."""
    return x_NI.new_empty(len(x_NI), numbers[0])


def multiply(x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None) -> Tensor:
    """`product`, as an operator where a graph is traced."""
    if not torch.compiler.is_compiling():
        return product(x_NI, record, bias_O)
    numbers = [record.rows, record.columns, record.group, record.bits]
    found: Tensor = product_op(x_NI, *record[5:], bias_O, numbers, record.layout)
    return found
