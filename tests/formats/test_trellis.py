"""Rings of a trellis: states from bits and back, closed at the end, bytes as they are counted."""

import pytest
import torch

from niwaki.formats.packed import PackedTensors
from niwaki.formats.trellis import RING, pack_rings, trellis_bytes, unpack_rings
from support.trellis_records import trellis_matrix


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_any_bits_are_rings_that_survive_packing(bits: int) -> None:
    rings = torch.randint(0, 256, (2, 5, 4 * bits), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    state = unpack_rings(rings)
    assert torch.equal(pack_rings(state, bits), rings)
    # The state of a row begins with its own bits and goes on with those of the next rows, around the ring.
    row = torch.arange(2 * RING)
    following = state[row // RING * RING + (row + 1) % RING]
    assert torch.equal(state >> bits, following & (255 >> bits))


@pytest.mark.parametrize(("rows", "counts"), [(45, {2: 37}), (64, {1: 8, 2: 29}), (33, {3: 5, 4: 9})])
def test_bytes_are_counted_as_they_are_stored(rows: int, counts: dict[int, int]) -> None:
    columns = sum(counts.values())
    parts = trellis_matrix(rows, columns, *counts)
    # The counts of a record of two parts are those of `trellis_matrix`.
    own = {part.bits: len(part.columns_C) for part in parts}
    assert trellis_bytes(rows, own) == PackedTensors.of_trellis(parts, (rows, columns)).nbytes
