"""Pruned matrices and their sparse records."""

import torch
from torch import Tensor

from niwaki.formats.quantized import QuantizedColumns
from niwaki.formats.sparse import VALUES, Sparse
from niwaki.formats.sparse_tiles import Tiled


def pruned(rows: int, columns: int, layout: str, seed: int = 0) -> Tensor:
    """Return a matrix with half zeros; for two_four some groups keep one, or none."""
    generator = torch.Generator().manual_seed(seed + rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    score = torch.rand(rows, columns, generator=generator)
    if layout == "bitmap":
        return torch.where(score < 0.5, weight, 0.0)
    padded = torch.nn.functional.pad(score, (0, -columns % 4)).view(rows, -1, 4)
    keep = (padded >= padded.topk(2, dim=2).values[..., 1:]) & (padded > 0.3)
    return torch.where(keep.view(rows, -1)[:, :columns], weight, 0.0)


def coded(rows: int, columns: int, bits: int, group: int, layout: str) -> tuple[QuantizedColumns, Tensor]:
    """Return a symmetric part whose pruned codes are the middle code, and the matrix that it decodes to."""
    keep = pruned(rows, columns, layout) != 0
    generator = torch.Generator().manual_seed(rows)
    code = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    code = torch.where(keep, code, torch.tensor(2 ** (bits - 1), dtype=torch.uint8))
    scale = (torch.rand(rows, -(-columns // group), generator=generator) + 0.1).half()
    part = QuantizedColumns(torch.arange(columns), bits, "symmetric", group, code, scale)
    return part, part.decode()


def pruned_exactly(rows: int, columns: int) -> Tensor:
    """Return a matrix that keeps two of every four weights."""
    weight = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    return torch.where(weight >= weight.topk(2, dim=2).values[..., 1:], weight, 0.0).view(rows, columns)


def record_of(rows: int, columns: int, kind: str, layout: str, group: int = 32) -> Sparse:
    """Return the record of a pruned matrix with one kind of values."""
    if kind in VALUES:
        return Sparse.encode(pruned(rows, columns, layout), VALUES[kind], layout)
    found = Sparse.encode_codes(coded(rows, columns, 4 if kind == "int4" else 8, group, layout)[0], layout=layout)
    assert found is not None
    return found


def tiled(rows: int, columns: int, group: int) -> Tiled:
    """Return the tiles of a matrix with 2:4 zeros and 4-bit codes."""
    codes = Sparse.encode_codes(coded(rows, columns, 4, group, "two_four")[0], layout="two_four")
    assert codes is not None
    found = Tiled.encode(codes)
    assert found is not None
    return found
