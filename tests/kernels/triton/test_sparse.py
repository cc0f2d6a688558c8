"""The GPU products with nonzeros against the decoded matrix in float64, interpreted by Triton: layouts, values, shapes.

Tensor cores in float16 only: Triton's interpreter multiplies the bits of bfloat16 as integers. The whole is checked on
a GPU by `benchmarks/kernels/sparse_linear.py --check`.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from niwaki.formats.sparse import LAYOUTS, VALUES, Sparse
from niwaki.formats.sparse_tiles import Tiled
from niwaki.kernels import sparse_gpu
from niwaki.kernels.sparse_gpu import cores_reach, ranks_of
from niwaki.kernels.types import GpuRecord
from niwaki.runtime.sparse_linear import SparseLinear, for_gpu
from support.bit_planes import OnGpu, relative_error
from support.sparse_records import pruned, record_of, tiled
from support.triton_interpreter import interpreted

HERE = __name__
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Rows, columns, columns of a group: bytes of places odd, even and whole chunks, rows and columns that fill no tile.
SHAPES = [(5, 7, 8), (3, 200, 16), (4, 272, 64)]
KINDS_OF = {0: ("bfloat16", "int4"), 1: ("float16", "int8"), 2: ("float32", "bfloat16", "int4")}


def emptied(record: Sparse | Tiled) -> Sparse | Tiled:
    """Fill the slack bytes after the values, which must not count, with NaN or large codes."""
    if isinstance(record, Sparse):
        values_N = record.values_N.clone()
        values_N[-31:] = 0x7F
        return dataclasses.replace(record, values_N=values_N)
    return record


def records(number: int) -> list[Sparse]:
    """Every layout with some kinds of values; every kind comes with one of the shapes. One row is empty."""
    rows, columns, group = SHAPES[number]
    found = []
    for layout in LAYOUTS:
        for kind in KINDS_OF[number]:
            if kind in VALUES:
                weight_OI = pruned(rows, columns, layout).to(VALUES[kind])
                weight_OI[rows // 2] = 0
                found.append(emptied(Sparse.encode(weight_OI, layout=layout)))
            else:
                found.append(emptied(record_of(rows, columns, kind, layout, group)))
    return found


def check(
    kernel: Any, record: Sparse | Tiled, tokens: int, dtype: torch.dtype, *sizes: Any, bias: bool = False
) -> None:
    """One product into an output that was filled with NaN."""
    given, weight_OI = for_gpu(record), record.decode().double()
    generator = torch.Generator().manual_seed(tokens)
    x_NI = torch.randn(tokens, given.columns, generator=generator).to(dtype)
    bias_O = torch.randn(given.rows, generator=generator) if bias else None
    out_NO = torch.full((tokens, given.rows), float("nan"), dtype=dtype)
    kernel(x_NI, given, bias_O, out_NO, *sizes)
    wanted_NO = x_NI.double() @ weight_OI.T + (0 if bias_O is None else bias_O.double())
    found = relative_error(out_NO, wanted_NO)
    assert found < LIMITS[dtype], (record.describe(), tokens, dtype, sizes, found)


def test_a_few_tokens_are_the_product_with_the_decoded_matrix() -> None:
    interpreted("few", HERE)


def few() -> None:
    """All layouts, kinds and shapes; every number of tokens of a block, more than one block, bias."""
    from niwaki.kernels.triton.sparse import SparseLaunch, fma_product

    for number in range(len(SHAPES)):
        for record in records(number):
            check(fma_product, record, 1 + number, torch.float32, bias=number == 1)
    wide_OI = torch.randn(2, 2**16 + 64)  # more columns than 16 bits count
    wide_OI[:, ::5] = 0
    check(fma_product, Sparse.encode(wide_OI, layout="bitmap"), 1, torch.float32)
    for number, tokens in [(0, 5), (2, 2), (2, 4), (2, 17)]:
        check(fma_product, records(0)[number], tokens, torch.bfloat16, SparseLaunch(4, 1))


def test_a_few_tokens_with_tiles() -> None:
    interpreted("few_tiles", HERE)


def few_tiles() -> None:
    """Rows that fill no tile, groups and none, all dtypes."""
    from niwaki.kernels.triton.sparse_tiles import fma_product
    from niwaki.kernels.types import TileLaunch

    for rows, columns, group, tokens, dtype in [
        (5, 96, 1000, 1, torch.float32), (33, 64, 32, 2, torch.float16), (5, 160, 64, 5, torch.bfloat16),
    ]:  # fmt: skip
        check(fma_product, tiled(rows, columns, group), tokens, dtype, TileLaunch(2, 2), bias=tokens == 2)
    check(fma_product, tiled(33, 64, 32), 1, torch.float32)


def test_tensor_cores_and_decoding() -> None:
    interpreted("cores", HERE)


def cores() -> None:
    """Products of some tokens where groups allow it; every matrix decoded exactly, whole and from a tile on."""
    from niwaki.kernels.triton import sparse_tiles_dot as triton_sparse_tiles_dot
    from niwaki.kernels.triton.sparse_dot import SparseDotLaunch, core_product, decode

    every: list[Sparse | Tiled] = [record for number in range(len(SHAPES)) for record in records(number)]
    every += [tiled(33, 64, 64)]
    for record in every:
        given = for_gpu(record)
        if cores_reach(torch.zeros(1, dtype=torch.float16), given):
            if isinstance(record, Tiled):
                launch = SparseDotLaunch(32, 8, 2, 1)
                check(triton_sparse_tiles_dot.core_product, record, 3, torch.float16, launch, bias=True)
            else:
                launch = SparseDotLaunch(16, 8, 4, 2)
                check(core_product, record, 3, torch.float16, launch, bias=True)
        for first in (0, 32) if given.rows > 32 else (0,):
            out_RI = torch.full((given.rows - first, given.columns), float("nan"))
            decode(given, first, out_RI)
            assert torch.equal(out_RI, record.decode()[first:]), record.describe()
    check(triton_sparse_tiles_dot.core_product, tiled(5, 384, 128), 33, torch.float16)
    check(triton_sparse_tiles_dot.core_product, tiled(33, 96, 1000), 17, torch.float16)
    check(core_product, records(2)[4], 17, torch.float16)
    half_RI = torch.full((4, 272), float("nan"), dtype=torch.bfloat16)
    decode(for_gpu(records(2)[1]), 0, half_RI)
    assert torch.equal(half_RI, records(2)[1].decode().bfloat16())


def test_layers_choose_a_way_by_the_number_of_tokens() -> None:
    interpreted("ways", HERE)


def ways() -> None:
    """The layer as on a GPU, but for the device: every way gives the same, with a bias, also as an operator."""
    sparse_gpu.DECODED_BYTES = 32 * 64 * 2  # a tile at once
    for record, limits in [(tiled(34, 64, 32), (1, 1)), (record_of(34, 64, "bfloat16", "two_four"), (1, 3))]:
        sparse_gpu.MAX_FMA_TOKENS[for_gpu(record).layout], sparse_gpu.MAX_CORE_TOKENS[for_gpu(record).layout] = limits
        rows, columns = record.describe()["shape"]
        layer = SparseLinear(rows, columns, record.describe(), True)
        layer.load_state_dict({**record.tensors(), "bias": torch.randn(rows)})
        given = for_gpu(layer.record())
        for tokens in (0, 1, 2, 9):
            x_NI = torch.randn(tokens, columns).half()
            wanted_NO = x_NI.double() @ record.decode().double().T + layer.bias.double()
            found_NO = sparse_gpu.multiply(x_NI, given, layer.bias)
            numbers = [given.rows, given.columns, given.group, given.bits]
            again_NO = sparse_gpu.product_op(x_NI, *given[5:], layer.bias, numbers, given.layout)
            assert found_NO.shape == (tokens, rows) and torch.equal(found_NO, again_NO)
            assert tokens == 0 or relative_error(found_NO, wanted_NO) < 2e-3, (tokens, limits)


def test_a_traced_graph_knows_the_shape_of_the_product() -> None:
    given = for_gpu(record_of(6, 64, "int8", "bitmap"))
    numbers = [given.rows, given.columns, given.group, given.bits]
    with FakeTensorMode(allow_non_fake_inputs=True):
        x_NI = torch.empty(7, 64, dtype=torch.bfloat16)
        found_NO = sparse_gpu.product_op(x_NI, *given[5:], None, numbers, given.layout)
    assert found_NO.shape == (7, 6) and found_NO.dtype == torch.bfloat16


def test_every_layout_has_its_limits() -> None:
    assert set(sparse_gpu.MAX_FMA_TOKENS) == {*LAYOUTS, "two_four_tiles"} == {*sparse_gpu.MAX_CORE_TOKENS, "bitmap"}


def test_the_table_of_a_bitmap_counts_the_values_up_to_every_64_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    keep_OI = torch.rand(5, 1000, generator=generator) < 0.5
    record = Sparse.encode(keep_OI.float(), layout="bitmap")
    ranks = ranks_of(record.metadata_OB)
    assert ranks.shape == (5, 16) and ranks.dtype == torch.int16
    for chunk in range(16):
        assert torch.equal(ranks[:, chunk].int() & 0xFFFF, keep_OI[:, : 64 * (chunk + 1)].sum(1).int())
    full = ranks_of(torch.full((1, 65528 // 8), 255, dtype=torch.uint8))
    assert int(full[0, -1]) & 0xFFFF == 65528
    assert int(ranks_of(torch.full((1, 65536 // 8), 255, dtype=torch.uint8))[0, -1]) == 65536


@pytest.mark.parametrize(("dtype", "group", "there"), [
    (torch.bfloat16, 128, True), (torch.float16, 0, True), (torch.float32, 128, False), (torch.bfloat16, 96, False),
])  # fmt: skip
def test_reach_of_tensor_cores(dtype: torch.dtype, group: int, there: bool) -> None:
    some = torch.zeros(1)
    record = GpuRecord(1, 192, group, "two_four", 4, some, some, None, None, some)
    assert cores_reach(torch.zeros(1, 192, dtype=dtype), record) == there


def test_a_layer_on_a_gpu_hands_over_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check without a GPU what the layer passes to the product, and when it builds the semi-structured form."""
    seen: list[Any] = []

    def multiply(x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None) -> Tensor:
        seen.append(record)
        return x_NI.new_zeros(len(x_NI), record.rows)

    def form(record: GpuRecord, dtype: torch.dtype) -> Tensor:
        seen.append(dtype)
        return torch.ones(record.rows, record.columns, dtype=dtype)

    monkeypatch.setattr("niwaki.runtime.sparse_linear.multiply", multiply)
    monkeypatch.setattr("niwaki.runtime.sparse_linear.semi_structured", form)
    record = record_of(16, 64, "bfloat16", "two_four")
    layer = SparseLinear(16, 64, record.describe(), False)
    layer.load_state_dict(record.tensors())
    layer._prepared = (layer.get_buffer("values"), for_gpu(record))
    x_NI = torch.ones(200, 64).as_subclass(OnGpu)
    assert float(layer(x_NI).sum()) == 0 and isinstance(seen[0], GpuRecord)
    layer.fast_prompts = True
    for _ in range(2):
        assert float(layer(x_NI)[0, 0]) == 64
    assert seen[1:] == [torch.float32]
    assert float(layer(x_NI[:1]).sum()) == 0 and len(seen) == 3
