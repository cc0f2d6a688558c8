"""Products of a few tokens with matrices stored as bit planes, by multiply-adds: one Triton launch per layer.

A program owns a tile of 32 rows and walks all columns of all parts. No sum is split between programs, so results do not
depend on their order. A thread loads words of four rows × eight columns. First the bits of several planes are brought
together (`load_fields`), so that a word holds whole codes. Then one logical operation isolates a code in place. The
kernel reads it as float32: the bits of an integer n below 2²⁴ are the float n · 2⁻¹⁴⁹, exactly. Inputs (by the column)
and scales (by the row) undo the remaining powers of two. A weight takes one logical operation, and one multiply-add per
token. The result is exact for inputs within 2±⁴⁰.

Floor: the bytes of the planes over the memory bandwidth. With one token, 1.6 bits need 2 instructions per weight. On an
H100 (132 SMs × 128 lanes) these take about as long as the reads at 3 TB/s.

Legend: N tokens, O outputs, I inputs, C columns of a part, T tiles of 32 rows, K bits, B bytes of eight columns, W the
8 words of a tile (word w holds rows 4w … 4w + 3), G groups of columns that share a scale.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.kernels.triton.bits import (
    INPUT_POWER,
    PlanePointers,
    isolate,
    load_fields,
    load_levels,
    pointers,
    shape_of,
)
from niwaki.kernels.types import PlanePart, TileLaunch


def default_launch(tokens: int) -> TileLaunch:
    """Return the launch for this number of tokens."""
    return TileLaunch(warps=8, unroll=2 if tokens < 4 else 1)


def fma_product(
    x_NI: Tensor, parts: Sequence[PlanePart], bias_O: Tensor | None, out_NO: Tensor, launch: TileLaunch | None = None
) -> None:
    """Write x Wᵀ + bias to `out_NO`. Inputs and outputs: contiguous, any float dtype; parts of `PlanePart.for_gpu`."""
    tokens, rows = out_NO.shape
    block_tokens = min(triton.next_power_of_2(tokens), 4)
    launch = launch or default_launch(block_tokens)
    _fma[triton.cdiv(rows, TILE), triton.cdiv(tokens, block_tokens)](
        x_NI,
        out_NO,
        bias_O,
        rows,
        tokens,
        *pointers(parts, 0),
        *pointers(parts, 1),
        inputs=x_NI.shape[1],
        shape_0=shape_of(parts, 0),
        shape_1=shape_of(parts, 1),
        block_tokens=block_tokens,
        block=16 * launch.warps,
        unroll=launch.unroll,
        num_warps=launch.warps,
    )


@triton.jit(do_not_specialize=["tokens"])
def _fma(
    x,
    out,
    bias,
    rows,
    tokens,
    planes_0,
    scale_0,
    offset_0,
    zero_0,
    places_0,
    planes_1,
    scale_1,
    offset_1,
    zero_1,
    places_1,
    inputs: tl.constexpr,
    shape_0: tl.constexpr,
    shape_1: tl.constexpr,
    block_tokens: tl.constexpr,
    block: tl.constexpr,
    unroll: tl.constexpr,
):
    """Multiply a tile of rows with some tokens."""
    tile = tl.program_id(0)
    token = tl.program_id(1) * block_tokens
    x += token.to(tl.int64) * inputs
    here = tokens - token
    total = ()
    for _ in tl.static_range(block_tokens):
        total = total + (tl.zeros((block, 8, 2, 2), tl.float32),)
    part_0 = PlanePointers(planes_0, scale_0, offset_0, zero_0, places_0)
    total = _add_part(total, x, here, part_0, tile, rows, inputs, shape_0, block_tokens, block, unroll)
    if shape_1.columns > 0:
        part_1 = PlanePointers(planes_1, scale_1, offset_1, zero_1, places_1)
        total = _add_part(total, x, here, part_1, tile, rows, inputs, shape_1, block_tokens, block, unroll)
    row = tile * 32 + tl.arange(0, 32)
    for m in tl.static_range(block_tokens):
        y = tl.reshape(tl.sum(total[m], axis=0), (32,))
        if bias is not None:
            y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        place = (token + m).to(tl.int64) * rows + row
        tl.store(out + place, y.to(out.dtype.element_ty), mask=row < tl.where(m < here, rows, 0))


@triton.jit
def _add_part(
    total,
    x,
    tokens,
    part,
    tile,
    rows,
    inputs: tl.constexpr,
    shape: tl.constexpr,
    block_tokens: tl.constexpr,
    block: tl.constexpr,
    unroll: tl.constexpr,
):
    """Add one part to the sums of every token: [bytes, 8 words, 2, 2], where the last two axes are rows of a word."""
    columns: tl.constexpr = shape.columns
    bits: tl.constexpr = shape.bits
    group_bytes: tl.constexpr = shape.group // 8
    width: tl.constexpr = (columns + 7) // 8
    # The bytes of a group lie in one thread, which scales their sum once.
    together: tl.constexpr = unroll if group_bytes % unroll == 0 else 1
    planes = part.planes + tile.to(tl.int64) * (bits * width * 8)
    for step in tl.range(0, (width + block * together - 1) // (block * together)):
        sums = ()
        codes = ()
        for _ in tl.static_range(block_tokens):
            sums = sums + (tl.zeros((block, 1, 1, 1), tl.float32),)
            codes = codes + (tl.zeros((block, 8, 2, 2), tl.float32),)
        for u in tl.static_range(together):
            if group_bytes > 0:
                byte = (step * block + tl.arange(0, block)) * together + u
            else:
                byte = (step * together + u) * block + tl.arange(0, block)
            low = load_fields(planes, byte, width, bits if bits < 4 else 4)
            high = low
            if bits > 4:
                high = load_fields(planes + 4 * width * 8, byte, width, bits - 4)
            new_sums = ()
            new_codes = ()
            for m in tl.static_range(block_tokens):
                # Tokens after the last one repeat it and are not stored.
                own = x + tl.minimum(m, tokens - 1) * inputs
                values = _load_inputs(own, part.places, byte, width, columns)
                new_sums = new_sums + (_add_values(sums[m], values),)
                new_codes = new_codes + (_add_codes(codes[m], low, high, values, bits),)
            sums = new_sums
            codes = new_codes
        group = tl.zeros((1, 1), tl.int32)
        if group_bytes > 0:
            group = ((step * block + tl.arange(0, block)) * together // group_bytes)[:, None]
        total = _add_scaled(
            total, codes, sums, part, group, tile, rows, columns, group_bytes, shape.centre, block_tokens
        )
    return total


@triton.jit
def _load_inputs(x, places, byte, width: tl.constexpr, columns: tl.constexpr):
    """Load the inputs of one token for the eight lanes of every byte: [bytes, 1, 1, 1] each, in float32."""
    byte = byte[:, None, None, None]
    values = ()
    for j in tl.static_range(8):
        if places is not None:
            column = tl.load(places + j * width + byte, mask=byte < width, other=-1)
            value = tl.load(x + column, mask=column >= 0, other=0.0)
        else:
            value = tl.load(x + byte * 8 + j, mask=byte * 8 + j < columns, other=0.0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _add_values(total, values):
    """Add the inputs of all lanes."""
    for j in tl.static_range(8):
        total += values[j]
    return total


@triton.jit
def _add_codes(total, low, high, values, bits: tl.constexpr):
    """Add products of codes and inputs, up to four bits of the codes at a time, in the units of `load_levels`."""
    low_field: tl.constexpr = bits if bits < 3 else 4
    high_field: tl.constexpr = bits - 4 if bits - 4 < 3 else 4
    for j in tl.static_range(8):
        scaled = values[j] * (2.0 ** (INPUT_POWER - low_field * (j // low_field)))
        total += isolate(low, j, low_field) * scaled
    if bits > 4:
        for j in tl.static_range(8):
            scaled = values[j] * (2.0 ** (INPUT_POWER + 4 - high_field * (j // high_field)))
            total += isolate(high, j, high_field) * scaled
    return total


@triton.jit
def _add_scaled(
    total,
    codes,
    sums,
    part,
    group,
    tile,
    rows,
    columns: tl.constexpr,
    group_bytes: tl.constexpr,
    centre: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """Add scale · codes + offset · sums for the rows of every word and the groups [bytes or 1, 1]."""
    quads = (rows + 3) // 4
    quad = tile * 8 + tl.arange(0, 8)[None, :]
    inside = quad < quads
    if group_bytes > 0:
        inside = inside & (group * (8 * group_bytes) < columns)
    unit, offset = load_levels(part, group * quads + quad, inside, centre)
    new = ()
    for m in tl.static_range(block_tokens):
        new = new + (total[m] + unit * codes[m] + offset * sums[m],)
    return new
