"""Stored codes: planes, parts, and bytes that are what is counted."""

import pytest
import torch

from niwaki.codes import Part, assemble, centre, pack_planes, read_parts, stored_tensors, unpack_planes


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 17), (2, 64)])
def test_planes_keep_every_code(bits: int, shape: tuple[int, int]) -> None:
    code = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    planes = pack_planes(code, bits)
    assert planes.shape == (bits, shape[0], -(-shape[1] // 8))
    assert torch.equal(unpack_planes(planes, shape[1]), code)


def test_bit_c_of_a_plane_byte_belongs_to_column_c() -> None:
    code = torch.tensor([[2, 1, 0, 3]], dtype=torch.uint8)
    assert pack_planes(code, 2).tolist() == [[[0b1010]], [[0b1001]]]


def part(grid: str, columns: torch.Tensor, bits: int, group: int, rows: int = 6) -> Part:
    generator = torch.Generator().manual_seed(bits)
    groups = -(-len(columns) // group) if group else 1
    code = torch.randint(0, 2**bits, (rows, len(columns)), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator).half() + 0.1
    offset = torch.randn(rows, groups, generator=generator).half() if grid == "free" else None
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return Part(columns, bits, grid, group or len(columns), code, scale, offset, zero if grid == "affine" else None)


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
    # Planes 4·6·1 + 1·6·3, scales 6 + 6·3, offsets 6·3 (two bytes each), and a bit for each of 30 columns.
    assert sum(t.nbytes for t in tensors.values()) == 24 + 18 + 2 * (6 + 18 + 18) + 4
