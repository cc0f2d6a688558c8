"""Magnitude against a float64 loop."""

import numpy as np
import pytest
import torch

from niwaki.config.targets import NM, Sparsity
from niwaki.methods import magnitude
from support.models import run_method

NO_DATA = torch.empty(0, 12)


def reference(weight: np.ndarray, zeros: int) -> np.ndarray:
    """Set the `zeros` smallest of all entries to zero."""
    result = weight.astype(np.float64).copy()
    for place in sorted(np.ndindex(*weight.shape), key=lambda at: abs(result[at]))[:zeros]:
        result[place] = 0
    return result


def test_per_matrix_equals_reference() -> None:
    weight = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    found = run_method(magnitude, weight, NO_DATA, Sparsity(0.4))
    np.testing.assert_array_equal(found.numpy(), reference(weight.numpy(), round(0.4 * 108)))


def test_per_row_equals_reference_on_each_row() -> None:
    weight = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    found = run_method(magnitude, weight, NO_DATA, Sparsity(0.5), scope="row")
    for row in range(9):
        np.testing.assert_array_equal(found[row : row + 1].numpy(), reference(weight[row : row + 1].numpy(), 6))


def test_groups() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1, 0.2, -0.3, 0.4]])
    found = run_method(magnitude, weight, NO_DATA, NM(2, 4))
    expected = torch.tensor([[0, -4.0, 3.0, 0, 0, 0, -0.3, 0.4]])
    assert torch.equal(found, expected)


def test_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="matrix or row"):
        magnitude.Config(scope="column")
