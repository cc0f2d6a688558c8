"""The panel sweep: the Triton kernel (interpreted on the CPU) against the torch reference."""

import pytest
import torch

from niwaki.config.targets import NM
from niwaki.kernels.sweep import sweep_panel, sweep_panel_reference
from support.triton_interpreter import interpreted


def test_triton_kernel_equals_reference() -> None:
    interpreted("parity", __name__)


def parity() -> None:
    from niwaki.kernels.triton.sweep import sweep_panel_triton

    for seed, (rows, columns, target) in enumerate(
        [(5, 16, None), (33, 24, None), (17, 16, NM(2, 4)), (20, 24, NM(4, 8)), (3, 9, NM(1, 3))]
    ):
        torch.manual_seed(seed)
        panel = torch.randn(rows, columns)
        upper = (torch.randn(columns, columns) * 0.2).triu() + torch.eye(columns)
        keep = None if target else torch.rand(rows, columns) > 0.5
        a, b = panel.clone(), panel.clone()
        error_a, keep_a = sweep_panel_reference(a, upper, keep, target)
        error_b, keep_b = sweep_panel_triton(b, upper, keep, target)
        assert torch.equal(keep_a, keep_b), (rows, columns, target)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(error_a, error_b, rtol=1e-5, atol=1e-6)


def test_given_mask_is_kept_and_errors_reach_later_columns() -> None:
    panel = torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    upper = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    keep = torch.tensor([[False, True], [True, True]])
    errors, _ = sweep_panel_reference(panel, upper, keep, None)
    # Row 0 loses w=2: e = 2/2, so the next column becomes 3 − 1·1. Row 1 loses nothing.
    assert panel.tolist() == [[0.0, 2.0], [4.0, 5.0]]
    assert errors.tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("target", [NM(2, 4), NM(1, 4), NM(4, 8)])
def test_groups_keep_exactly_n(target: NM) -> None:
    torch.manual_seed(0)
    panel = torch.randn(7, 16)
    _, keep = sweep_panel_reference(panel, torch.eye(16), None, target)
    assert (keep.view(7, -1, target.group).sum(-1) == target.keep).all()


def test_triton_kernel_prunes_a_panel_where_it_lies() -> None:
    interpreted("in_place", __name__)


def in_place() -> None:
    """A panel of a wider matrix, its part of a wider U; what lies beside stays, outputs begin poisoned."""
    from niwaki.kernels.triton.sweep import sweep_panel_triton

    real = torch.empty
    torch.empty = lambda *a, **k: real(*a, **k).fill_(1)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(3)
    for target in (None, NM(2, 4)):
        whole = torch.randn(19, 30, generator=generator)
        upper = (torch.randn(30, 30, generator=generator) * 0.2).triu() + torch.eye(30)
        keep = None if target else torch.rand(19, 30, generator=generator) > 0.5
        inside, given = slice(8, 20), None if keep is None else keep[:, 8:20]
        expected = whole.clone()
        panel = expected[:, inside].clone()
        errors, chosen = sweep_panel_reference(panel, upper[inside, inside], given, target)
        expected[:, inside] = panel
        found_errors, found = sweep_panel_triton(whole[:, inside], upper[inside, inside], given, target)
        assert torch.equal(found, chosen)
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found_errors, errors, rtol=1e-5, atol=1e-6)


def test_a_panel_of_a_wider_matrix_is_pruned_in_place() -> None:
    whole = torch.arange(12.0).view(3, 4) + 1
    keep = torch.tensor([[False, True]] * 3)
    errors, found = sweep_panel(whole[:, 1:3], torch.eye(4)[1:3, 1:3], keep, None)
    assert whole.tolist() == [[1, 0, 3, 4], [5, 0, 7, 8], [9, 0, 11, 12]]
    assert errors.tolist() == [[2, 0], [6, 0], [10, 0]] and torch.equal(found, keep)
