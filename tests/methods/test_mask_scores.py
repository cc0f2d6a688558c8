"""Scores in blocks.jsonl: they are those that the masks were chosen by."""

from typing import Any

import pytest
import torch

from niwaki.config.targets import Target, parse_target
from niwaki.methods.mask_scores import (
    BINS,
    MaskChoice,
    MaskChoices,
    last_agreeing_choice,
    record_choice,
    record_mask_choices,
    summarize_scores,
)
from niwaki.methods.registry import get_method
from niwaki.methods.shared.masks import keep_by_row
from support.models import calibration_of, correlated_inputs, make_block


def summary(choices: list[MaskChoice], stored_OI: torch.Tensor) -> dict[str, Any]:
    return summarize_scores(last_agreeing_choice(choices, stored_OI))


def chosen(
    method: str, target: str, shape: tuple[int, int] = (96, 64), **options: object
) -> tuple[MaskChoices, torch.Tensor]:
    """Return the recorded choices of one matrix, and the matrix that the method makes."""
    module = get_method(method)
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    block, config = make_block({"m": weight_OI, "n": weight_OI.flip(0)}), module.config(**options)
    seen = calibration_of(block, correlated_inputs(64, shape[1]), module.needs(config))
    targets: dict[str, Target] = dict.fromkeys(("m", "n"), parse_target(target))
    with record_mask_choices(targets) as (own, found):
        packed = module.compress(block, seen, own, config, torch.Generator().manual_seed(0))
    return found, packed["m"].decode(torch.float32)


def test_magnitude_s_scores_are_the_weights_and_its_threshold_separates_them() -> None:
    found, kept_OI = chosen("magnitude", "0.5")
    scores = summary(found["m"], kept_OI)["scores"]
    size_OI = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).abs()
    assert scores["quantiles"][0] == pytest.approx(float(size_OI.min()), rel=1e-5)
    assert scores["quantiles"][-1] == pytest.approx(float(size_OI.max()), rel=1e-5)
    assert scores["quantiles"][4] == pytest.approx(float(size_OI.median()), rel=1e-2)
    (lost,) = {*scores["lost"]}
    assert lost == pytest.approx(float(size_OI[kept_OI == 0].max()), rel=1e-5)
    assert lost < float(size_OI[kept_OI != 0].min())
    assert scores["sampled"] == 96 * 64 == sum(scores["kept"]) + sum(scores["cut"])
    assert sum(scores["cut"]) == 96 * 32 and len(scores["cut"]) == BINS


@pytest.mark.parametrize(
    ("method", "target", "options"),
    [
        ("wanda", "0.3", {}),
        ("wanda", "2:4", {}),
        ("gblm", "0.5", {}),
        ("besa", "0.5", {"steps": 2}),
        ("wandapp", "0.5", {"rounds": 1, "samples": 2}),
        ("sparsegpt", "0.5", {"panel_columns": 16}),
        ("sparsegpt", "0.5", {"exchanges": 2}),
    ],
)
def test_every_method_with_masks_is_seen(method: str, target: str, options: dict[str, object]) -> None:
    found, kept_OI = chosen(method, target, **options)
    scores = summary(found["m"], kept_OI)["scores"]
    assert sum(scores["cut"]) == int((kept_OI == 0).sum())
    assert scores["quantiles"] == sorted(scores["quantiles"]) and scores["quantiles"][-1] > 0
    assert ("lost" in scores) == (":" not in target)


def test_scores_of_another_mask_are_not_told() -> None:
    found, kept_OI = chosen("wanda", "0.5")
    assert summary(found["m"], kept_OI.flip(1)) == {}
    assert summary([], kept_OI) == {}


def test_nothing_is_seen_where_nobody_watches_or_the_target_is_another_s() -> None:
    target = parse_target("0.5")
    scores_OI = torch.rand(8, 8)
    with record_mask_choices({"m": target}) as (own, found):
        keep_by_row(scores_OI, target)
        assert found == {}
        keep_by_row(scores_OI, own["m"])
    assert list(found) == ["m"]
    record_choice(own["m"], scores_OI, scores_OI > 0, None)
    assert len(found["m"]) == 1


def test_the_sample_is_bounded_and_silent_features_are_counted() -> None:
    target = parse_target("0.5")
    scores_OI = torch.rand(700, 900)
    scores_OI[:, :450] = 0
    with record_mask_choices({"m": target}) as (own, found):
        keep_OI = keep_by_row(scores_OI, own["m"])
    scores = summary(found["m"], keep_OI.float())["scores"]
    assert 9_000 < scores["sampled"] < 30_000
    assert scores["zero"] / scores["sampled"] == pytest.approx(0.5, abs=0.02)
    assert sum(scores["kept"]) + sum(scores["cut"]) + scores["zero"] == scores["sampled"]
