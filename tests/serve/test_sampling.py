"""Tokens come as often as they should, from the nucleus only, and the same for the same seed."""

import math

import pytest
import torch

from niwaki.serve.sampling import Sampling, sample, score, score_all

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, float("-inf")])


def drawn(count: int, logits: torch.Tensor = LOGITS, **settings: float) -> list[int]:
    sampling = Sampling(seed=0, **settings)  # type: ignore[arg-type]
    return [sample(logits, sampling) for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    found = torch.tensor(drawn(1500, temperature=temperature)).bincount(minlength=5) / 1500
    wanted = (LOGITS / temperature).softmax(-1)
    assert torch.allclose(found.double(), wanted.double(), atol=0.04)
    assert found[4] == 0


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probability = LOGITS.softmax(-1)
    assert float(probability[0]) < 0.7 < float(probability[:2].sum())
    found = torch.tensor(drawn(1000, top_p=0.7)).bincount(minlength=5) / 1000
    assert found[2:].sum() == 0
    assert float(found[0]) == pytest.approx(float(probability[0] / probability[:2].sum()), abs=0.05)
    assert set(drawn(50, top_p=1e-9)) == {0}


def test_temperature_zero_is_greedy_and_seeds_repeat() -> None:
    assert set(drawn(5, temperature=0.0)) == {0}
    assert drawn(50) == drawn(50)
    unseeded = [[sample(LOGITS, sampling) for _ in range(50)] for sampling in (Sampling(), Sampling())]
    assert unseeded[0] != unseeded[1]


def test_negative_seeds_are_seeds() -> None:
    first, second = (Sampling(seed=-5) for _ in range(2))
    assert [sample(LOGITS, first) for _ in range(20)] == [sample(LOGITS, second) for _ in range(20)]


def test_scores_are_log_probabilities_of_the_model() -> None:
    wanted = LOGITS.log_softmax(-1)
    found = score(LOGITS, 1, 2)
    assert found.token == 1 and found.logprob == pytest.approx(float(wanted[1]))
    assert found.top == ((0, pytest.approx(float(wanted[0]))), (1, pytest.approx(float(wanted[1]))))
    assert score(LOGITS, 0, 0).top == ()
    assert score(LOGITS, 4, 0).logprob == -math.inf
    both = score_all(torch.stack([LOGITS, LOGITS.flip(0)]), [0, 0], 9)
    assert [one.logprob for one in both] == [pytest.approx(float(wanted[0])), -math.inf]
    assert len(both[0].top) == 5
