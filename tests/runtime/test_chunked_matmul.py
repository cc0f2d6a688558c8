"""Matrices decoded by the kernels, and multiplied piece by piece."""

from types import SimpleNamespace

import pytest
import torch

from niwaki.formats.quantized import QuantizedColumns, assemble, centre, stored_tensors
from niwaki.kernels import planes
from niwaki.kernels.planes import decoding_pays, prepared_layer
from niwaki.kernels.types import PlanePart
from niwaki.runtime import chunked_matmul
from niwaki.runtime.chunked_matmul import decode_rows, multiply_in_chunks
from niwaki.runtime.linear import PackedLinear


def packed(rows: int, parts: list[QuantizedColumns]) -> tuple[PackedLinear, torch.Tensor]:
    columns = sum(len(part.columns_C) for part in parts)
    found = PackedLinear(rows, columns, {"parts": [part.describe() for part in parts]}, bias=False)
    found.load_state_dict(stored_tensors(parts, columns))
    return found, assemble(parts)


def part(rows: int, columns_C: torch.Tensor, bits: int, grid: str, group: int) -> QuantizedColumns:
    generator = torch.Generator().manual_seed(bits)
    count = -(-len(columns_C) // group)
    code_OC = torch.randint(0, 2**bits, (rows, len(columns_C)), generator=generator, dtype=torch.uint8)
    scale_OG = (torch.rand(rows, count, generator=generator) + 0.1).half()
    offset_OG = torch.randn(rows, count, generator=generator).half() if grid == "free" else None
    zero_OG = torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)
    return QuantizedColumns(
        columns_C, bits, grid, group, code_OC, scale_OG, offset_OG, zero_OG if grid == "affine" else None
    )


@pytest.mark.parametrize("grid", ["affine", "symmetric", "midrise", "free"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 8, 8), (33, 100, 100), (70, 96, 32), (40, 72, 16)])
def test_any_rows_of_planes_are_decoded(rows: int, columns: int, group: int, bits: int, grid: str) -> None:
    layer, weight = packed(rows, [part(rows, torch.arange(columns), bits, grid, group)])
    compiled = layer._prepare().layer
    for first, last in [(0, rows), (rows // 2, rows), (0, rows // 2)]:
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            guarded = torch.full((last - first + 1, columns), torch.nan, dtype=dtype)
            decode_rows(compiled, first, guarded[:-1])
            torch.testing.assert_close(guarded[:-1].float(), weight[first:last], rtol=limit, atol=limit)
            assert guarded[-1].isnan().all(), "written beyond the last row"


@pytest.mark.parametrize("grid", ["affine", "symmetric", "midrise", "free"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 8, 8), (33, 100, 100), (70, 96, 32), (200, 712, 40)])
def test_planes_decoded_by_transposing_are_the_same(rows: int, columns: int, group: int, bits: int, grid: str) -> None:
    """Bit for bit those of the portable path, where the processor has the instructions; elsewhere that path twice."""
    layer, _ = packed(rows, [part(rows, torch.arange(columns), bits, grid, group)])
    for first in (0, 32) if rows > 32 else (0,):
        outs = []
        for path in (0, 1):
            guarded = torch.full((rows - first + 1, columns), torch.nan, dtype=torch.bfloat16)
            decode_rows(layer._prepare().layer, first, guarded[:-1], path)
            assert guarded[-1].isnan().all() and guarded[:-1].isfinite().all()
            outs.append(guarded[:-1])
        assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ascending", [True, False])
def test_parts_lie_where_their_columns_are(ascending: bool, dtype: torch.dtype) -> None:
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    wide, narrow = order[:24], order[24:]
    if ascending:
        wide, narrow = wide.sort().values, narrow.sort().values
    parts = [part(50, wide, 4, "midrise", 24), part(50, narrow, 1, "free", 56)]
    given = []
    for own, middle in zip(parts, (centre(4, "midrise"), 0.0), strict=True):
        kept = own.tensors()
        tensors = kept["planes"], kept["scale"], kept.get("offset"), None, own.columns_C.int()
        given.append(PlanePart(*tensors, middle, len(own.columns_C), own.group))
    compiled = prepared_layer(given, 50, 80)
    found = decode_rows(compiled, 0, torch.full((50, 80), torch.nan, dtype=dtype))
    torch.testing.assert_close(found.float(), assemble(parts).to(dtype).float(), rtol=1e-6, atol=1e-6)


def test_more_tokens_are_decoded_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """By planes and tokens, in bfloat16, with the instructions; never for codes of eight bits."""
    parts = {bits: [part(64, torch.arange(64), bits, "symmetric", 64).describe()] for bits in (1, 4, 8)}
    monkeypatch.setattr(planes, "cpu_module", lambda: SimpleNamespace(supported=lambda path: path == planes.GFNI))
    x = torch.zeros(10, 64, dtype=torch.bfloat16)
    assert decoding_pays(x, parts[4]) and not decoding_pays(x[:9], parts[4]) and not decoding_pays(x, parts[1])
    assert not decoding_pays(x.float(), parts[4]) and not decoding_pays(x, parts[8])
    monkeypatch.setattr(planes, "cpu_module", lambda: SimpleNamespace(supported=lambda _: False))
    assert not decoding_pays(x, parts[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_are_the_product_with_and_without_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_matmul, "CHUNK_BYTES", 40 * 96 * 2)
    layer, weight = packed(70, [part(70, torch.arange(96), 4, "affine", 32)])
    x = torch.randn(20, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    seen: list[tuple[int, int]] = []

    def rows(first: int, last: int) -> torch.Tensor:
        seen.append((first, last))
        return weight[first:last]

    alone = multiply_in_chunks(x, 70, None, rows)
    by_kernels = multiply_in_chunks(x, 70, layer._prepare().layer, rows)
    assert seen == [(0, 32), (32, 64), (64, 70)]
    expected = x.double() @ weight.double().T
    for found in (alone, by_kernels):
        assert found.dtype == dtype
        assert float((found.double() - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 1e-2)
