"""Products of a few tokens with the kept rows or columns of a matrix on a GPU (see `rows`).

Floor: the bytes of the kept weights over the memory bandwidth. Half of the 11008 neurons of a 7B model, 4096 wide in
bf16, are 45 MB: 15 µs a matrix at 3 TB/s. Everything else is there to keep enough loads in flight. Memory answers after
about 0.7 µs, so 3 TB/s need 2 MB on their way, 16 KB for each of 132 SMs. A thread loads 16 bytes of each of some rows
before it multiplies any; four warps with four rows have 8 KB in flight, and several programs lie on every SM, so that
others load while one waits for its indices, sums up or ends.

Dot products (`_dot`): a program owns some rows and walks all columns. All threads lie along the columns, rows lie in
registers; a thread adds up the products of its 16 bytes at once, so that eight tokens need few registers. Kept columns
are the same kernel: columns that a thread loads lie in one unit. Tiles are loaded with two axes and folded afterwards:
of three, Triton 3.6 and 3.9 spread different ones over the warps.

A call reads nothing back, and allocates nothing if it is given `out`: it can be captured in a CUDA graph. Numbers of
tokens are filled up to a power of two, which repeats the last one and does not store it.

Legend: B tokens, O rows, I columns, K kept units, R kept rows or columns: K · width.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.types import ACTIVATIONS, MAX_TOKENS

LOAD_BYTES = 16  # of neighbouring columns, by one thread at once


class Tiles(NamedTuple):
    """How a product is spread over the chip."""

    rows: int  # of a program
    columns: int  # at a time; 256 a warp fill 16 bytes a thread
    warps: int


# By kernel, for up to so many tokens. Those of rows for one token are the best of seven measured on an H100.
TILES = {
    "rows_dot": {1: Tiles(2, 2048, 8), 2: Tiles(4, 1024, 4), 4: Tiles(4, 1024, 4), 8: Tiles(4, 1024, 4)},
    "rows_gate": {1: Tiles(1, 1024, 4), 2: Tiles(2, 1024, 4), 4: Tiles(2, 1024, 4), 8: Tiles(2, 1024, 4)},
    "columns_dot": {1: Tiles(4, 1024, 4), 2: Tiles(4, 1024, 4), 4: Tiles(4, 1024, 4), 8: Tiles(4, 1024, 4)},
}


def default_tiles(kernel: str, tokens: int, columns: int) -> Tiles:
    """A choice by shape: narrow matrices take fewer threads."""
    tiles = TILES[kernel][triton.next_power_of_2(tokens)]
    while tiles.columns > max(columns, 256) and tiles.warps > 1:
        tiles = tiles._replace(columns=tiles.columns // 2, warps=tiles.warps // 2)
    return tiles


def rows_dot(
    x_BI: Tensor,
    weight_OI: Tensor,
    units_K: Tensor,
    bias_O: Tensor | None = None,
    *,
    width: int = 1,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """The contract of `rows.rows_dot`."""
    tiles = tiles or default_tiles("rows_dot", len(x_BI), x_BI.shape[1])
    return _launch_dot(x_BI, weight_OI, None, "", units_K, width, None, 1, bias_O, None, out, tiles)


def rows_gate(
    x_BI: Tensor,
    gate_OI: Tensor,
    up_OI: Tensor,
    units_K: Tensor,
    activation: str,
    *,
    width: int = 1,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """The contract of `rows.rows_gate`."""
    assert activation in ACTIVATIONS, f"expected one of {ACTIVATIONS}, got {activation!r}"
    assert gate_OI.shape == up_OI.shape and gate_OI.stride() == up_OI.stride(), "gate and up lie differently"
    tiles = tiles or default_tiles("rows_gate", len(x_BI), x_BI.shape[1])
    return _launch_dot(x_BI, gate_OI, up_OI, activation, units_K, width, None, 1, None, None, out, tiles)


def columns_dot(
    x_BR: Tensor,
    weight_OI: Tensor,
    units_K: Tensor,
    width: int,
    bias_O: Tensor | None = None,
    extra_BO: Tensor | None = None,
    *,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """The contract of `rows.columns_dot`. Widths that eight divides are loaded 16 bytes at a time."""
    tiles = tiles or default_tiles("columns_dot", len(x_BR), x_BR.shape[1])
    return _launch_dot(x_BR, weight_OI, None, "", None, 1, units_K, width, bias_O, extra_BO, out, tiles)


def _output(
    x_BI: Tensor, weight: Tensor, units_K: Tensor, outputs: int, extra_BO: Tensor | None, out: Tensor | None
) -> Tensor:
    """Where the result goes, once the inputs are as the kernels take them."""
    tokens = len(x_BI)
    assert 1 <= tokens <= MAX_TOKENS, f"expected 1 to {MAX_TOKENS} tokens, got {tokens}"
    assert x_BI.is_contiguous() and units_K.is_contiguous() and weight.stride(1) == 1, "rows must be contiguous"
    assert units_K.dtype in (torch.int32, torch.int64), f"expected whole numbers as units, got {units_K.dtype}"
    assert extra_BO is None or (extra_BO.shape == (tokens, outputs) and extra_BO.is_contiguous())
    if out is None:
        return x_BI.new_empty(tokens, outputs)
    assert out.shape == (tokens, outputs) and out.is_contiguous(), f"expected an output of {(tokens, outputs)}"
    return out


def _launch_dot(
    x_BI: Tensor,
    weight_OI: Tensor,
    second_OI: Tensor | None,
    activation: str,
    units_K: Tensor | None,
    width: int,
    pieces_K: Tensor | None,
    piece: int,
    bias_O: Tensor | None,
    extra_BO: Tensor | None,
    out: Tensor | None,
    tiles: Tiles,
) -> Tensor:
    """All products of rows: of kept rows (`units_K`), or of all rows with kept columns (`pieces_K`)."""
    tokens, inputs = x_BI.shape
    outputs = len(weight_OI) if units_K is None else len(units_K) * width
    indices_K = pieces_K if units_K is None else units_K
    assert indices_K is not None
    columns = weight_OI.shape[1] if pieces_K is None else len(pieces_K) * piece
    assert inputs == columns, f"expected {columns} inputs, got {inputs}"
    out = _output(x_BI, weight_OI, indices_K, outputs, extra_BO, out)
    fold = LOAD_BYTES // weight_OI.element_size()
    _dot[(triton.cdiv(outputs, tiles.rows),)](
        x_BI,
        weight_OI,
        second_OI,
        units_K,
        pieces_K,
        bias_O,
        extra_BO,
        out,
        tokens,
        outputs,
        inputs,
        weight_OI.stride(0),
        width=width,
        piece=piece,
        activation=activation,
        padded=triton.next_power_of_2(tokens),
        rows=tiles.rows,
        columns=tiles.columns,
        fold=fold if pieces_K is None else gcd(fold, piece),
        num_warps=tiles.warps,
    )
    return out


@triton.jit
def _rows_of(units, place, inside, width: tl.constexpr):
    """The rows that stand at these places of the kept ones."""
    unit = tl.load(units + place // width, mask=inside, other=0).to(tl.int64)
    return unit * width + place % width


@triton.jit(do_not_specialize=["tokens", "outputs"])
def _dot(
    x,
    weight,
    second,
    units,
    pieces,
    bias,
    extra,
    out,
    tokens,
    outputs,
    inputs,
    stride,
    width: tl.constexpr,
    piece: tl.constexpr,
    activation: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    fold: tl.constexpr,
):
    """A program: some rows, all columns. Sums are [rows, columns / fold]."""
    place = tl.program_id(0) * rows + tl.arange(0, rows)
    here = place < outputs
    row = place.to(tl.int64)
    if units is not None:
        row = _rows_of(units, place, here, width)
    total = _zeros(padded, rows, columns // fold)
    others = _zeros(padded, rows, columns // fold)
    for start in tl.range(0, inputs, columns):
        taken = start + tl.arange(0, columns)
        column = taken.to(tl.int64)
        if pieces is not None:
            column = _rows_of(pieces, taken, taken < inputs, piece)
        at = row[:, None] * stride + column[None, :]
        inside = here[:, None] & (taken < inputs)[None, :]
        weights = tl.load(weight + at, mask=inside, other=0.0)
        if second is not None:
            seconds = tl.load(second + at, mask=inside, other=0.0)
        values = _tokens(x, taken, taken < inputs, tokens, inputs, padded)
        total = _add_dots(total, weights, values, padded, fold)
        if second is not None:
            others = _add_dots(others, seconds, values, padded, fold)
    for b in tl.static_range(padded):
        y = tl.sum(total[b], axis=1)
        if second is not None:
            y = _activate(y, activation) * tl.sum(others[b], axis=1)
        if bias is not None:
            y += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
        own = b * outputs + place
        stored = place < tl.where(b < tokens, outputs, 0)
        if extra is not None:
            y += tl.load(extra + own, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + own, y.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _zeros(padded: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Sums of every token."""
    total = ()
    for _ in tl.static_range(padded):
        total = total + (tl.zeros((rows, columns), tl.float32),)
    return total


@triton.jit
def _tokens(x, place, inside, tokens, inputs, padded: tl.constexpr):
    """The same places of every token, float32."""
    values = ()
    for b in tl.static_range(padded):
        own = x + tl.minimum(b, tokens - 1) * inputs
        values = values + (tl.load(own + place, mask=inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _add_dots(total, weights, values, padded: tl.constexpr, fold: tl.constexpr):
    """total + Σ over `fold` neighbouring columns of weights · values, for every token. They lie in one thread."""
    rows: tl.constexpr = weights.shape[0]
    columns: tl.constexpr = weights.shape[1]
    new = ()
    for b in tl.static_range(padded):
        product = weights.to(tl.float32) * values[b][None, :]
        new = new + (total[b] + tl.sum(tl.reshape(product, (rows, columns // fold, fold)), axis=2),)
    return new


@triton.jit
def _activate(y, activation: tl.constexpr):
    if activation == "relu":
        z = tl.maximum(y, 0.0)
    elif activation == "gelu":
        z = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif activation == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        z = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    else:
        z = y * tl.sigmoid(y)
    return z
