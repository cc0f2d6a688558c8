"""Selection of the lowest scores: the torch reference against sorting, the Triton kernel against the reference."""

import pytest
import torch
from torch import Tensor

from niwaki.kernels.select import keep_in_panel
from niwaki.kernels.types import PanelParts
from support.triton_interpreter import interpreted


def wanted(scores: Tensor, rows: list[int], zeros: list[int]) -> tuple[Tensor, list[float]]:
    """By a stable sort of every part."""
    keep, bounds = torch.ones_like(scores, dtype=torch.bool), []
    for part, kept, count in zip(scores.split(rows), keep.split(rows), zeros, strict=True):
        order = part.flatten().argsort(stable=True)[:count]
        kept.view(-1)[order] = False
        bounds.append(float(part.flatten()[order].max()) if count else -torch.inf)
    return keep, bounds


def cases() -> list[tuple[Tensor, list[int], list[int]]]:
    """Odd shapes, parts of several sizes, ties of every kind, all and nothing, tiny and infinite scores, signs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    few = torch.randint(0, 3, (40, 33), generator=generator).float()
    extreme = normal(8, 16).square()
    extreme[0] = 0.0
    extreme[1] = torch.inf
    extreme[2] *= 1e-40  # below the smallest normal number
    signed = normal(11, 5)
    signed[::2, 0], signed[1::2, 0] = 0.0, -0.0
    return [
        (normal(7, 13).square(), [7], [45]),
        (normal(9, 8).square(), [4, 2, 3], [0, 16, 11]),
        (few, [30, 10], [500, 200]),
        (torch.ones(5, 7), [5], [17]),
        (extreme, [8], [50]),
        (extreme, [4, 4], [64, 31]),
        (signed, [11], [26]),
        (signed, [5, 6], [12, 20]),
        (normal(1, 1), [1], [1]),
    ]


@pytest.mark.parametrize("case", range(9))
def test_every_part_loses_its_lowest_and_ties_by_index(case: int) -> None:
    scores, rows, zeros = cases()[case]
    keep, bounds = keep_in_panel(scores, PanelParts.of(rows, zeros, scores.device), scores.shape[1], 0)
    expected, expected_bounds = wanted(scores, rows, zeros)
    assert torch.equal(keep, expected) and bounds.tolist() == expected_bounds


def test_triton_kernel_equals_sorting() -> None:
    interpreted("parity", __name__)


def parity() -> None:
    """Also over several blocks, where ties that go lie in one block, and at its edges; outputs begin poisoned."""
    from niwaki.kernels.triton import select as triton_select

    real = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        found = real(*shape, **options)  # type: ignore[call-overload]
        return found.fill_(True if found.dtype == torch.bool else 77)

    torch.empty = poisoned  # type: ignore[assignment]
    tied = torch.ones(10, 20)
    tied[3:5] = 0.5
    wide = [(tied, [10], [150]), (tied, [10], [199]), (tied, [6, 4], [70, 1])]
    for block in (triton_select.BLOCK, 64):
        triton_select.BLOCK = block
        for scores, rows, zeros in [*cases(), *wide]:
            parts = PanelParts.of(rows, zeros, scores.device)
            keep, bounds = triton_select.keep_in_panel_triton(scores, parts, scores.shape[1], 0)
            expected, expected_bounds = wanted(scores, rows, zeros)
            assert torch.equal(keep, expected), (block, tuple(scores.shape), rows, zeros)
            assert bounds.tolist() == expected_bounds, (block, bounds, expected_bounds)
    parts = PanelParts.of([6, 4], [123, 77], torch.device("cpu"))
    scores = torch.rand(10, 30, generator=torch.Generator().manual_seed(3))
    for start in (0, 7, 14, 21, 28):  # panels of a wider matrix: zeros spread over its columns
        panel = scores[:, start : start + 7]
        zeros = parts.zeros_within(start, start + panel.shape[1], 30)
        keep, _ = triton_select.keep_in_panel_triton(panel, parts, 30, start)
        assert torch.equal(keep, wanted(panel, [6, 4], zeros)[0])
        assert torch.equal(keep, keep_in_panel(panel, parts, 30, start)[0])
