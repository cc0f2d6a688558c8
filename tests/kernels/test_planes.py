"""Products with bit planes against the decoded matrix: paths, odd shapes, given outputs, threads, a forked worker."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.formats.quantized import QuantizedColumns, centre
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.planes import plane_product
from niwaki.kernels.types import PlanePart


def part(rows: int, columns: int, bits: int, grid: str, group: int) -> QuantizedColumns:
    generator = torch.Generator().manual_seed(rows + columns)
    groups = -(-columns // group)
    code = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    offset = torch.randn(rows, groups, generator=generator).half() if grid == "free" else None
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedColumns(
        torch.arange(columns), bits, grid, group, code, scale, offset, zero if grid == "affine" else None
    )


def arguments(found: QuantizedColumns) -> PlanePart:
    tensors = found.tensors()
    return PlanePart(
        tensors["planes"],
        tensors["scale"],
        tensors.get("offset"),
        None if found.zero_OG is None else found.zero_OG.T.contiguous(),
        None,
        0.0 if found.grid in ("free", "affine") else centre(found.bits, found.grid),
        len(found.columns_C),
        found.group,
    )


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("bits", "grid"), [(1, "free"), (1, "midrise"), (2, "affine"), (3, "symmetric"),
                                            (4, "midrise"), (4, "affine"), (8, "affine")])  # fmt: skip
@pytest.mark.parametrize(("rows", "columns", "group"), [
    (1, 1, 1), (5, 7, 7), (32, 32, 32), (33, 40, 40), (96, 256, 64), (70, 200, 32), (64, 1000, 1000),
])  # fmt: skip
def test_product_equals_the_decoded_matrix(
    rows: int, columns: int, group: int, bits: int, grid: str, tokens: int
) -> None:
    found = part(rows, columns, bits, grid, group)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    start = torch.randn(tokens, rows, generator=torch.Generator().manual_seed(2))
    out = start.clone()
    plane_product(x, *arguments(found), out)
    expected = x @ found.decode().T
    # Against the sizes that were summed: a result may cancel to nearly nothing.
    scale = float((x.abs() @ found.decode().abs().T).norm()) + 1e-9
    assert float((out - start - expected).norm()) < 1e-3 * scale
    if columns >= 200:
        assert error(out - start, expected) < 1e-3


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("columns", [328, 64, 5])
def test_paths_and_threads_agree(bits: int, columns: int) -> None:
    """AVX-512 only where the processor has it."""
    compiled = cpu_module()
    assert compiled is not None
    found = part(70, columns, bits, "midrise", columns)
    given = arguments(found)
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(3))
    outs = []
    vector = [(1, path) for path in (2, 3) if compiled.supported(path)]
    for threads, path in [(1, 1), (1, 0), (2, 0), (3, 0), *vector]:
        out = torch.zeros(2, 70)
        compiled.plane_product(
            given.planes_TKBR, given.scale_GO, None, None, given.centre, -(-columns // 8), None, columns, x, out,
            threads, path,
        )  # fmt: skip
        outs.append(out)
    assert torch.equal(outs[1], outs[2]) and torch.equal(outs[1], outs[3])
    assert all(error(out, outs[0]) < 1e-5 for out in outs[1:])
    assert compiled.supported(1) and (compiled.supported(2) or not vector)


def test_large_and_zero_inputs() -> None:
    found = part(64, 256, 1, "free", 256)
    given = arguments(found)
    for x in (torch.zeros(1, 256), torch.full((1, 256), 1e30), torch.full((1, 256), -1e-30)):
        out = torch.zeros(1, 64)
        plane_product(x, *given, out)
        assert out.isfinite().all() and torch.allclose(out, x @ found.decode().T, rtol=1e-2, atol=1e-36)
    outlier = torch.randn(1, 256, generator=torch.Generator().manual_seed(5))
    outlier[0, 7] = 100.0
    out = torch.zeros(1, 64)
    plane_product(outlier, *given, out)
    assert error(out, outlier @ found.decode().T) < 1e-3


def in_worker(queue: Any) -> None:
    torch.set_num_threads(1)  # loops of torch would wait for threads that did not survive the fork
    found = part(64, 256, 4, "midrise", 256)
    x, out = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 64)
    plane_product(x, *arguments(found), out)
    queue.put(error(out, x @ found.decode().T))


def test_in_a_forked_worker() -> None:
    found = part(64, 256, 4, "midrise", 256)
    plane_product(torch.ones(1, 256), *arguments(found), torch.zeros(1, 64))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=in_worker, args=(queue,))
    worker.start()
    assert queue.get(timeout=60) < 1e-3
    worker.join()


def test_columns_are_picked_from_the_input() -> None:
    found = part(40, 64, 2, "affine", 32)
    places = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:64]
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(1))
    given = arguments(found)._replace(columns_C=places.int())
    direct = torch.zeros(2, 40)
    plane_product(x, *given, direct)
    assert error(direct, x[:, places] @ found.decode().T) < 2e-3
