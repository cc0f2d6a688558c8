"""Trellis kernels in Triton: the search of the best path (see `kernels.trellis`).

In the search a program takes one ring. The costs of 256 states stay in registers. The branch that each group of states
came from goes to a scratch buffer, which the way back reads. The latency of a row bounds a single column, and the
number of rings bounds a whole matrix. So a sweep is one launch for many columns: rings of other rows never meet.

Legend: N tokens, O rows, I columns, R some rows, C columns of a part, S states, T tiles, B bytes of a ring.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.trellis import RING, STATES
from niwaki.kernels.types import Codebook, Rounded, Start

MAX_RINGS = 2**15  # of one launch: the scratch buffer takes 4 kB a ring at one bit


def encode_triton(wanted_OI: Tensor, weight_O: Tensor, level_S: Tensor, bits: int) -> Tensor:
    """Implement `kernels.trellis.encode`."""
    rows, columns = wanted_OI.shape
    tiles = triton.cdiv(rows, RING)
    state_OI = torch.empty(tiles * RING, columns, dtype=torch.uint8, device=wanted_OI.device)
    rings = tiles * columns
    groups = 256 >> bits
    scratch = torch.empty(min(rings, MAX_RINGS) * RING * groups, dtype=torch.uint8, device=wanted_OI.device)
    for first in range(0, rings, MAX_RINGS):
        count = min(MAX_RINGS, rings - first)
        _encode[(count,)](
            wanted_OI,
            weight_O.contiguous(),
            level_S.contiguous(),
            state_OI,
            scratch,
            first,
            rows,
            columns,
            wanted_OI.stride(0),
            wanted_OI.stride(1),
            bits=bits,
            ring=RING,
            num_warps=1,
        )
    return state_OI


def round_triton(panel_OC: Tensor, coupling_CC: Tensor, book: Codebook, part_C: Tensor, start: Start | None) -> Rounded:
    """Implement `kernels.trellis.round_columns` by one launch, whose programs take a ring with all columns."""
    rows, columns = panel_OC.shape
    tiles = triton.cdiv(rows, RING)
    change_OC = torch.empty_like(panel_OC)
    if start is None:
        value_OC, state_UC = panel_OC, torch.empty(tiles * RING, columns, dtype=torch.uint8, device=panel_OC.device)
    else:
        value_OC, state_UC = start.value_OC.contiguous(), start.state_UC.clone(memory_format=torch.contiguous_format)
    low, high = book.bits[0], book.bits[-1]
    scratch = torch.empty(tiles * 2 * RING, device=panel_OC.device)
    choice = torch.empty(tiles * RING * ((STATES >> low) + 1), dtype=torch.uint8, device=panel_OC.device)
    _round[(tiles,)](
        panel_OC.clone(memory_format=torch.contiguous_format), coupling_CC.contiguous(), book.level_PS.contiguous(),
        book.scale_OP.contiguous(), part_C, value_OC, state_UC, change_OC, scratch, choice, rows, columns,
        len(book.bits), low=low, high=high, descends=start is not None, ring=RING,
        block=triton.next_power_of_2(columns), num_warps=1,
    )  # fmt: skip
    return state_UC, change_OC


@triton.jit
def _encode(
    wanted,
    weight,
    level,
    state,
    scratch,
    first,
    rows,
    columns,
    row_stride,
    column_stride,
    bits: tl.constexpr,
    ring: tl.constexpr,
):
    """Search one ring."""
    number = first + tl.program_id(0)
    tile, column = number // columns, number % columns
    wanted += column.to(tl.int64) * column_stride
    choice = scratch + tl.program_id(0).to(tl.int64) * (ring * (256 >> bits))
    state += tile.to(tl.int64) * ring * columns + column
    _search(wanted, weight, level, choice, state, tile, rows, row_stride, columns, bits, ring)


@triton.jit
def _search(
    wanted, weight, level, choice, state, tile, rows, row_stride, state_stride, bits: tl.constexpr, ring: tl.constexpr
):
    """Write the states of the ring `tile` of a column. `wanted`, `weight` and `state` begin with the column's rows."""
    branches: tl.constexpr = 1 << bits
    groups: tl.constexpr = 256 >> bits
    levels = tl.load(level + tl.arange(0, 256))
    # The first search begins half a ring away and is free at both ends.
    costs = tl.zeros((256,), tl.float32)
    for step in range(ring):
        costs = _advance(
            costs, (ring + ring // 2 - 1 - step) % ring, tile, wanted, weight, levels, choice, rows, row_stride,
            branches, groups, ring,
        )  # fmt: skip
    tl.debug_barrier()
    here = tl.argmin(costs, 0)
    for step in range(ring // 2):
        group = here >> bits
        here = tl.load(choice + (ring // 2 + step) * groups + group).to(tl.int32) * groups + group
    tl.debug_barrier()
    costs = tl.where(tl.arange(0, 256) == here, 0.0, float("inf"))
    for step in range(ring):
        costs = _advance(
            costs, ring - 1 - step, tile, wanted, weight, levels, choice, rows, row_stride, branches, groups, ring
        )
    tl.debug_barrier()
    for row in range(ring):
        tl.store(state + row * state_stride, here.to(tl.uint8))
        group = here >> bits
        here = tl.load(choice + row * groups + group).to(tl.int32) * groups + group


@triton.jit
def _round(
    panel, coupling, level, scale, part, value, state, change, scratch, choice, rows, columns, parts,
    low: tl.constexpr, high: tl.constexpr, descends: tl.constexpr, ring: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Round the rows of one ring column by column, and pass every change on to the columns after it."""
    tile = tl.program_id(0).to(tl.int64)
    lane, place = tl.arange(0, ring), tl.arange(0, block)
    row = tile * ring + lane
    inside = row < rows
    # Wanted values and their weights as the search reads them, and the states that it finds, as numbers of 4 bytes.
    wanted, weight = scratch + tile * (2 * ring), scratch + tile * (2 * ring) + ring
    choice += tile * ring * ((256 >> low) + 1)
    found = choice + ring * (256 >> low)
    for k in range(columns):
        own = tl.load(part + k)
        scales = tl.load(scale + row * parts + own, mask=inside, other=1.0)
        aim = tl.load(panel + row * columns + k, mask=inside, other=0.0)
        old = aim
        if descends:
            old = tl.load(value + row * columns + k, mask=inside, other=0.0)
            aim = old + aim / tl.load(coupling + k * columns + k)
        tl.store(wanted + lane, aim / scales)
        tl.store(weight + lane, tl.where(inside, scales * scales, 0.0))
        tl.debug_barrier()
        if own == 0:
            _search(wanted, weight, level, choice, found, 0, ring, 1, 1, low, ring)
        else:
            _search(wanted, weight, level + 256, choice, found, 0, ring, 1, 1, high, ring)
        tl.debug_barrier()
        here = tl.load(found + lane)
        new = tl.load(level + own * 256 + here.to(tl.int32)) * scales
        moved = tl.where(inside, new - old, 0.0)
        if descends:
            gain = tl.where(inside, (aim - old) * (aim - old) - (aim - new) * (aim - new), 0.0)
            better = tl.sum(gain, 0) > 0
            moved = tl.where(better, moved, 0.0)
            here = tl.where(better, here, tl.load(state + row * columns + k))
        tl.store(state + row * columns + k, here)
        tl.store(change + row * columns + k, moved, mask=inside)
        after = (place > k) & (place < columns)
        shares = tl.load(coupling + k * columns + place, mask=after, other=0.0)
        at, mask = panel + row[:, None] * columns + place[None, :], inside[:, None] & after[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) - moved[:, None] * shares[None, :], mask=mask)
        tl.debug_barrier()


@triton.jit
def _advance(
    costs, row, tile, wanted, weight, levels, choice, rows, row_stride,
    branches: tl.constexpr, groups: tl.constexpr, ring: tl.constexpr,
):  # fmt: skip
    """Return the costs of all states after one more row, and store the branches that they came from."""
    place = tile * ring + row
    inside = place < rows
    value = tl.load(wanted + place.to(tl.int64) * row_stride, mask=inside, other=0.0)
    heavy = tl.load(weight + place, mask=inside, other=0.0)
    best, taken = tl.min(tl.reshape(costs, (branches, groups)), 0, return_indices=True)
    tl.store(choice + row * groups + tl.arange(0, groups), taken.to(tl.uint8))
    best = tl.reshape(tl.broadcast_to(best[:, None], (groups, branches)), (256,))
    miss = value - levels
    return best + heavy * miss * miss
