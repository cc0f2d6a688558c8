"""Passes over values: torch and the compiled kernels find the same, at every length, address and place of a fault."""

from typing import Any

import pytest
import torch

from niwaki.formats.scans import Scans, TorchScans, row_counts
from niwaki.formats.sparse import VALUES
from niwaki.kernels.scans import CompiledScans, scans_for
from support.packed_records import example

GOOD, DESCENDING, EQUAL = 0b1110_0100, 0b0001_0100, 0b1110_1010  # two pairs of two-bit indices


def both() -> list[Scans]:
    compiled = scans_for({})
    assert isinstance(compiled, CompiledScans)
    return [TorchScans(), compiled]


def test_bits_are_counted_by_row() -> None:
    for width in (1, 7, 8, 13, 64):
        bytes_OB = torch.randint(0, 256, (5, width), dtype=torch.uint8)
        counts = [sum(int(byte).bit_count() for byte in row) for row in bytes_OB]
        assert row_counts(bytes_OB).tolist() == counts


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found_anywhere(kind: str, bad: float) -> None:
    largest = torch.finfo(VALUES[kind]).max
    for count, shift in [(1, 0), (7, 1), (64, 3), (2500, 0), (2500, 1)]:
        values = torch.full((count,), largest).to(VALUES[kind])
        values[::2] = -largest
        bytes_N = torch.zeros(shift + values.nbytes + 64, dtype=torch.uint8)[shift:]
        for at in {0, count // 2, count - 1}:
            for scans in both():
                bytes_N[: values.nbytes] = values.view(torch.uint8)
                assert scans.values_finite(bytes_N, count, kind)
                broken = values.clone()
                broken[at] = bad
                bytes_N[: values.nbytes] = broken.view(torch.uint8)
                assert not scans.values_finite(bytes_N, count, kind)
                assert scans.values_finite(bytes_N, at, kind)
                if kind == "float16":
                    assert scans.halves_finite(values.view(torch.int16))
                    assert not scans.halves_finite(broken.view(torch.int16))


@pytest.mark.parametrize("bad", [DESCENDING, EQUAL, 0, 255])
def test_one_pair_that_does_not_ascend_is_found_anywhere(bad: int) -> None:
    for rows, width in [(1, 1), (3, 5), (2, 64), (9, 1000)]:
        places_OB = torch.full((rows, width), GOOD, dtype=torch.uint8)
        for at in {0, rows * width // 2, rows * width - 1}:
            for scans in both():
                assert scans.pairs_ascend(places_OB)
                broken = places_OB.clone()
                broken.view(-1)[at] = bad
                assert not scans.pairs_ascend(broken)


def test_a_pair_in_tiles_counts_if_its_row_is_there() -> None:
    """Value j of rows r and 16 + r is in byte 2·r + j, with the indices of two groups of four columns each."""
    rows, good = 40, torch.tensor([0b0000_0000, 0b0101_0101] * 16, dtype=torch.uint8)
    places_TBR = good.repeat(2, 12, 1)
    for scans in both():
        assert scans.tile_pairs_ascend(places_TBR, rows)
    for row in (0, 15, 16, 31, 32, 39, 40, 47, 48, 63):
        for four in (0, 1):
            broken = places_TBR.clone()
            tile, own = divmod(row, 32)
            broken[tile, 7, 2 * (own % 16) + 1] &= 255 ^ (3 << (4 * four + 2 * (own // 16)))
            for scans in both():
                assert scans.tile_pairs_ascend(broken, rows) == (row >= rows)


def test_a_bitmap_is_counted_with_its_starts_and_its_last_byte() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in [(1, 1), (5, 8), (7, 77), (3, 4096)]:
        places_OB = torch.randint(0, 256, (rows, -(-columns // 8)), dtype=torch.uint8, generator=generator)
        places_OB[:, -1] &= (1 << ((columns - 1) % 8 + 1)) - 1
        counts_O = row_counts(places_OB)
        starts_O = (counts_O.cumsum(0) - counts_O).int()
        total = int(counts_O.sum())
        for scans in both():
            assert scans.bitmap(places_OB, columns, starts_O) == (total, False, True)
            for row in range(rows):
                wrong_O = starts_O.clone()
                wrong_O[row] -= 2**31 - 1
                assert scans.bitmap(places_OB, columns, wrong_O) == (total, False, False)
                if columns % 8:
                    beyond = places_OB.clone()
                    beyond[row, -1] |= 128
                    assert scans.bitmap(beyond, columns, starts_O)[1]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("all_finite", (torch.zeros(8, dtype=torch.uint8), 5, 0)),
        ("all_finite", (torch.zeros(8, dtype=torch.uint8), -1, 0)),
        ("all_finite", (torch.zeros(8, dtype=torch.uint8), 1, 3)),
        ("tile_pairs_ascend", (torch.zeros(2, 3, 32, dtype=torch.uint8), 65)),
        ("tile_pairs_ascend", (torch.zeros(2, 3, 32, dtype=torch.uint8), 2**40)),
        ("tile_pairs_ascend", (torch.zeros(2, 3, 16, dtype=torch.uint8), 40)),
        ("scan_bitmap", (torch.zeros(2, 3, dtype=torch.uint8), 32, torch.zeros(2, dtype=torch.int32))),
        ("scan_bitmap", (torch.zeros(2, 3, dtype=torch.uint8), 24, torch.zeros(1, dtype=torch.int32))),
    ],
)
def test_the_passes_refuse_what_they_would_read_beyond(name: str, arguments: tuple[Any, ...]) -> None:
    compiled = both()[1]._compiled  # type: ignore[attr-defined]
    given = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(ValueError, match="niwaki kernels"):
        getattr(compiled, name)(*given)


def test_tensors_elsewhere_are_read_by_torch() -> None:
    tensors = example("bitmap-int4").tensors
    assert isinstance(scans_for(tensors), CompiledScans)
    assert isinstance(scans_for({**tensors, "scale": torch.empty(1, device="meta")}), TorchScans)
