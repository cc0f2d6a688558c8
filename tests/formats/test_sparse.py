"""Nonzeros as they are stored: every layout and kind of value gives the matrix back, in the bytes it claims."""

import pytest
import torch

from niwaki.formats.descriptors import read_descriptor
from niwaki.formats.packed import decode_stored, record_names
from niwaki.formats.quantized import QuantizedColumns
from niwaki.formats.sparse import CODES, SLACK_BYTES, VALUES, Sparse, fits_two_four
from support.sparse_records import coded, pruned, pruned_exactly

SHAPES = [(1, 1), (3, 4), (5, 7), (7, 12), (33, 40), (70, 200)]


@pytest.mark.parametrize("layout", ["bitmap", "two_four"])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_come_back_exactly_and_rows_by_themselves(shape: tuple[int, int], values: str, layout: str) -> None:
    weight = pruned(*shape, layout).to(VALUES[values])
    record = Sparse.encode(weight, layout=layout)
    assert (record.layout, record.values) == (layout, values)
    assert torch.equal(record.decode(), weight.float())
    for first in range(0, shape[0], 2):
        assert torch.equal(record.rows(first, shape[0]).decode(), weight[first:].float())
        assert torch.equal(record.rows(first, first + 1).decode(), weight[first : first + 1].float())


@pytest.mark.parametrize("layout", ["bitmap", "two_four"])
@pytest.mark.parametrize(("bits", "group"), [(4, 8), (8, 40), (4, 1000)])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back_exactly(shape: tuple[int, int], bits: int, group: int, layout: str) -> None:
    part, weight = coded(*shape, bits, group, layout)
    record = Sparse.encode_codes(part, layout=layout)
    assert record is not None and CODES[record.values] == bits
    assert torch.equal(record.decode(), weight)
    for row in range(shape[0]):
        assert torch.equal(record.rows(row, row + 1).decode(), weight[row : row + 1])


def test_description_and_tensors_are_all_a_reader_needs() -> None:
    part, weight = coded(40, 64, 4, 32, "two_four")
    for record, expected in ((Sparse.encode_codes(part), weight), (Sparse.encode(weight, torch.float32), weight)):
        assert record is not None
        about, tensors = record.describe(), record.tensors()
        assert list(tensors) == record_names(about)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == read_descriptor("m", about).shapes()
        assert all(not t.is_floating_point() for t in tensors.values())
        stored = {f"a.b.{name}": tensor for name, tensor in tensors.items()}
        found = decode_stored({**stored, "c": weight}, {"a.b": about, "not.here": about}, torch.float32)
        assert sorted(found) == ["a.b.weight", "c"] and torch.equal(found["a.b.weight"], expected)


def test_bytes_at_half_zeros() -> None:
    """9 bits a weight, 3.125 with 4-bit codes in groups of 128: the shares of bfloat16 that are promised."""
    rows, columns = 256, 1024
    for layout in ("bitmap", "two_four"):
        record = Sparse.encode(pruned_exactly(rows, columns).bfloat16(), layout=layout)
        extra = SLACK_BYTES + (4 * rows if layout == "bitmap" else 0)
        nbytes = sum(t.nbytes for t in record.tensors().values())
        assert nbytes == rows * columns * 9 // 8 + extra and nbytes / (2 * rows * columns) < 0.57
    part = QuantizedColumns(
        torch.arange(columns), 4, "symmetric", 128,
        torch.where(pruned_exactly(rows, columns) != 0, 3, 8).to(torch.uint8), torch.ones(rows, columns // 128).half(),
    )  # fmt: skip
    record = Sparse.encode_codes(part)
    assert record is not None and record.layout == "two_four"
    assert sum(t.nbytes for t in record.tensors().values()) / (2 * rows * columns) < 0.20


def test_the_smaller_layout_is_taken() -> None:
    assert Sparse.encode(pruned_exactly(64, 256)).layout == "two_four"
    assert Sparse.encode(pruned(64, 256, "bitmap")).layout == "bitmap"
    sparse = pruned_exactly(64, 256)
    sparse[:, 64:] = 0
    assert fits_two_four(sparse != 0) and Sparse.encode(sparse).layout == "bitmap"  # two_four would store the zeros
    assert Sparse.encode(torch.zeros(3, 256)).decode().sum() == 0


def test_only_codes_with_a_middle_have_a_sparse_form() -> None:
    part, _ = coded(8, 64, 4, 32, "bitmap")
    code, scale = part.code_OC, part.scale_OG
    assert Sparse.encode_codes(QuantizedColumns(part.columns_C, 4, "midrise", 32, code, scale)) is None
    assert Sparse.encode_codes(QuantizedColumns(part.columns_C, 3, "symmetric", 32, code % 8, scale)) is None
    assert (
        Sparse.encode_codes(QuantizedColumns(part.columns_C, 4, "symmetric", 12, code, scale[:, :1].expand(-1, 6)))
        is None
    )
