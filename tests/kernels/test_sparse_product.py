"""Products with nonzeros against the decoded matrix: layouts, values, paths, odd shapes, threads, a forked worker."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.formats.sparse import KINDS, LAYOUTS, VALUES, Sparse
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.sparse_product import prepared_layer, product
from niwaki.runtime.chunked_matmul import decode_rows
from support.sparse_records import record_of

PATHS = [0, 1, 2, 4]  # the best, portable, AVX2, AVX-512 for bfloat16 (the next best where there is none)


def arguments(record: Sparse) -> tuple[Any, ...]:
    return record.metadata_OB, record.values_N, record.starts_O, record.scale_OG


def layer_of(record: Sparse) -> Any:
    return prepared_layer(*arguments(record), record.columns, record.layout, record.values, record.group)


def one_by_one(x: Tensor, record: Sparse) -> Tensor:
    """The product in double precision from a walk over places and values, independent of decode and kernels."""
    at, codes = 0, record.values in ("int8", "int4")
    rows, columns = len(record.metadata_OB), record.columns
    found = torch.zeros(len(x), rows, dtype=torch.float64)
    raw = record.values_N.tolist()
    for row in range(rows):
        for byte in range(record.metadata_OB.shape[1]):
            place = int(record.metadata_OB[row, byte])
            lanes = [i for i in range(8) if place >> i & 1]
            if record.layout == "two_four":
                lanes = [place & 3, place >> 2 & 3, 4 + (place >> 4 & 3), 4 + (place >> 6 & 3)]
            for lane in lanes:
                if record.values == "int4":
                    value = float((raw[at // 2] >> 4 * (at % 2) & 15 ^ 8) - 8)
                elif record.values == "int8":
                    value = float((raw[at] ^ 128) - 128)
                else:
                    size = VALUES[record.values].itemsize
                    value = float(
                        torch.frombuffer(bytearray(raw[at * size : (at + 1) * size]), dtype=VALUES[record.values])
                    )
                at += 1
                column = 8 * byte + lane
                if codes and record.scale_OG is not None:
                    value *= float(record.scale_OG[row : row + 1].view(torch.float16)[0, column // record.group])
                if column < columns:
                    found[:, row] += value * x[:, column].double()
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / (expected.norm() + 1e-9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 36), (6, 100)])
def test_every_path_is_the_walk_over_the_values(rows: int, columns: int, layout: str, kind: str) -> None:
    record = record_of(rows, columns, kind, layout)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    expected = one_by_one(x, record)
    assert error(x.double() @ record.decode().double().T, expected) < 1e-6
    for path in PATHS:
        assert error(product(layer_of(record), x, rows, path), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 36), (9, 64), (70, 328)])
def test_every_path_decodes_any_rows_to_the_same_bits(rows: int, columns: int, layout: str, kind: str) -> None:
    record = record_of(rows, columns, kind, layout)
    layer, weight = layer_of(record), record.decode()
    for first, last in [(0, rows), (rows // 2, rows), (0, rows // 2)]:
        for path in PATHS:
            for dtype in (torch.float32, torch.bfloat16):
                guarded = torch.full((last - first + 1, columns), torch.nan, dtype=dtype)
                decode_rows(layer, first, guarded[:-1], path)
                assert torch.equal(guarded[:-1], weight[first:last].to(dtype))
                assert guarded[-1].isnan().all(), "written beyond the last row"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 16])
def test_tokens_threads_and_types_of_input(tokens: int, layout: str, kind: str) -> None:
    compiled = cpu_module()
    assert compiled is not None
    record = record_of(70, 328, kind, layout)
    layer = layer_of(record)
    x = torch.randn(tokens, 328, generator=torch.Generator().manual_seed(tokens))
    expected = x.double() @ record.decode().double().T
    out = torch.full((tokens, 70), torch.nan)
    narrow, narrow_out = x.bfloat16(), torch.full((tokens, 70), torch.nan, dtype=torch.bfloat16)
    for threads in (1, 2, 3):
        for path in PATHS:
            layer.multiply(x.data_ptr(), out.fill_(torch.nan).data_ptr(), tokens, False, threads, path)
            assert error(out, expected) < 1e-5
            layer.multiply(narrow.data_ptr(), narrow_out.fill_(torch.nan).data_ptr(), tokens, True, threads, path)
            exact = narrow.double() @ record.decode().double().T
            assert error(narrow_out, exact) < 4e-3
    assert error(product(layer, x.half(), 70), x.half().double() @ record.decode().double().T) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_behind_the_last_one_change_nothing(layout: str) -> None:
    """Kernels read up to 32 bytes further: those are in the tensor, and count for nothing."""
    for kind in KINDS:
        record = record_of(9, 72, kind, layout)
        x = torch.randn(2, 72, generator=torch.Generator().manual_seed(0))
        before = product(layer_of(record), x, 9)
        record.values_N[-32:] = 255
        assert torch.equal(product(layer_of(record), x, 9), before)


def test_empty_and_full_rows() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[3] = 0
    for kind, dtype in VALUES.items():
        record = Sparse.encode(weight, dtype, "bitmap")
        for path in PATHS:
            y = product(layer_of(record), torch.eye(64)[:16], 4, path)
            assert torch.equal(y, weight.to(dtype).float().T[:16]), kind


def test_wide_vectors_are_the_walk_over_the_values_where_the_processor_has_them() -> None:
    """Skip visibly where the processor lacks the path, so that a run shows whether it was tested."""
    compiled = cpu_module()
    assert compiled is not None
    if not compiled.supported(4):
        pytest.skip("this processor has no AVX-512 with VBMI2 and BF16")
    for layout in LAYOUTS:
        for rows, columns in [(1, 1), (3, 31), (5, 33), (9, 256), (40, 1000)]:
            record = record_of(rows, columns, "bfloat16", layout)
            for tokens in (1, 2, 5, 8, 17):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16()
                found = product(layer_of(record), x, rows, 4)
                assert error(found.double(), one_by_one(x.float(), record)) < 4e-3  # results are bfloat16


def in_worker(queue: Any) -> None:
    torch.set_num_threads(1)  # loops of torch would wait for threads that did not survive the fork
    record = record_of(64, 256, "bfloat16", "bitmap")
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    out = torch.full((1, 64), torch.nan)
    layer_of(record).multiply(x.data_ptr(), out.data_ptr(), 1, False, 2, 0)
    queue.put(error(out, x.double() @ record.decode().double().T))


def test_in_a_forked_worker() -> None:
    record = record_of(64, 256, "bfloat16", "bitmap")
    product(layer_of(record), torch.ones(1, 256), 64)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=in_worker, args=(queue,))
    worker.start()
    assert queue.get(timeout=60) < 1e-5
    worker.join()
