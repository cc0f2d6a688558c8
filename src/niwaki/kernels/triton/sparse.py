"""Products of a few tokens with pruned matrices (`sparse`) on a GPU, by multiply-adds: one Triton launch per layer.

The stored form of one row, as a bitmap and as two values for four columns:

    bitmap      columns   0 1 2 3 4 5 6 7 | 8 …           two_four   columns   0 1 2 3 | 4 5 6 7 | 8 …
                weights   a 0 0 b c 0 0 d | e …                      weights   0 a b 0 | c 0 0 d | e …
    places      bits      1 0 0 1 1 0 0 1 | 1 …           places     indices     1 2   |   0 3   | 0 …
                          one byte        | next byte                bits      0-1 2-3 | 4-5 6-7   of one byte
    values      a b c d e …                               values     a b c d e …
    starts      number of value a in `values`             (row r begins at value 4 · B · r)
    ranks       values of the row up to column 63, 127, …

A program owns some rows and walks all columns. No sum is split between programs, so results do not depend on their
order. All threads lie along the columns. A thread takes a unit of every row: one or two bytes of places (8 or 16
columns). The inputs of its columns serve all rows.

Two values for four columns: the four inputs lie in the thread. Every value selects its input by two selections on the
bits of its index. A pair of values takes 4 selections and 2 multiply-adds per token, and 4 tests of bits for all
tokens. That is far cheaper than a gather of inputs, whose lanes would meet in the same memory banks.

Bitmap: the small table `ranks_OC` holds the number of values of a row up to the end of every 64 columns. It has 16 bits
per entry (0.25 bit per weight), and the preparation of the layer makes it. The entry minus the set bits from a thread
on is the number of its first value. For four columns a thread loads the next four values and moves them up to their
columns by six selections. It loads bfloat16 values as three words, which needs fewer loads. Lanes are four values apart
on average, so the loads of a warp lie in few cache lines. The bits themselves leave out the products of columns without
a value. The chunks of the next step are loaded before the values of this step, because their bits give the addresses.

Floor: the bytes of places and values over the memory bandwidth. At half zeros and values of 16 bits that is 9 bits per
weight.

Legend: N tokens, O outputs, I inputs, B bytes of eight columns, C chunks of 64 columns, G groups that share a scale.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.triton.bits import (
    count_low_four,
    load_chunk,
    locate,
    move_up,
    near_values,
    signed_four,
    split_eight,
    split_four,
    stack,
)
from niwaki.kernels.types import CHUNK_BYTES, GpuRecord

INTEGERS = {2: torch.int16, 4: torch.int32}


class SparseLaunch(NamedTuple):
    """Launch of the multiply-add product with a pruned matrix."""

    rows: int  # per program
    warps: int  # per program; each takes 32 units of columns at a time


# By layout and max tokens of a program: the best, or nearly the best, of 9 (two_four: 11) measured on an H100 with
# shapes from 4096² to 28672 × 8192.
LAUNCHES = {
    "bitmap": {1: SparseLaunch(1, 4), 2: SparseLaunch(4, 4), 4: SparseLaunch(4, 4), 8: SparseLaunch(4, 4)},
    "two_four": {1: SparseLaunch(1, 4), 2: SparseLaunch(2, 2), 4: SparseLaunch(1, 2)},
}


def default_launch(record: GpuRecord, tokens: int) -> SparseLaunch:
    """Return the launch for a shape. Narrow matrices take fewer threads."""
    launch = LAUNCHES[record.layout][_block_tokens(record, tokens)]
    while launch.warps > 1 and 16 * launch.warps * _unit_bytes(record) >= record.places.shape[1]:
        launch = launch._replace(warps=launch.warps // 2)
    return launch


def fma_product(
    x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None, out_NO: Tensor, launch: SparseLaunch | None = None
) -> None:
    """Write x Wᵀ + bias to `out_NO`. Inputs and outputs are contiguous, in any float dtype; sums are in float32."""
    tokens, rows = out_NO.shape
    assert x_NI.is_contiguous() and out_NO.is_contiguous() and x_NI.shape[1] == record.columns
    block_tokens = _block_tokens(record, tokens)
    launch = launch or default_launch(record, tokens)
    places, values, unit = _views(record)
    _fma[triton.cdiv(rows, launch.rows), triton.cdiv(tokens, block_tokens)](
        x_NI,
        out_NO,
        bias_O,
        places,
        values,
        record.starts,
        record.ranks,
        record.scale,
        rows,
        tokens,
        columns=record.columns,
        layout=record.layout,
        bits=record.bits,
        group=record.group,
        unit=unit,
        block_tokens=block_tokens,
        block_rows=launch.rows,
        block=32 * launch.warps,
        num_warps=launch.warps,
    )


def _block_tokens(record: GpuRecord, tokens: int) -> int:
    """Return the tokens per program."""
    return min(int(triton.next_power_of_2(tokens)), max(LAUNCHES[record.layout]))


def _unit_bytes(record: GpuRecord) -> int:
    """Return the bytes of places that a thread takes at once."""
    even = record.places.shape[1] % 2 == 0 and record.group % 16 == 0
    return 2 if record.layout == "two_four" and even else 1


def _views(record: GpuRecord) -> tuple[Tensor, Tensor, int]:
    """Return places and values as the kernel loads them, and the bytes of a unit."""
    places, values, unit = record.places, record.values, _unit_bytes(record)
    if record.layout == "bitmap":
        return (places.view(torch.int64) if places.shape[1] % CHUNK_BYTES == 0 else places), values, unit
    if unit == 2:
        places = places.view(torch.int16)
    return places, values.view(INTEGERS[2 * unit]) if record.bits == 4 else values, unit


@triton.jit(do_not_specialize=["tokens"])
def _fma(
    x,
    out,
    bias,
    places,
    values,
    starts,
    ranks,
    scale,
    rows,
    tokens,
    columns: tl.constexpr,
    layout: tl.constexpr,
    bits: tl.constexpr,
    group: tl.constexpr,
    unit: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """Multiply some rows with some tokens. Every row and token has its own sums [block]."""
    width: tl.constexpr = (columns + 7) // 8
    units: tl.constexpr = width // unit
    first = tl.program_id(0) * block_rows
    token = tl.program_id(1) * block_tokens
    x += token.to(tl.int64) * columns
    here = tokens - token
    total = ()
    for _ in tl.static_range(block_rows * block_tokens):
        total = total + (tl.zeros((block,), tl.float32),)
    ahead = _load_ahead(places, ranks, first, rows, tl.arange(0, block), width, layout, block_rows)
    start = ()
    for r in tl.static_range(block_rows):
        start = start + (tl.load(starts + tl.minimum(first + r, rows - 1)) if layout == "bitmap" else 0,)
    for step in tl.range(0, (units + block - 1) // block):
        at = step * block + tl.arange(0, block)
        inside = at < units
        inputs = ()
        for m in tl.static_range(block_tokens):
            # Tokens after the last one repeat it and are not stored.
            inputs = inputs + _load_inputs(x + tl.minimum(m, here - 1) * columns, at, columns, unit)
        chunks = ahead
        ahead = _load_ahead(places, ranks, first, rows, at + block, width, layout, block_rows)
        loaded = _load_rows(
            places, values, chunks, start, first, rows, at, inside, width, layout, bits, unit, block_rows
        )
        total = _add_rows(
            loaded, inputs, total, scale, first, rows, at, inside,
            columns, layout, unit, group, block_rows, block_tokens,
        )  # fmt: skip
    _store(out, total, bias, scale, first, token, rows, here, group, block_rows, block_tokens)


@triton.jit
def _store(
    out,
    total,
    bias,
    scale,
    first,
    token,
    rows,
    here,
    group: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """Add up the sums of every row and token, and store them with scale and bias."""
    count: tl.constexpr = block_rows * block_tokens
    y = tl.sum(stack(total, total[0].shape, count), axis=0)
    row = first + tl.arange(0, count) // block_tokens
    m = tl.arange(0, count) % block_tokens
    stored = (row < rows) & (m < here)
    if scale is not None and group == 0:
        y *= tl.load(scale + row, mask=stored, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + row, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + (token + m).to(tl.int64) * rows + row, y.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _add_rows(
    loaded,
    inputs,
    total,
    scale,
    first,
    rows,
    at,
    inside,
    columns: tl.constexpr,
    layout: tl.constexpr,
    unit: tl.constexpr,
    group: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """Add the products of the units of all rows with the inputs of all tokens to their sums."""
    new = ()
    for r in tl.static_range(block_rows):
        row = tl.minimum(first + r, rows - 1).to(tl.int64)
        for m in tl.static_range(block_tokens):
            before = total[r * block_tokens + m]
            new = new + (_add_row(loaded[r], inputs, before, scale, row, at, inside, m, columns, layout, unit, group),)
    return new


@triton.jit
def _add_row(
    loaded,
    inputs,
    before,
    scale,
    row,
    at,
    inside,
    m: tl.constexpr,
    columns: tl.constexpr,
    layout: tl.constexpr,
    unit: tl.constexpr,
    group: tl.constexpr,
):
    """Add the products of the units of a row with the inputs of token m to `before`."""
    total = before if group == 0 else tl.zeros_like(before)
    total = _add_set(loaded, inputs, total, m) if layout == "bitmap" else _add_pairs(loaded, inputs, total, m, unit)
    if group > 0:
        place = row * ((columns + group - 1) // group) + at * (8 * unit) // group
        total = before + total * tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _load_inputs(x, at, columns: tl.constexpr, unit: tl.constexpr):
    """Load the inputs of units of columns: 8 · unit tensors in float32."""
    block: tl.constexpr = at.shape[0]
    values = ()
    for k in tl.static_range(unit):
        if columns % 8 == 0 and x.dtype.element_ty == tl.bfloat16:
            # Each word holds two: one instruction each moves them to the upper half.
            word = (at * unit + k)[:, None] * 4 + tl.arange(0, 4)[None, :]
            words = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + word, mask=word < columns // 2, other=0)
            pairs = split_four(words, (block,))
            for i in tl.static_range(4):
                values = values + ((pairs[i] << 16).to(tl.float32, bitcast=True),)
                values = values + ((pairs[i] & -65536).to(tl.float32, bitcast=True),)
        else:
            column = (at * unit + k)[:, None] * 8 + tl.arange(0, 8)[None, :]
            values = values + split_eight(
                tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32), (block,)
            )
    return values


@triton.jit
def _load_rows(
    places,
    values,
    chunks,
    start,
    first,
    rows,
    at,
    inside,
    width: tl.constexpr,
    layout: tl.constexpr,
    bits: tl.constexpr,
    unit: tl.constexpr,
    block_rows: tl.constexpr,
):
    """Load a unit of every row: its bits or indices, and its values."""
    loaded = ()
    for r in tl.static_range(block_rows):
        if layout == "bitmap":
            loaded = loaded + (_load_set(values, chunks[r], start[r], at, bits),)
        else:
            row = tl.minimum(first + r, rows - 1).to(tl.int64)
            loaded = loaded + (_load_pairs(places, values, row, at, inside, width, bits, unit),)
    return loaded


@triton.jit
def _load_pairs(places, values, row, at, inside, width: tl.constexpr, bits: tl.constexpr, unit: tl.constexpr):
    """Load the indices of a unit, and its values in float32 (two values for four columns)."""
    block: tl.constexpr = at.shape[0]
    units: tl.constexpr = width // unit
    index = tl.load(places + row * units + at, mask=inside, other=0).to(tl.int32)
    loaded = (index,)
    if bits == 4:
        codes = tl.load(values + row * units + at, mask=inside, other=0).to(tl.int32)
        for i in tl.static_range(4 * unit):
            loaded = loaded + (signed_four(codes >> (4 * i)),)
    else:
        place = at[:, None] * (4 * unit) + tl.arange(0, 4 * unit)[None, :]
        tile = tl.load(values + row * (4 * width) + place, mask=inside[:, None], other=0).to(tl.float32)
        loaded = loaded + (split_eight(tile, (block,)) if unit == 2 else split_four(tile, (block,)))
    return loaded


@triton.jit
def _add_pairs(loaded, inputs, total, m: tl.constexpr, unit: tl.constexpr):
    """Add the products of the values of a unit and their inputs. The lower index comes first and is never 3."""
    index = loaded[0]
    for i in tl.static_range(2 * unit):
        x_0 = inputs[8 * unit * m + 4 * i]
        x_1 = inputs[8 * unit * m + 4 * i + 1]
        x_2 = inputs[8 * unit * m + 4 * i + 2]
        x_3 = inputs[8 * unit * m + 4 * i + 3]
        lower = tl.where((index & (2 << (4 * i))) != 0, x_2, tl.where((index & (1 << (4 * i))) != 0, x_1, x_0))
        upper = tl.where((index & (4 << (4 * i))) != 0, x_3, x_2)
        upper = tl.where((index & (8 << (4 * i))) != 0, upper, x_1)
        total += loaded[1 + 2 * i] * lower
        total += loaded[2 + 2 * i] * upper
    return total


@triton.jit
def _load_ahead(places, ranks, first, rows, byte, width: tl.constexpr, layout: tl.constexpr, block_rows: tl.constexpr):
    """Load the chunks of all rows of a bitmap one step before their values, because they give the addresses."""
    chunks = ()
    if layout == "bitmap":
        for r in tl.static_range(block_rows):
            row = tl.minimum(first + r, rows - 1).to(tl.int64)
            chunks = chunks + (load_chunk(places, ranks, row, byte, byte < width, width),)
    return chunks


@triton.jit
def _load_set(values, chunk, start, byte, bits: tl.constexpr):
    """Return the bits of eight columns, and their `near_values`. Those of bfloat16 come in float32."""
    index, taken = locate(chunk, start, byte)
    if values.dtype.element_ty == tl.bfloat16:
        near = _near_words(values, index, taken, 0) + _near_words(values, index + count_low_four(taken), taken, 4)
    else:
        near = near_values(values, index, taken, bits)
    return (taken,) + near


@triton.jit
def _near_words(values, index, byte, at: tl.constexpr):
    """Return the values of four columns. Three words hold them, even if the first value does not begin a word."""
    words = values.to(tl.pointer_type(tl.int32), bitcast=True) + (index >> 1)
    w_0 = tl.load(words).to(tl.uint32, bitcast=True).to(tl.uint64)
    w_1 = tl.load(words + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    w_2 = tl.load(words + 2).to(tl.uint32, bitcast=True).to(tl.uint64)
    shift = ((index & 1) * 16).to(tl.uint64)
    low = ((w_0 | (w_1 << 32)) >> shift).to(tl.uint32).to(tl.int32, bitcast=True)
    high = ((w_1 | (w_2 << 32)) >> shift).to(tl.uint32).to(tl.int32, bitcast=True)
    return move_up(
        (low << 16).to(tl.float32, bitcast=True),
        (low & -65536).to(tl.float32, bitcast=True),
        (high << 16).to(tl.float32, bitcast=True),
        (high & -65536).to(tl.float32, bitcast=True),
        byte,
        at,
    )


@triton.jit
def _add_set(loaded, inputs, total, m: tl.constexpr):
    """Add the products of the columns whose bit is set, each by one instruction under the bit as its predicate."""
    for j in tl.static_range(8):
        taken = (loaded[0] & (1 << j)) != 0
        total = tl.where(taken, total + loaded[1 + j].to(tl.float32) * inputs[8 * m + j], total)
    return total
