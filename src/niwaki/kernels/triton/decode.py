"""Decodes matrices stored as bit planes, for products of many tokens: one Triton launch for some rows of all parts.

The parts lie side by side in the result, [rows, C₀ + C₁], and whoever multiplies puts the inputs in that order. Rows
are then written whole, a part's columns one after another; scattered to their places, they would be single elements
of two bytes, written by two programs into the same sectors. Inputs are far fewer than weights.

A program owns a tile of 32 rows and 16 bytes of columns a warp of one part. A thread reads words of four rows × eight
columns, four side by side, isolates codes as `triton_planes` does, and stores the eight columns of a row as they come,
sixteen bytes of bf16 at once: nothing moves between threads, and a warp writes two stretches of 256 bytes. (Matrices
whose columns, or whose first part's, are no multiple of eight get narrower stores.)

Exact: a code times a float16 scale has at most 19 bits, as −zero · scale has; what is rounded is their sum in float32,
as in `codes.Part.decode`, and then the result.

Floor: the bytes of the planes read and of the result written (two a weight), over the memory bandwidth; then whoever
multiplies reads the result again. At 4 bits 6.5 instructions a weight, at 8 bits 10: on an H100 a quarter of that time.

Legend: R rows to decode, C columns of a part, T tiles of 32 rows, K bits, B bytes of eight columns, G groups of columns
that share a scale, W the 8 words of a tile (word w holds rows 4w … 4w + 3).
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.triton.planes import INPUT_POWER, TILE, isolate, load_fields, load_levels, pointers
from niwaki.kernels.types import PlanePart

WARP_BYTES = tl.constexpr(16)  # of columns, of 32 rows: what a warp reads at once, four words a thread
STORE_BYTES = 16  # the widest store of a thread
WARPS = 4  # of a program


def decode_planes(parts: Sequence[PlanePart], rows: int, first: int, out_RC: Tensor, warps: int = WARPS) -> None:
    """Writes rows [first, first + R) of `rows`, all parts side by side. Parts as of `PlanePart.for_gpu`.

    `out_RC` is contiguous, in any float dtype. `first` begins a tile, and R ends one or is at the end.
    """
    last = first + len(out_RC)
    assert first % TILE == 0 and (last % TILE == 0 or last == rows) and last <= rows
    assert out_RC.is_contiguous() and out_RC.shape[1] == sum(part.columns for part in parts)
    blocks = sum(triton.cdiv(part.columns, 8 * WARP_BYTES.value * warps) for part in parts)
    _decode[blocks, triton.cdiv(len(out_RC), TILE)](
        out_RC,
        rows,
        first // TILE,
        *pointers(parts, 0)[:4],
        *pointers(parts, 1)[:4],
        form_0=_form(parts, 0),
        form_1=_form(parts, 1),
        together=min(STORE_BYTES // out_RC.element_size(), 8),
        warps=warps,
        num_warps=warps,
    )


def _form(parts: Sequence[PlanePart], number: int) -> tuple[int, int, int, float]:
    """The numbers of a part, for the kernel: columns, bits, columns of a group (0: one group), centre."""
    if number >= len(parts):
        return 0, 0, 0, 0.0
    part = parts[number]
    return part.columns, part.planes_TKBR.shape[1], part.group if len(part.scale_GO) > 1 else 0, part.centre


@triton.jit(do_not_specialize=["first"])
def _decode(
    out,
    rows,
    first,
    planes_0,
    scale_0,
    offset_0,
    zero_0,
    planes_1,
    scale_1,
    offset_1,
    zero_1,
    form_0: tl.constexpr,
    form_1: tl.constexpr,
    together: tl.constexpr,
    warps: tl.constexpr,
):
    """A program: a tile of rows, some bytes of columns of one part; those of the first part come first."""
    columns: tl.constexpr = form_0[0] + form_1[0]
    blocks_0: tl.constexpr = (form_0[0] + 8 * WARP_BYTES * warps - 1) // (8 * WARP_BYTES * warps)
    block = tl.program_id(0)
    tile = first + tl.program_id(1)
    out += tl.program_id(1).to(tl.int64) * (32 * columns)
    if block < blocks_0:
        part_0 = (planes_0, scale_0, offset_0, zero_0)
        _decode_block(out, columns, tile, block, part_0, rows, form_0, together, warps)
    elif form_1[0] > 0:
        part_1 = (planes_1, scale_1, offset_1, zero_1)
        _decode_block(out + form_0[0], columns, tile, block - blocks_0, part_1, rows, form_1, together, warps)


@triton.jit
def _decode_block(
    out,
    stride: tl.constexpr,
    tile,
    block,
    part,
    rows,
    form: tl.constexpr,
    together: tl.constexpr,
    warps: tl.constexpr,
):
    """One block of bytes of a part; `together` columns are stored at once, rows are `stride` elements apart."""
    columns: tl.constexpr = form[0]
    bits: tl.constexpr = form[1]
    group: tl.constexpr = form[2]
    width: tl.constexpr = (columns + 7) // 8
    low_field: tl.constexpr = bits if bits < 3 else 4
    high_field: tl.constexpr = bits - 4 if bits - 4 < 3 else 4
    byte = block * (WARP_BYTES * warps) + tl.arange(0, WARP_BYTES * warps)
    planes = part[0] + tile.to(tl.int64) * (bits * width * 8)
    low = load_fields(planes, byte, width, bits if bits < 4 else 4)
    high = low
    if bits > 4:
        high = load_fields(planes + 4 * width * 8, byte, width, bits - 4)
    unit, offset = _levels(part, byte, 0, tile, rows, columns, group, form[3])
    weights = ()
    for j in tl.static_range(8):
        code = isolate(low, j, low_field) * (2.0 ** (INPUT_POWER - low_field * (j // low_field)))
        if bits > 4:
            code += isolate(high, j, high_field) * (2.0 ** (INPUT_POWER + 4 - high_field * (j // high_field)))
        if group % 8 > 0:  # columns of a byte lie in several groups
            unit, offset = _levels(part, byte, j, tile, rows, columns, group, form[3])
        weights = weights + ((code * unit + offset).to(out.dtype.element_ty),)
    _store(out, weights, tile, block, rows, columns, stride, together, warps)


@triton.jit
def _levels(
    part,
    byte,
    lane: tl.constexpr,
    tile,
    rows,
    columns: tl.constexpr,
    group: tl.constexpr,
    centre: tl.constexpr,
):
    """Scales and offsets of the rows of every word, for a lane of every byte: [bytes or 1, 8 words, 2, 2]."""
    quads = (rows + 3) // 4
    place = tile * 8 + tl.arange(0, 8)[None, :]
    inside = place < quads
    if group > 0:
        column = byte[:, None] * 8 + lane
        inside = inside & (column < columns)
        place += column // group * quads
    return load_levels(part, place, inside, centre)


@triton.jit
def _store(
    out,
    weights,
    tile,
    block,
    rows,
    columns: tl.constexpr,
    stride: tl.constexpr,
    together: tl.constexpr,
    warps: tl.constexpr,
):
    """Stores eight lanes of [bytes, 8 words, 2, 2] as they lie: [pieces of `together` columns, threads the fastest]."""
    even = tl.join(tl.join(weights[0], weights[4]), tl.join(weights[2], weights[6]))
    odd = tl.join(tl.join(weights[1], weights[5]), tl.join(weights[3], weights[7]))
    again: tl.constexpr = 8 // together  # pieces of a byte
    pieces: tl.constexpr = warps * WARP_BYTES * 32 * again
    value = tl.reshape(tl.join(even, odd), (warps, WARP_BYTES, 2, 4, 4, again, together))
    # [piece of a byte, row of a word, word of a thread; warp, byte, half of the words; columns]
    value = tl.reshape(tl.permute(value, (5, 4, 3, 0, 1, 2, 6)), (pieces, together))
    piece = tl.arange(0, pieces)
    thread = piece % (warps * WARP_BYTES * 2)
    store = piece // (warps * WARP_BYTES * 2)
    row = thread % 2 * 16 + store % 4 * 4 + store // 4 % 4
    column = (block * (warps * WARP_BYTES) + thread // 2) * 8 + store // 16 * together
    row = row[:, None]
    column = column[:, None] + tl.arange(0, together)[None, :]
    tl.store(out + row * stride + column, value, mask=(tile * 32 + row < rows) & (column < columns))
