"""Products with tiles against the decoded matrix: paths, groups, rows that fill no tile, threads, extreme inputs."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import Tiled
from niwaki.kernels.sparse_product import prepared_tiles, product
from niwaki.runtime.chunked_matmul import decode_rows
from support.sparse_records import coded

PATHS = [0, 1, 2, 3]  # the best, portable, AVX2, AVX-512 (the next best where there is none)


def tiled_of(rows: int, columns: int, group: int) -> tuple[Tiled, Tensor]:
    part, weight = coded(rows, columns, 4, group, "two_four")
    record = Sparse.encode_codes(part, layout="two_four")
    assert record is not None
    tiled = Tiled.encode(record)
    assert tiled is not None
    return tiled, weight


def layer_of(tiled: Tiled) -> Any:
    return prepared_tiles(*tiled.tensors().values(), tiled.size, tiled.columns, tiled.group)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / (expected.norm() + 1e-9))


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 32, 32), (33, 64, 32), (70, 160, 64), (96, 4096, 128),
                                                        (64, 96, 1000)])  # fmt: skip
def test_every_path_is_the_decoded_matrix(rows: int, columns: int, group: int, tokens: int) -> None:
    tiled, weight = tiled_of(rows, columns, group)
    layer = layer_of(tiled)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    narrow = x.bfloat16()
    scale = float((x.abs().double() @ weight.abs().double().T).norm()) + 1e-9  # a result may cancel to nearly nothing
    for threads in (1, 2, 3):
        for path in PATHS:
            out = torch.full((tokens, rows), torch.nan)
            layer.multiply(x.data_ptr(), out.data_ptr(), tokens, False, threads, path)
            assert float((out.double() - x.double() @ weight.double().T).norm()) < 3e-4 * scale
            small = torch.full((tokens, rows), torch.nan, dtype=torch.bfloat16)
            layer.multiply(narrow.data_ptr(), small.data_ptr(), tokens, True, threads, path)
            assert float((small.double() - narrow.double() @ weight.double().T).norm()) < 5e-3 * scale
    if columns == 4096:
        assert error(product(layer, x, rows), x.double() @ weight.double().T) < 3e-4


@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 32, 32), (33, 64, 32), (70, 160, 64), (64, 96, 1000)])
def test_any_rows_are_decoded_to_the_same_bits(rows: int, columns: int, group: int) -> None:
    tiled, _ = tiled_of(rows, columns, group)
    layer, weight = layer_of(tiled), tiled.decode()
    for first, last in [(0, rows), (rows // 2, rows), (0, rows // 2)]:
        for dtype in (torch.float32, torch.bfloat16):
            guarded = torch.full((last - first + 1, columns), torch.nan, dtype=dtype)
            assert torch.equal(decode_rows(layer, first, guarded[:-1]), weight[first:last].to(dtype))
            assert guarded[-1].isnan().all(), "written beyond the last row"


def test_paths_agree_and_sums_do_not_overflow() -> None:
    tiled, _ = tiled_of(64, 256, 128)
    tiled.values_TFR.fill_(0x88)  # every code −8
    layer = layer_of(tiled)
    for x in (torch.ones(1, 256), torch.full((1, 256), -3.7), torch.full((1, 256), 1e30), torch.zeros(1, 256)):
        expected = x.double() @ tiled.decode().double().T
        for path in PATHS:
            assert error(product(layer, x, 64, path), expected) < 1e-5
    poisoned = torch.ones(2, 256)
    poisoned[0, 7] = torch.nan
    y = product(layer, poisoned, 64)
    assert y[0].isnan().all() and y[1].isfinite().all()


def in_worker(queue: Any) -> None:
    torch.set_num_threads(1)  # loops of torch would wait for threads that did not survive the fork
    tiled, weight = tiled_of(64, 256, 128)
    x, out = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)), torch.full((1, 64), torch.nan)
    layer_of(tiled).multiply(x.data_ptr(), out.data_ptr(), 1, False, 2, 0)
    queue.put(error(out, x.double() @ weight.double().T))


def test_in_a_forked_worker() -> None:
    tiled, _ = tiled_of(64, 256, 128)
    product(layer_of(tiled), torch.ones(1, 256), 64)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=in_worker, args=(queue,))
    worker.start()
    assert queue.get(timeout=60) < 1e-3
    worker.join()
