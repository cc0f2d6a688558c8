"""The closed-form map against plain ridge regression in float64, its trust, its size and its file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from niwaki.errors import CheckpointError, InputError
from niwaki.methods import shadow
from niwaki.runtime.contextual.predictor import LIMIT, fit, kept_share, shrunk
from niwaki.runtime.contextual.predictor import _fit as fit_once
from niwaki.runtime.contextual.predictor_files import ABOUT, TENSORS, read_shadow, write_shadow
from niwaki.runtime.contextual.selection import Variant
from niwaki.runtime.contextual.traces import Traces
from niwaki.runtime.contextual.units import UnitLayout
from support.contextual import layout_of, model_of, shadow_of


@pytest.fixture(scope="module")
def layout() -> UnitLayout:
    return layout_of(model_of("llama"))


def samples(layout: UnitLayout, count: int, noise: float = 0.05, seen: float = 0.0) -> Traces:
    """Make scores that follow three hidden causes. `last` shows a rotation, prompts nothing or `seen` of it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cause_N3, effect_3U = normal(count, 3), normal(3, layout.size)
    truth_NU = (1 + 0.3 * cause_N3 @ effect_3U).clamp_min(0.01)
    last_ND = cause_N3 @ normal(3, 16) + 0.01 * normal(count, 16)
    prompt_NU = 1 + seen * (truth_NU - 1) + 0.3 * normal(count, layout.size)
    score_NU = (
        (torch.rand(layout.size, generator=generator) + 0.5) * truth_NU * (1 + noise * normal(count, layout.size))
    )
    return Traces(last_ND, normal(count, 16), prompt_NU.clamp_min(0), score_NU.clamp_min(0), torch.ones(layout.size))


def test_full_rank_is_ridge_regression(layout: UnitLayout) -> None:
    traces, penalty = samples(layout, 24), 3.0
    predictor = fit_once(traces, layout, ("last",), rank=1000, penalty=penalty)
    x, y = traces.last_ND.double(), traces.score_NU.double()
    prior = y.mean(0)
    mean, deviation = x.mean(0), x.std(0)

    def inputs(raw: Tensor) -> Tensor:
        return ((raw.double() - mean) / deviation).clamp(-LIMIT, LIMIT)

    z = inputs(x)
    weights = torch.linalg.solve(z.T @ z + penalty * 16 * torch.eye(16).double(), z.T @ (y / prior - 1))
    wanted = prior * (1 + inputs(traces.last_ND[:5]) @ weights)
    found = predictor.scores(traces.last_ND[:5], traces.mean_ND[:5], traces.prompt_NU[:5]).double()
    heads = predictor.heads
    torch.testing.assert_close(found[:, heads:], wanted[:, heads:], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found[:, :heads], prior[:heads].expand(5, -1), rtol=1e-5, atol=1e-6)


def test_heads_follow_what_the_prompt_shows_and_nothing_else(layout: UnitLayout) -> None:
    """Read scores of heads that ask the features nothing; those of neurons do."""
    traces = samples(layout, 80, seen=0.8)
    predictor, _ = fit(traces, layout, ("last", "mean"), True, 8)
    one = traces.take(slice(0, 4))
    other = predictor.scores(-one.last_ND, -one.mean_ND, one.prompt_NU)
    heads, neurons = layout.split(other - predictor.scores(one.last_ND, one.mean_ND, one.prompt_NU))
    assert not heads.any() and neurons.abs().max() > 0.01
    shown = predictor.scores(one.last_ND, one.mean_ND, 1.2 * one.prompt_NU)
    assert float(layout.split(shown - predictor.scores(one.last_ND, one.mean_ND, one.prompt_NU))[0].abs().max()) > 0.01


def test_groups_of_features_weigh_alike(layout: UnitLayout) -> None:
    """Give a group twice, the same as once: the penalty counts groups, not columns."""
    traces = samples(layout, 24)
    twin = Traces(traces.last_ND, traces.last_ND, traces.prompt_NU, traces.score_NU, traces.sensitivity_U)
    once = fit_once(traces, layout, ("last",), 24, 3.0).scores(traces.last_ND, traces.last_ND, traces.prompt_NU)
    twice = fit_once(twin, layout, ("last", "mean"), 24, 3.0).scores(traces.last_ND, traces.last_ND, traces.prompt_NU)
    torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-3)


def test_it_beats_the_static_mask_on_samples_it_has_not_seen(layout: UnitLayout) -> None:
    traces = samples(layout, 120)
    train, test = traces.take(slice(0, 90)), traces.take(slice(90, None))
    static, _ = fit(train, layout, (), False, 8)
    learned, found = fit(train, layout, ("last",), True, 8)
    assert kept_share(learned, test, layout) > kept_share(static, test, layout) + 0.02
    assert found["rank"] <= 8 and found["samples"] == 90
    shuffled = Traces(train.last_ND.flip(0), train.mean_ND, train.prompt_NU, train.score_NU, train.sensitivity_U)
    blind, _ = fit(shuffled, layout, ("last",), False, 8)
    assert kept_share(blind, test, layout) < kept_share(static, test, layout) + 0.01


def test_trust_grows_with_what_prompts_tell(layout: UnitLayout) -> None:
    betas = [fit(samples(layout, 80, seen=seen), layout, (), True, 8)[0].trust_K2[1, 0] for seen in (0.0, 0.5, 1.0)]
    assert betas[0] < 0.25 and min(betas[1:]) > 0.8 and max(betas) <= 1
    gap_BU = torch.tensor([[0.1, -0.1], [1.0, -1.0]])
    found = shrunk(gap_BU, torch.tensor(0.5), torch.tensor(0.04))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.48, -0.48]]))  # 0.5 · (1 − 0.04) of the second


