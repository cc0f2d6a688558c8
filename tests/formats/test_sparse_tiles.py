"""Tiles hold the matrix that the rows hold, in the bytes they claim."""

import pytest
import torch

from niwaki.formats.descriptors import read_descriptor
from niwaki.formats.packed import decode_stored, record_names
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import Tiled
from support.sparse_records import coded, pruned_exactly


@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 32, 32), (33, 64, 32), (70, 160, 64), (64, 96, 1000)])
def test_tiles_give_the_matrix_back(rows: int, columns: int, group: int) -> None:
    part, weight = coded(rows, columns, 4, group, "two_four")
    record = Sparse.encode_codes(part, layout="two_four")
    assert record is not None
    tiled = Tiled.encode(record)
    assert tiled is not None and torch.equal(tiled.decode(), weight)
    for first in range(0, rows, 32):
        assert torch.equal(tiled.rows(first, rows).decode(), weight[first:])
    about, tensors = tiled.describe(), tiled.tensors()
    assert list(tensors) == record_names(about)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == read_descriptor("m", about).shapes()
    stored = {f"a.{name}": tensor for name, tensor in tensors.items()}
    assert torch.equal(decode_stored(stored, {"a": about}, torch.float32)["a.weight"], weight)


def test_three_and_an_eighth_bits() -> None:
    rows, columns = 256, 1024
    code = torch.where(pruned_exactly(rows, columns) != 0, 3, 8).to(torch.uint8)
    part, _ = coded(rows, columns, 4, 128, "two_four")
    record = Sparse.encode_codes(type(part)(part.columns_C, 4, "symmetric", 128, code, part.scale_OG))
    assert record is not None
    tiled = Tiled.encode(record)
    assert tiled is not None
    assert sum(t.nbytes for t in tiled.tensors().values()) * 8 == 3.125 * rows * columns


def test_other_records_have_no_tiles() -> None:
    for columns, bits, layout in ((40, 4, "two_four"), (64, 8, "two_four"), (64, 4, "bitmap")):
        record = Sparse.encode_codes(coded(8, columns, bits, columns, layout)[0], layout=layout)
        assert record is not None and Tiled.encode(record) is None
