"""OWL against its formulas in float64, and the exact overall budget."""

import numpy as np
import pytest
import torch

from niwaki.compression.allocation import OWL_NEEDS, OwlConfig, outlier_share, owl, uniform
from niwaki.config.targets import NM, Sparsity
from niwaki.errors import TargetError
from niwaki.model.anatomy import Anatomy, BlockAnatomy, Linear
from support.models import correlated_inputs, make_block, statistics_of


def anatomy_of(*sizes: tuple[int, int]) -> Anatomy:
    blocks = tuple(
        BlockAnatomy({"m": Linear("m", "m.weight", None, False, rows, columns, "m")}, {}, None)
        for rows, columns in sizes
    )
    return Anatomy("layers", blocks)


def test_uniform_refuses_and_names_the_matrix() -> None:
    with pytest.raises(TargetError, match=r"layers\.1\.m: target 2:4 needs a multiple of 4 inputs, got .* with 6"):
        uniform(anatomy_of((4, 8), (4, 6)), NM(2, 4))


def test_owl_follows_the_formula_for_equal_blocks() -> None:
    shares = [0.01, 0.04, 0.02]
    targets = owl(anatomy_of((4, 8), (4, 8), (4, 8)), Sparsity(0.7), shares, OwlConfig(spread_frac=0.1))
    raised = (np.array(shares) - 0.01) / 0.03 * 0.2
    density = raised - raised.mean() + 0.3
    found = [block["m"].zeros_frac for block in targets]  # type: ignore[union-attr]
    np.testing.assert_allclose(found, 1 - density, atol=1e-12)


def test_owl_meets_the_budget_for_unequal_blocks() -> None:
    anatomy = anatomy_of((64, 64), (16, 64), (128, 64))
    targets = owl(anatomy, Sparsity(0.6), [0.0, 0.5, 0.1], OwlConfig())
    zeros = sum(t["m"].zeros_in(b.linears["m"].rows, 64) for t, b in zip(targets, anatomy.blocks, strict=True))
    assert abs(zeros / anatomy.weights - 0.6) < 1e-4


def test_owl_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TargetError, match="owl moves unstructured sparsity"):
        owl(anatomy_of((4, 8)), NM(2, 4), [0.1], OwlConfig())
    with pytest.raises(TargetError, match="lower spread_frac"):
        owl(anatomy_of((4, 8), (4, 8)), Sparsity(0.95), [0.0, 0.1], OwlConfig())


def test_outlier_share_counts_scores_above_m_times_their_mean() -> None:
    weights = {"a": torch.randn(8, 16), "b": torch.randn(4, 16)}
    x = correlated_inputs(50, 16)
    block = make_block(weights)
    statistics = {name: statistics_of(x, OWL_NEEDS) for name in weights}
    norms = np.sqrt((x.double().numpy() ** 2).sum(0))
    scores = np.concatenate([(np.abs(w.double().numpy()) * norms).ravel() for w in weights.values()])
    wanted = (scores > 2 * scores.mean()).mean()
    assert outlier_share(block, statistics, OwlConfig(outlier_multiple=2)) == pytest.approx(wanted)
