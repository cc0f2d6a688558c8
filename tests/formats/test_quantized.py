"""Stored codes: planes, parts, and bytes that are what is counted."""

import pytest
import torch

from niwaki.formats.quantized import (
    QuantizedColumns,
    assemble,
    centre,
    pack_codes,
    pack_planes,
    read_parts,
    stored_tensors,
    unpack_codes,
    unpack_planes,
)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 17), (33, 64), (64, 95)])
def test_planes_keep_every_code(bits: int, shape: tuple[int, int]) -> None:
    code = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    planes = pack_planes(code, bits)
    assert planes.dtype == torch.uint8 and planes.shape == (-(-shape[0] // 32), bits, -(-shape[1] // 8), 32)
    assert torch.equal(unpack_planes(planes, *shape), code)
    assert torch.equal(unpack_codes(pack_codes(code, bits), code.numel()).view(shape), code)


def test_a_byte_holds_eight_columns_of_a_row() -> None:
    code = torch.zeros(2, 12, dtype=torch.uint8)
    code[0, 0], code[1, 7], code[0, 9] = 2, 1, 3
    planes = pack_planes(code, 2)  # [tile 0, plane, byte, row]
    assert planes[0, 0, 0, 1] == 0x80 and planes[0, 0, 1, 0] == 0b10
    assert planes[0, 1, 0, 0] == 1 and planes[0, 1, 1, 0] == 0b10
    assert int((planes != 0).sum()) == 4


def part(grid: str, columns: torch.Tensor, bits: int, group: int, rows: int = 6) -> QuantizedColumns:
    generator = torch.Generator().manual_seed(bits)
    groups = -(-len(columns) // group) if group else 1
    code = torch.randint(0, 2**bits, (rows, len(columns)), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator).half() + 0.1
    offset = torch.randn(rows, groups, generator=generator).half() if grid == "free" else None
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedColumns(
        columns, bits, grid, group or len(columns), code, scale, offset, zero if grid == "affine" else None
    )


@pytest.mark.parametrize("grid", ["affine", "symmetric", "midrise", "free"])
def test_decode_follows_the_definition(grid: str) -> None:
    found = part(grid, torch.arange(20), 4, 8)
    decoded = found.decode()
    for row in range(6):
        for column in range(20):
            group = column // 8
            scale = float(found.scale_OG[row, group])
            if found.offset_OG is not None:
                offset = float(found.offset_OG[row, group])
            else:
                zero = centre(4, grid) if found.zero_OG is None else float(found.zero_OG[row, group])
                offset = -zero * scale
            expected = int(found.code_OC[row, column]) * scale + offset
            assert float(decoded[row, column]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_two_parts_come_back_from_their_tensors_and_bytes_are_theirs() -> None:
    columns = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    parts = [part("midrise", columns[:8].sort().values, 4, 0), part("free", columns[8:].sort().values, 1, 8)]
    tensors = stored_tensors(parts, 30)
    again = read_parts(tensors, [p.describe() for p in parts], 30)
    assert torch.equal(assemble(again), assemble(parts))
    # Planes of 32 rows (4 of one byte, 1 of three), scales 6 + 6·3, offsets 6·3, a bit for each column.
    assert sum(t.nbytes for t in tensors.values()) == 7 * 32 + 2 * (6 + 18 + 18) + 4