@pytest.mark.parametrize("features", ["last", "last+mean+prompt"])
def test_its_size_stays_within_its_share(layout: UnitLayout, features: str) -> None:
    weights = 200_000
    config = shadow.Config(unit="prompt", features=features)
    predictor, _ = shadow.learn(samples(layout, 80), layout, config, weights)
    assert predictor.parameters <= 0.03 * weights
    assert predictor.into_FR.shape[1] >= 3  # the causes of the samples
    with pytest.raises(InputError, match="has no room for rank 1"):
        shadow.learn(samples(layout, 80), layout, config, 8_000)


def test_energy_weighs_by_sensitivity(layout: UnitLayout) -> None:
    traces = samples(layout, 16)
    sensitive = Traces(*list(vars(traces).values())[:4], 1 + torch.arange(layout.size).float())
    config = shadow.Config(unit="prompt", head_criterion="energy", criterion="energy", features="none", shrinkage=False)
    found = shadow.samples({"energy": sensitive}, layout, config)
    torch.testing.assert_close(found.score_NU, traces.score_NU * sensitive.sensitivity_U)


def test_heads_and_neurons_have_criteria_of_their_own(layout: UnitLayout) -> None:
    traces = samples(layout, 16)
    other = Traces(*list(vars(traces).values())[:3], traces.score_NU + 1, traces.sensitivity_U)
    config = shadow.Config(unit="prompt", head_criterion="plainact", criterion="fisher")
    found = shadow.samples({"plainact": other, "fisher": traces}, layout, config)
    heads, neurons = layout.split(found.score_NU - traces.score_NU)
    assert torch.allclose(heads, torch.ones_like(heads)) and not neurons.any()


def test_the_trial_takes_what_loses_least(layout: UnitLayout) -> None:
    """Choose heads first; each criterion is chosen by the loss of its masks on windows held out of the fit."""
    right, wrong = samples(layout, 64), samples(layout, 64)
    wrong = replace(wrong, score_NU=wrong.score_NU.flip(1))
    traces = {"plainact": wrong, "fisher": wrong, "energy": right}
    config = shadow.Config(unit="prompt", features="last", size_frac=0.5)
    held = shadow.candidate_rows(32, config)
    assert held == range(24, 32)
    rows = torch.tensor([window * 2 + window % 2 for window in held])
    asked: list[int] = []

    def measure(variants: Sequence[Variant]) -> list[float]:
        asked.append(len(variants))
        assert all(variant.kept_BU.shape == (8, layout.size) and variant.mean_fill == 0.5 for variant in variants)
        return [-float((right.score_NU[rows] * variant.kept_BU).sum()) for variant in variants]

    chosen, tried = shadow.choose_criterion(traces, layout, config, 0.5, 1_000_000, measure)
    assert (chosen.head_criterion, chosen.criterion) == ("energy", "energy")
    assert asked == [3, 3] and set(tried) == {"head_criterion", "criterion"}
    assert tried["criterion"]["energy"] == min(tried["criterion"].values()) < min(tried["head_criterion"].values())
    fixed = replace(config, head_criterion="fisher", criterion="plainact")
    assert shadow.choose_criterion(traces, layout, fixed, 0.5, 1_000_000, measure) == (fixed, {}) and len(asked) == 2
    assert shadow.candidate_rows(8, config) == range(6, 8) and shadow.candidate_rows(1000, config) == range(968, 1000)


def test_the_files_bring_everything_back(layout: UnitLayout, tmp_path: Path) -> None:
    (tmp_path / "niwaki").mkdir()
    traces = samples(layout, 40)
    predictor, _ = fit(traces, layout, ("last", "mean", "prompt"), True, 4)
    made = shadow_of(model_of("llama"), refresh_tokens=7)
    write_shadow(tmp_path, type(made)(predictor, layout, made.rule, made.running))
    found = read_shadow(tmp_path)
    assert (found.layout, found.rule, found.running) == (layout, made.rule, made.running)
    arguments = traces.last_ND, traces.mean_ND, traces.prompt_NU
    assert torch.equal(found.predictor.scores(*arguments), predictor.scores(*arguments))
    about = (tmp_path / ABOUT).read_text()
    (tmp_path / ABOUT).write_text(about.replace('"format": 1', '"format": 9'))
    with pytest.raises(CheckpointError, match="has format 9, this niwaki reads 1"):
        read_shadow(tmp_path)
    for before, after, message in (
        ('"blocks": 3', '"blocks": true', "layout.blocks: "),
        ('"skip_frac": 0.5', '"skip_frac": 1.5', "rule.skip_frac: "),
        ('"mean_fill": 0.0', '"mean_fill": NaN', "running.mean_fill: "),
        ('"scope": "local"', '"scope": "here"', "rule.scope: "),
        ('"refresh_tokens"', '"refreshed"', "running.refreshed: "),
        ('"width": 1', '"width": 7', "layout.width 7 does not divide"),
    ):
        if before in about:
            (tmp_path / ABOUT).write_text(about.replace(before, after))
            with pytest.raises(CheckpointError, match=message) as caught:
                read_shadow(tmp_path)
            assert "\n" not in str(caught.value)
    (tmp_path / ABOUT).write_text(about)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="are not complete"):
        read_shadow(tmp_path)
