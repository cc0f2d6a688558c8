"""Products of a few tokens with the kept rows or columns of a matrix on a GPU (see `kernels.rows`).

Floor: the bytes of the kept weights over the memory bandwidth. Half of the 11008 neurons of a 7B model, 4096 wide in
bf16, are 45 MB: 15 µs per matrix at 3 TB/s. All else serves to keep enough loads in flight. Memory answers after about
0.7 µs, so 3 TB/s need 2 MB in flight, 16 KB for each of 132 SMs. A thread loads 16 bytes of each of some rows before it
multiplies any. Four warps with four rows have 8 KB in flight, and several programs share an SM. While one waits for its
indices, sums up or ends, the others load.

Dot products (`_dot`): a program owns some rows and walks all columns. All threads lie along the columns, rows lie in
registers. A thread adds up the products of its 16 bytes at once, so that eight tokens need few registers. Kept columns
use the same kernel: the columns that a thread loads lie in one unit. Tiles are loaded with two axes and folded later,
because Triton 3.6 and 3.9 spread different axes of three over the warps.

A call copies nothing to the host. With `out` it allocates nothing, so a CUDA graph can capture it. The number of tokens
is padded to a power of two by repeats of the last token, which are not stored.

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

LOAD_BYTES = 16  # of neighbouring columns: one load of a thread


class GemvLaunch(NamedTuple):
    """Launch of a product with kept rows or columns."""

    rows: int  # per program
    columns: int  # per step; 256 per warp fill 16 bytes per thread
    warps: int


# By kernel and max tokens. Those of rows for one token are the best of seven measured on an H100.
LAUNCHES = {
    "rows_dot": {
        1: GemvLaunch(2, 2048, 8),
        2: GemvLaunch(4, 1024, 4),
        4: GemvLaunch(4, 1024, 4),
        8: GemvLaunch(4, 1024, 4),
    },
    "rows_gate": {
        1: GemvLaunch(1, 1024, 4),
        2: GemvLaunch(2, 1024, 4),
        4: GemvLaunch(2, 1024, 4),
        8: GemvLaunch(2, 1024, 4),
    },
    "columns_dot": {
        1: GemvLaunch(4, 1024, 4),
        2: GemvLaunch(4, 1024, 4),
        4: GemvLaunch(4, 1024, 4),
        8: GemvLaunch(4, 1024, 4),
    },
}


def default_launch(kernel: str, tokens: int, columns: int) -> GemvLaunch:
    """Return the launch for a shape. Narrow matrices take fewer threads."""
    launch = LAUNCHES[kernel][triton.next_power_of_2(tokens)]
    while launch.columns > max(columns, 256) and launch.warps > 1:
        launch = launch._replace(columns=launch.columns // 2, warps=launch.warps // 2)
    return launch


def rows_dot(
    x_BI: Tensor,
    weight_OI: Tensor,
    units_K: Tensor,
    bias_O: Tensor | None = None,
    *,
    width: int = 1,
    out: Tensor | None = None,
    launch: GemvLaunch | None = None,
) -> Tensor:
    """Implement `kernels.rows.rows_dot`."""
    launch = launch or default_launch("rows_dot", len(x_BI), x_BI.shape[1])
    return _launch_dot(x_BI, weight_OI, None, "", units_K, width, None, 1, bias_O, None, out, launch)


def rows_gate(
    x_BI: Tensor,
    gate_OI: Tensor,
    up_OI: Tensor,
    units_K: Tensor,
    activation: str,
    *,
    width: int = 1,
    out: Tensor | None = None,
    launch: GemvLaunch | None = None,
) -> Tensor:
    """Implement `kernels.rows.rows_gate`."""
    assert activation in ACTIVATIONS, f"expected one of {ACTIVATIONS}, got {activation!r}"
    assert gate_OI.shape == up_OI.shape and gate_OI.stride() == up_OI.stride(), "expected gate and up alike"
    launch = launch or default_launch("rows_gate", len(x_BI), x_BI.shape[1])
    return _launch_dot(x_BI, gate_OI, up_OI, activation, units_K, width, None, 1, None, None, out, launch)


def columns_dot(
    x_BR: Tensor,
    weight_OI: Tensor,
    units_K: Tensor,
    width: int,
    bias_O: Tensor | None = None,
    extra_BO: Tensor | None = None,
    *,
    out: Tensor | None = None,
    launch: GemvLaunch | None = None,
) -> Tensor:
    """Implement `kernels.rows.columns_dot`. If eight divides the width, loads take 16 bytes at a time."""
    launch = launch or default_launch("columns_dot", len(x_BR), x_BR.shape[1])
    return _launch_dot(x_BR, weight_OI, None, "", None, 1, units_K, width, bias_O, extra_BO, out, launch)


def _output(
    x_BI: Tensor, weight: Tensor, units_K: Tensor, outputs: int, extra_BO: Tensor | None, out: Tensor | None
) -> Tensor:
    """Check the inputs and return the tensor of the result."""
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
    chunks_K: Tensor | None,
    chunk: int,
    bias_O: Tensor | None,
    extra_BO: Tensor | None,
    out: Tensor | None,
    launch: GemvLaunch,
) -> Tensor:
    """Launch the products of kept rows (`units_K`), or of all rows with kept columns (`chunks_K`)."""
    tokens, inputs = x_BI.shape
    outputs = len(weight_OI) if units_K is None else len(units_K) * width
    indices_K = chunks_K if units_K is None else units_K
    assert indices_K is not None
    columns = weight_OI.shape[1] if chunks_K is None else len(chunks_K) * chunk
    assert inputs == columns, f"expected {columns} inputs, got {inputs}"
    out = _output(x_BI, weight_OI, indices_K, outputs, extra_BO, out)
    fold = LOAD_BYTES // weight_OI.element_size()
    _dot[(triton.cdiv(outputs, launch.rows),)](
        x_BI,
        weight_OI,
        second_OI,
        units_K,
        chunks_K,
        bias_O,
        extra_BO,
        out,
        tokens,
        outputs,
        inputs,
        weight_OI.stride(0),
        width=width,
        chunk=chunk,
        activation=activation,
        padded=triton.next_power_of_2(tokens),
        rows=launch.rows,
        columns=launch.columns,
        fold=fold if chunks_K is None else gcd(fold, chunk),
        num_warps=launch.warps,
    )
    return out


@triton.jit
def _rows_of(units, place, inside, width: tl.constexpr):
    """Return the rows at these places among the kept rows."""
    unit = tl.load(units + place // width, mask=inside, other=0).to(tl.int64)
    return unit * width + place % width


@triton.jit(do_not_specialize=["tokens", "outputs"])
def _dot(
    x,
    weight,
    second,
    units,
    chunks,
    bias,
    extra,
    out,
    tokens,
    outputs,
    inputs,
    stride,
    width: tl.constexpr,
    chunk: tl.constexpr,
    activation: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    fold: tl.constexpr,
):
    """Multiply some rows with all columns. Sums are [rows, columns / fold]."""
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
        if chunks is not None:
            column = _rows_of(chunks, taken, taken < inputs, chunk)
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
    """Return zero sums for every token."""
    total = ()
    for _ in tl.static_range(padded):
        total = total + (tl.zeros((rows, columns), tl.float32),)
    return total


@triton.jit
def _tokens(x, place, inside, tokens, inputs, padded: tl.constexpr):
    """Load the same places of every token in float32."""
    values = ()
    for b in tl.static_range(padded):
        own = x + tl.minimum(b, tokens - 1) * inputs
        values = values + (tl.load(own + place, mask=inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _add_dots(total, weights, values, padded: tl.constexpr, fold: tl.constexpr):
    """Add Σ weights · values over `fold` neighbouring columns for every token. They lie in one thread."""
    rows: tl.constexpr = weights.shape[0]
    columns: tl.constexpr = weights.shape[1]
    new = ()
    for b in tl.static_range(padded):
        product = weights.to(tl.float32) * values[b][None, :]
        new = new + (total[b] + tl.sum(tl.reshape(product, (rows, columns // fold, fold)), axis=2),)
    return new


@triton.jit
def _activate(y, activation: tl.constexpr):
    """Apply the activation."""
    if activation == "relu":
        z = tl.maximum(y, 0.0)
    elif activation == "gelu":
        z = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif activation == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        z = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    else:
        z = y * tl.sigmoid(y)
    return z
