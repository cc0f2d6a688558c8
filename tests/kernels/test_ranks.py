"""Pruning by rank and sums below cuts: plain loops in float64, and the Triton kernels against them."""

import pytest
import torch
from torch import Tensor

from niwaki.kernels.select import drop_lowest, sums_below
from support.kernel_cases import cuts_of, rank_case
from support.triton_interpreter import interpreted

SHAPES = [(1, 1), (4, 17), (3, 64), (5, 130)]


def expected_sums(gradient: Tensor, values: Tensor, order: Tensor, cuts: Tensor) -> Tensor:
    product = gradient.double() * values.double()
    return torch.tensor(
        [[float(row[o[: int(cut)]].sum()) for cut in cuts] for row, o in zip(product, order, strict=True)]
    )


def expected_pruned(values: Tensor, order: Tensor, zeros: Tensor) -> Tensor:
    found = values.clone()
    for row, count in enumerate(zeros.tolist()):
        found[row, order[row, :count]] = 0
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_references_equal_loops(shape: tuple[int, int]) -> None:
    gradient, values, order, rank, zeros = rank_case(*shape)
    cuts = cuts_of(shape[1])
    found = sums_below(gradient, values, order, cuts)
    torch.testing.assert_close(
        found, expected_sums(gradient, values, order, cuts), rtol=1e-5, atol=1e-5, check_dtype=False
    )
    assert torch.equal(drop_lowest(values, rank.to(torch.int16), zeros.float()), expected_pruned(values, order, zeros))


def test_triton_kernels_equal_loops() -> None:
    interpreted("parity", __name__)


def parity() -> None:
    """In float32 and bfloat16, ranks of 16 and 32 bits, more columns than a block prunes; outputs begin poisoned."""
    from niwaki.kernels.triton import ranks as triton_ranks

    real, real_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **k: real(*a, **k).fill_(77)  # type: ignore[assignment]
    torch.empty_like = lambda *a, **k: real_like(*a, **k).fill_(77)  # type: ignore[assignment]
    triton_ranks.BLOCK = 64
    for shape in SHAPES:
        gradient, values, order, rank, zeros = rank_case(*shape)
        cuts = cuts_of(shape[1])
        for dtype, places in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
            g, v = gradient.to(dtype), values.to(dtype)
            found = triton_ranks.sums_below_triton(g, v, order.to(places), cuts)
            expected = expected_sums(g, v, order, cuts)
            torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)
            pruned = triton_ranks.drop_lowest_triton(v, rank.to(places), zeros.float())
            assert torch.equal(pruned, expected_pruned(v, order, zeros))
