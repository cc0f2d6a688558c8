"""Streaming sums against float64 sums over everything at once."""

import pytest
import torch

from niwaki.data.statistics import SAMPLE_TOKENS, Needs, Statistics
from support.models import correlated_inputs


def test_sums_over_batches_equal_one_sum() -> None:
    x = correlated_inputs(300, 12)
    statistics = Statistics(Needs(gram=True))
    for part in x.view(3, 10, 10, 12):
        statistics.add(part)
    wanted = x.double().T @ x.double()
    torch.testing.assert_close(statistics.gram_II.double(), wanted, rtol=1e-5, atol=1e-3)
    assert statistics.tokens == 300
    assert statistics.sample_NI is not None
    assert torch.equal(statistics.sample_NI, x[:SAMPLE_TOKENS])


@pytest.mark.parametrize("strip", [1, 5, 12, 100])
def test_a_gram_matrix_is_summed_in_strips_and_may_be_read_meanwhile(
    strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("niwaki.data.statistics.STRIP_COLUMNS", strip)
    x = correlated_inputs(60, 12)
    statistics = Statistics(Needs(gram=True))
    for end in (20, 60):
        statistics.add(x[0 if end == 20 else 20 : end])
        wanted = x[:end].double().T @ x[:end].double()
        torch.testing.assert_close(statistics.gram_II.double(), wanted, rtol=1e-5, atol=1e-3)


def test_squared_norms_are_the_grams_diagonal() -> None:
    x = correlated_inputs(50, 6)
    norms, gram = Statistics(Needs(sqnorm=True)), Statistics(Needs(sqnorm=True, gram=True))
    norms.add(x)
    gram.add(x)
    torch.testing.assert_close(norms.sqnorm_I, gram.sqnorm_I)
    torch.testing.assert_close(norms.sqnorm_I.double(), x.double().square().sum(0), rtol=1e-5, atol=1e-4)


def test_bf16_inputs_lose_nothing_in_the_sum() -> None:
    x = correlated_inputs(64, 8).bfloat16()
    statistics = Statistics(Needs(gram=True))
    statistics.add(x)
    assert statistics.gram_II.dtype == torch.float32
    torch.testing.assert_close(statistics.gram_II.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_inputs_of_the_dense_model_are_paired_with_their_own() -> None:
    x, full = correlated_inputs(60, 6), correlated_inputs(60, 6, 1)
    statistics = Statistics(Needs(gram=True, full=True))
    for rows in (slice(0, 40), slice(40, 60)):
        statistics.add(x[rows], full[rows])
    own, cross = statistics.full_II
    torch.testing.assert_close(own.double(), full.double().T @ full.double(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(cross.double(), full.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    with pytest.raises(KeyError, match="no inputs of the dense model"):
        _ = Statistics(Needs(full=True)).full_II


def test_what_was_not_collected_is_an_error() -> None:
    with pytest.raises(KeyError, match="no Gram matrix"):
        _ = Statistics(Needs(gram=True)).gram_II
    with pytest.raises(KeyError, match="squared norms"):
        _ = Statistics(Needs()).sqnorm_I
