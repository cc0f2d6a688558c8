"""COMP's search and choice; test_unit_pruning tests the least squares, test_structured whole runs."""

import pytest
import torch
import transformers

from niwaki.config.targets import KeepUnits, PrunableUnit
from niwaki.methods import comp
from niwaki.methods.comp import Config
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton
from niwaki.model.prunable import BlockInfo, PrunedShape, ShapeSpace
from support.families import GQA
from support.models import calibration_of, correlated_inputs, make_block

UNIT = PrunableUnit("neurons", "m", (), 48)


def sizes() -> ShapeSpace:
    config = transformers.LlamaConfig(**{**GQA, "num_hidden_layers": 4})
    skeleton = build_skeleton(config, torch.float32)
    return ShapeSpace(discover(skeleton), skeleton, config.to_dict())


def walked(
    losses: dict[tuple[int, int], float], target: float = 0.3, **options: int
) -> tuple[PrunedShape | None, list]:
    """Return the result of a search with these losses by (blocks gone, heads left), and the shapes that it tried."""
    found = sizes()
    looks = [BlockInfo(influence) for influence in (0.9, 0.2, 0.1, 0.5)]
    search = comp.search(found, target, looks, Config(multiple=1, **options))
    tried: list[tuple[int, int]] = []
    try:
        shapes = next(search)
        while True:
            places = [(len(shape.dropped), max(shape.heads)) for shape in shapes]
            tried += places
            shapes = search.send([losses.get(place, 9.0) for place in places])
    except StopIteration as stop:
        return stop.value, tried


def test_the_search_descends_and_stops_where_nothing_is_lower() -> None:
    shape, tried = walked({(0, 2): 3.0, (1, 2): 2.5, (0, 1): 2.8, (2, 2): 2.6, (1, 1): 2.4, (2, 1): 2.9})
    assert shape is not None and shape.dropped == (2,) and max(shape.heads) == 1  # block 2 matters least
    assert tried == [(0, 2), (1, 2), (0, 1), (2, 2), (1, 1), (2, 1)]
    assert sizes().removed_frac(shape) >= 0.3


def test_the_search_begins_where_a_shape_exists_and_ends_without_one() -> None:
    shape, tried = walked({}, target=0.9)  # one block with one group of heads is all that may be left
    assert shape is not None and tried == [] and shape.dropped == (1, 2, 3)  # nothing to choose between
    assert walked({}, target=0.9, try_blocks=0) == (None, [])
    kept, tried = walked({(0, 2): 3.0, (1, 2): 1.0}, try_blocks=0, try_heads=0)
    assert kept is not None and tried == [] and not kept.dropped


@pytest.mark.parametrize(
    "options", [{}, {"score": "energy"}, {"score": "pca"}, {"tune": "scales"}, {"supervise_frac": 0.5}]
)
def test_tuning_beats_leaving_the_columns_as_they_are(options: dict) -> None:
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    x = correlated_inputs(400, 48)
    block = make_block({"m": weight})

    def error(**more: object) -> float:
        config = Config(**(options | more))
        calib = calibration_of(block, x, comp.needs(config))
        found = comp.compress(block, calib, {"m": KeepUnits(UNIT, 30)}, config, torch.Generator())["m"]
        assert len(found.detail["kept_groups"]) == 30 and found.cut == (16, 30)
        return float((x @ (found.weight_OI - weight).T).square().sum() / (x @ weight.T).square().sum())

    tuned, left, random = error(), error(tune="none"), error(score="random")
    assert tuned < left and tuned < random


@pytest.mark.parametrize("tune", ["full", "none"])
@pytest.mark.parametrize(("score", "condition"), [("gram_condition", "gram"), ("weight_condition", "weights")])
def test_a_score_by_condition_leaves_a_better_one_than_chance(score: str, condition: str, tune: str) -> None:
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    x = correlated_inputs(400, 48)
    block = make_block({"m": weight})

    def kept_condition(score: str) -> float:
        config = Config(score=score, tune=tune, at_once=1)
        calib = calibration_of(block, x, comp.needs(config))
        found = comp.compress(block, calib, {"m": KeepUnits(UNIT, 30)}, config, torch.Generator().manual_seed(1))["m"]
        left = weight[:, found.detail["kept_groups"]].double()
        scaled = x[:, found.detail["kept_groups"]].double() * left.norm(dim=0)
        return float(torch.linalg.cond(scaled.T @ scaled if condition == "gram" else left @ left.T))

    assert kept_condition(score) < 0.8 * kept_condition("random")


def test_groups_that_no_token_reached_go_by_their_weights() -> None:
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    weight[:, 10:] *= 0.01
    block = make_block({"m": weight})
    calib = calibration_of(block, torch.zeros(0, 48), comp.needs(Config()))
    found = comp.compress(block, calib, {"m": KeepUnits(UNIT, 10)}, Config(), torch.Generator())["m"]
    assert found.detail["kept_groups"] == list(range(10)) and "no calibration token" in found.note
    assert torch.equal(found.weight_OI[:, :10], weight[:, :10])


@pytest.mark.parametrize(("options", "message"), [
    ({"score": "best"}, "score must be one of surgeon"), ({"tune": "all"}, "tune must be one of full"),
    ({"supervise": "x"}, "supervise must be one of"), ({"supervise_frac": 0.0}, r"supervise_frac must lie in \(0, 1\]"),
    ({"target": "x"}, "target must be one of"), ({"reconstruct": "x"}, "reconstruct must be one of"),
    ({"damping_frac": 0.0}, "damping_frac must lie in"), ({"at_once": -1}, "at_once ≥ 0"),
])  # fmt: skip
def test_wrong_options_say_what_is_expected(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)
