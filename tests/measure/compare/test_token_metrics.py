"""Tokens of two models by document: what counts as a unit, and how often equal models look different."""

import math

import numpy as np
import pytest
import torch

from niwaki.errors import NumericalError
from niwaki.measure.compare.token_metrics import Text, TokenScores, data_quality, score_text, worst_examples

SIMULATIONS = 400
PLAUSIBLE = range(9, 35)  # of 400 at 5 %: P(outside) = 0.3 % for a binomial


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + number % 26) for number in ids)


def text_of(windows: int, tokens: int, documents: int) -> Text:
    """Random tokens, cut into documents of equal length."""
    ids_ST = torch.randint(0, 26, (windows, tokens), generator=torch.Generator().manual_seed(0))
    owners_ST = (torch.arange(windows * tokens) * documents // (windows * tokens)).view(windows, tokens)
    return Text("t", ids_ST, owners_ST, [None] * documents)


def equal_models(text: Text, rng: np.random.Generator) -> TokenScores:
    """Two models that are equally good on average, each with its own luck with every document and every token."""
    shape = (len(text.ids_ST), text.ids_ST.shape[1] - 1)
    owners_SP = text.owners_ST[:, 1:].numpy()
    nlls = [
        3 + rng.normal(0, 0.3, len(text.domains))[owners_SP] + rng.exponential(1.0, shape) for _ in ("dense", "other")
    ]
    tops = [rng.integers(0, 26, shape) for _ in nlls]
    return TokenScores(text, 0, *nlls, rng.exponential(0.1, shape), *tops)


def test_equal_models_raise_5_percent_false_alarms_at_95() -> None:
    rng, text, alarms = np.random.default_rng(7), text_of(24, 40, 30), 0
    for _ in range(SIMULATIONS):
        whole = data_quality(equal_models(text, rng), 0.95, rng).whole
        ratio = whole.perplexity_ratio
        assert ratio.low is not None and ratio.high is not None and whole.units == 30
        alarms += not ratio.low <= 1 <= ratio.high
    assert alarms in PLAUSIBLE


@pytest.mark.parametrize(("documents", "unit", "units"), [(20, "document", 20), (19, "window", 24), (1, "window", 24)])
def test_few_documents_count_in_windows(documents: int, unit: str, units: int) -> None:
    rng = np.random.default_rng(0)
    whole = data_quality(equal_models(text_of(24, 40, documents), rng), 0.95, rng).whole
    assert (whole.unit, whole.units, whole.tokens) == (unit, units, 24 * 39)


def test_one_unit_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    ratio = data_quality(equal_models(text_of(1, 40, 1), rng), 0.95, rng).whole.perplexity_ratio
    assert (ratio.low, ratio.high, ratio.units) == (None, None, 1)


def test_scores_are_those_of_the_definitions() -> None:
    text = text_of(3, 6, 2)
    generator = torch.Generator().manual_seed(1)
    dense_STV, model_STV = (torch.randn(3, 6, 26, generator=generator) for _ in range(2))
    found = score_text(text, lambda row, part: dense_STV[row, part], lambda row, part: model_STV[row, part], first=2)
    assert found.nll_SP.shape == (3, 3), "behind the first two tokens, the last predicts nothing"
    for row in range(3):
        for place in range(2, 5):
            p, q = (logits[row, place].double().softmax(-1) for logits in (dense_STV, model_STV))
            wanted = int(text.ids_ST[row, place + 1])
            assert found.nll_SP[row, place - 2] == pytest.approx(-math.log(q[wanted]), rel=1e-5)
            assert found.dense_nll_SP[row, place - 2] == pytest.approx(-math.log(p[wanted]), rel=1e-5)
            assert found.kl_SP[row, place - 2] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
            tops = (found.dense_top1_SP[row, place - 2], found.top1_SP[row, place - 2])
            assert tops == (int(p.argmax()), int(q.argmax()))


def test_logits_that_are_no_numbers_are_an_error() -> None:
    text, nothing = text_of(1, 4, 1), torch.full((4, 26), math.nan)
    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        score_text(text, lambda row, part: torch.zeros(4, 26), lambda row, part: nothing)


def test_the_worst_passage_is_found_and_shown() -> None:
    rng = np.random.default_rng(0)
    text = text_of(3, 97, 3)
    scored = equal_models(text, rng)
    scored.kl_SP[1, 32:64] = 5.0
    worst = worst_examples([scored], Letters())
    assert len(worst) == 9 and worst[0].kl == pytest.approx(5.0) and worst[1].kl < 1
    ids = text.ids_ST[1].tolist()
    assert "".join(token.token for token in worst[0].tokens) == Letters().decode(ids[33:65])
    assert worst[0].before == Letters().decode(ids[1:33])
    assert worst[0].tokens[3].candidate_nll == scored.nll_SP[1, 35]
    assert worst[0].tokens[3].dense_top1 == Letters().decode([int(scored.dense_top1_SP[1, 35])])
