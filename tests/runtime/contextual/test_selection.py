"""Counts, floors and ties of masks, and what they skip."""

import pytest
import torch

from niwaki.errors import ArchitectureError, InputError
from niwaki.runtime.contextual.selection import Rule, for_batch, highest, padded
from niwaki.runtime.contextual.units import read_layout
from support.contextual import layout_of, model_of


@pytest.mark.parametrize("skip_frac", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_local_skips_the_same_of_every_block(skip_frac: float) -> None:
    layout = layout_of(model_of("llama"))
    scores_BU = torch.rand(3, layout.size, generator=torch.Generator().manual_seed(0))
    kept_BU = Rule(skip_frac).select(scores_BU, layout)
    for kept_BLG, scores_BLG in zip(layout.split(kept_BU), layout.split(scores_BU), strict=True):
        count = max(1, kept_BLG.shape[2] - round(kept_BLG.shape[2] * skip_frac))
        assert (kept_BLG.sum(2) == count).all()
        lowest_kept = scores_BLG.masked_fill(~kept_BLG, torch.inf).amin(2)
        assert (lowest_kept >= scores_BLG.masked_fill(kept_BLG, -torch.inf).amax(2)).all()


@pytest.mark.parametrize("skip_frac", [0.3, 0.5, 0.7, 0.9])
def test_global_meets_the_total_and_leaves_every_block_its_floor(skip_frac: float) -> None:
    layout = layout_of(model_of("llama"))
    scores_BU = torch.rand(3, layout.size, generator=torch.Generator().manual_seed(0))
    heads_BLG, neurons_BLG = layout.split(scores_BU)
    heads_BLG[:, 0] += 10  # one block would take all
    neurons_BLG[:, 1] -= 10
    kept = layout.split(Rule(skip_frac, "global", 0.1).select(layout.join(heads_BLG, neurons_BLG), layout))
    for kept_BLG in kept:
        blocks, units = kept_BLG.shape[1:]
        floor = max(1, round(0.1 * units))
        assert (kept_BLG.sum((1, 2)) == max(blocks * floor, blocks * units - round(blocks * units * skip_frac))).all()
        assert (kept_BLG.sum(2) >= floor).all()
    assert (kept[1][:, 1].sum(1) == 5).all() or skip_frac < 0.5


def test_ties_fall_to_the_lower_place() -> None:
    assert highest(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 2).tolist() == [[True, True, False, False]]


def test_a_batch_shares_neurons_and_keeps_its_heads() -> None:
    layout = layout_of(model_of("llama"))
    scores_BU = torch.rand(3, layout.size, generator=torch.Generator().manual_seed(0))
    scores_BU[1] *= 1000  # no sequence outvotes another
    heads_BLG, neurons_BLG = layout.split(Rule(0.5).select(scores_BU, layout))
    found_BLG, union_LG = for_batch(Rule(0.5), scores_BU, layout)
    assert torch.equal(found_BLG, heads_BLG) and torch.equal(union_LG, neurons_BLG.any(0))
    _, shared_LG = for_batch(Rule(0.5), scores_BU, layout, "shared")
    assert shared_LG.sum(1).tolist() == neurons_BLG[0].sum(1).tolist()
    neurons_BLG = layout.split(scores_BU.double())[1]
    mean_LG = (neurons_BLG / neurons_BLG.sum(2, keepdim=True)).mean(0)
    for mean_G, shared_G in zip(mean_LG, shared_LG, strict=True):
        assert mean_G[shared_G].min() >= mean_G[~shared_G].max()


@pytest.mark.parametrize(("units", "step"), [(48, 1), (300, 2), (1408, 8), (11008, 64)])
def test_kept_neurons_are_padded_to_sizes_that_multiply_well(units: int, step: int) -> None:
    kept_LG = torch.rand(3, units, generator=torch.Generator().manual_seed(0)) < 0.4
    found_LG = padded(kept_LG)
    assert bool((found_LG | ~kept_LG).all())  # none is lost
    assert (found_LG.sum(1) % step == 0).all() and (found_LG.sum(1) - kept_LG.sum(1) < step).all()
    assert torch.equal(padded(found_LG), found_LG)
    if step == 1:
        assert torch.equal(found_LG, kept_LG)


def test_skipped_share() -> None:
    layout = layout_of(model_of("llama"))
    heads_BLG, neurons_BLG = (part.clone() for part in layout.split(torch.ones(1, layout.size, dtype=torch.bool)))
    neurons_BLG[:] = False
    weights = layout.weights["neurons"] / sum(layout.weights.values())
    assert float(layout.skipped_frac(layout.join(heads_BLG, neurons_BLG))[0]) == pytest.approx(weights)


def test_layouts_say_what_they_are_and_refuse_what_they_cannot_hold() -> None:
    model = model_of("llama")
    layout = layout_of(model, 16)
    assert layout.count("neurons") == 3 and layout.count("heads") == 4
    assert read_layout(layout.describe()) == layout
    with pytest.raises(InputError, match="neuron_width 32 does not divide the 48 neurons"):
        layout_of(model, 32)
    with pytest.raises(ArchitectureError):
        layout_of(model_of("gpt2"))
