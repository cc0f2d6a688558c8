"""Masks: exact counts, the lowest scores, ties by index."""

import itertools
from typing import Any

import pytest
import torch

from niwaki.config.targets import NM, Bits, PrunedBits, Sparsity
from niwaki.errors import TargetError
from niwaki.methods.shared.masks import choose_by_panel, keep_by_group, keep_by_matrix, keep_by_row


@pytest.mark.parametrize("zeros_frac", [0.05, 0.333, 0.5, 0.95])
@pytest.mark.parametrize("shape", [(7, 13), (16, 16), (1, 5)])
def test_row_counts_are_exact_and_even(zeros_frac: float, shape: tuple[int, int]) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    target = Sparsity(zeros_frac)
    keep = keep_by_row(scores, target)
    zeros_by_row = (~keep).sum(1)
    assert int(zeros_by_row.sum()) == round(zeros_frac * scores.numel())
    assert int(zeros_by_row.max() - zeros_by_row.min()) <= 1
    for row in range(shape[0]):
        if 0 < zeros_by_row[row] < shape[1]:
            assert scores[row][~keep[row]].max() <= scores[row][keep[row]].min()


def test_matrix_threshold_takes_the_lowest_of_all() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0], [0.0, 2.0, 3.0]])
    assert keep_by_matrix(scores, Sparsity(0.5)).tolist() == [[True, False, True], [False, False, True]]


def test_ties_fall_to_the_lower_index() -> None:
    same = torch.ones(1, 4)
    assert keep_by_row(same, Sparsity(0.5)).tolist() == [[False, False, True, True]]
    assert keep_by_group(same, NM(2, 4)).tolist() == [[False, False, True, True]]
    assert keep_by_matrix(same, Sparsity(0.25)).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("target", [NM(2, 4), NM(4, 8), NM(1, 3), NM(3, 4)])
def test_groups_keep_their_highest(target: NM) -> None:
    scores = torch.rand(6, 24, generator=torch.Generator().manual_seed(1))
    keep = keep_by_group(scores, target)
    for row in range(6):
        for start in range(0, 24, target.group):
            group = scores[row, start : start + target.group]
            wanted = set(group.topk(target.keep).indices.tolist())
            assert set(keep[row, start : start + target.group].nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("target", [NM(2, 4, 0.375), NM(1, 4, 0.5), NM(4, 8, 1 / 3), NM(2, 4, 0.001)])
def test_groups_that_would_lose_most_stay_dense(target: NM) -> None:
    """Compare with the least sum over all choices of groups, each summed one by one."""
    scores = torch.rand(6, 24, generator=torch.Generator().manual_seed(1))
    keep = keep_by_group(scores, target)
    starts = range(0, 24, target.group)
    lost = {
        start: sum(
            sum(sorted(row[start : start + target.group])[: target.group - target.keep]) for row in scores.tolist()
        )
        for start in starts
    }
    count = round(target.zeros_frac * 24 / (target.group - target.keep))
    wanted = min(itertools.combinations(starts, count), key=lambda chosen: sum(lost[start] for start in chosen))
    whole = keep_by_group(scores, target.whole)
    for start in starts:
        part = slice(start, start + target.group)
        assert torch.equal(keep[:, part], whole[:, part]) if start in wanted else keep[:, part].all()
    assert int((~keep).sum()) == target.zeros_in(6, 24)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TargetError, match="multiple of 4 inputs, got a matrix with 10"):
        keep_by_group(torch.rand(2, 10), NM(2, 4))


def test_zeros_spread_over_columns_end_exactly() -> None:
    target = Sparsity(0.37)
    scores = torch.rand(7, 100, generator=torch.Generator().manual_seed(0))
    keep = choose_by_panel([target], [7], 100, torch.device("cpu"))
    panels = [keep(scores[:, start : start + 32], start) for start in range(0, 100, 32)]
    zeros = [int((~panel).sum()) for panel in panels]
    assert sum(zeros) == target.zeros_in(7, 100) and max(zeros[:3]) - min(zeros[:3]) <= 1


def test_matrices_one_below_the_other_lose_their_own_lowest() -> None:
    """Give the second matrix scores a thousand times as high: it still loses what its own target says."""
    scores = torch.rand(9, 16, generator=torch.Generator().manual_seed(2))
    scores[4:] *= 1000
    keep = choose_by_panel([Sparsity(0.5), Sparsity(0.25)], [4, 5], 16, torch.device("cpu"))(scores, 0)
    for own, kept, zeros in ((scores[:4], keep[:4], 32), (scores[4:], keep[4:], 20)):
        assert torch.equal(kept, own > own.flatten().sort().values[zeros - 1])


@pytest.mark.parametrize("seed", range(20))
def test_rows_equal_a_stable_sort_even_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        int(torch.randint(1, 9, (1,), generator=generator)),
        int(torch.randint(2, 20, (1,), generator=generator)),
    )
    scores = torch.randint(0, 4, (rows, columns), generator=generator).float()
    target = Sparsity(float(torch.rand(1, generator=generator)) * 0.98 + 0.01)
    zeros = target.zeros_in(rows, columns)
    wanted = torch.ones(rows, columns, dtype=torch.bool)
    for row in range(rows):
        count = (row + 1) * zeros // rows - row * zeros // rows
        wanted[row, scores[row].argsort(stable=True)[:count]] = False
    assert torch.equal(keep_by_row(scores, target), wanted)


@pytest.mark.parametrize("choose", [keep_by_row, keep_by_matrix])
@pytest.mark.parametrize("target", [Bits(4), PrunedBits(NM(2, 4), Bits(4))], ids=str)
def test_a_kind_of_target_without_a_mask_is_refused(choose: Any, target: Any) -> None:
    with pytest.raises(TargetError, match=r"expected a share of zeros or N:M"):
        choose(torch.ones(4, 8), target)
