"""The search for widths against a loss whose best shape is known."""

from collections.abc import Callable

import pytest
import torch
import transformers

from niwaki.compression.width_search import spread
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton
from niwaki.model.prunable import PrunedShape, ShapeSpace
from support.families import GQA

BLOCKS = 6


@pytest.fixture(scope="module")
def sizes() -> ShapeSpace:
    config = transformers.LlamaConfig(**{
        **GQA, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 32, "num_key_value_heads": 16,
    })  # fmt: skip
    skeleton = build_skeleton(config, torch.float32)
    return ShapeSpace(discover(skeleton), skeleton, config.to_dict())


def searched(
    sizes: ShapeSpace, loss: Callable[[PrunedShape], float], start: PrunedShape, target: float, multiple: int
) -> PrunedShape:
    search = spread(sizes, start, target, multiple)
    shapes = next(search)
    try:
        while True:
            assert all(shape.dropped == start.dropped for shape in shapes)
            shapes = search.send([loss(shape) for shape in shapes])
    except StopIteration as stop:
        found: PrunedShape = stop.value
        return found


def quadratic(sizes: ShapeSpace, stiffness: dict[str, list[float]]) -> Callable[[PrunedShape], float]:
    def loss(shape: PrunedShape) -> float:
        return sum(
            a * (1 - kept / unit.count) ** 2
            for kind, unit in sizes.units.items()
            for a, kept in zip(stiffness[kind], shape.kept(kind), strict=True)
        )

    return loss


def test_units_that_matter_less_end_narrower_as_the_formula_says(sizes: ShapeSpace) -> None:
    stiffness = {"neurons": [1.0, 2.0, 4.0, 4.0, 2.0, 1.0], "heads": [8.0] * BLOCKS}
    loss = quadratic(sizes, stiffness)
    start = sizes.fitting(0.3, sizes.heads, (), 8)
    assert start is not None
    found = searched(sizes, loss, start, 0.3, 8)
    assert loss(found) < 0.8 * loss(start) and 0.3 <= sizes.removed_frac(found) < 0.31
    assert all(n % 8 == 0 for n in found.neurons)
    # the best r is proportional to P / a, P the parameters of a unit
    gone = {kind: [1 - kept / unit.count for kept in found.kept(kind)] for kind, unit in sizes.units.items()}
    assert gone["neurons"][0] == pytest.approx(2 * gone["neurons"][1], rel=0.15)
    assert gone["neurons"][1] == pytest.approx(2 * gone["neurons"][2], rel=0.15)
    ratio = sizes.neurons * sizes.group_parameters["neurons"] / (sizes.heads * sizes.group_parameters["heads"])
    assert gone["neurons"][2] == pytest.approx(2 * ratio * gone["heads"][2], rel=0.35)  # whole heads are coarse


def test_a_start_that_nothing_beats_is_kept(sizes: ShapeSpace) -> None:
    start = sizes.fitting(0.3, sizes.heads, (2,), 8)
    assert start is not None and start.dropped == (2,)
    assert searched(sizes, lambda shape: float(shape != start), start, 0.3, 8) == start


def test_noise_leaves_every_block_some_of_both_and_meets_the_budget(sizes: ShapeSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    start = sizes.fitting(0.5, sizes.heads, (), 0)
    assert start is not None
    losses: dict[PrunedShape, float] = {}

    def loss(shape: PrunedShape) -> float:
        return losses.setdefault(shape, float(torch.randn((), generator=generator)) - len(losses))

    found = searched(sizes, loss, start, 0.5, 0)
    assert found.whole and not found.dropped and sizes.removed_frac(found) >= 0.5 and found != start


def test_multiples_of_what_follows_are_kept(sizes: ShapeSpace) -> None:
    wider = ShapeSpace(sizes.anatomy, build_skeleton_of(sizes), sizes.config, columns_multiple=32)
    start = wider.fitting(0.3, wider.heads, (), 0)
    assert start is not None
    stiffness = {"neurons": [1.0, 2.0, 4.0, 4.0, 2.0, 1.0], "heads": [1.0] * BLOCKS}
    found = searched(wider, quadratic(wider, stiffness), start, 0.3, 0)
    columns = wider.anatomy.blocks[0].linears[wider.units["heads"].consumer].columns // wider.heads
    assert all(n % 32 == 0 for n in found.neurons) and all(h * columns % 32 == 0 for h in found.heads)


def build_skeleton_of(sizes: ShapeSpace) -> transformers.PreTrainedModel:
    """A skeleton of the same config; the anatomy is discovered once."""
    return build_skeleton(transformers.LlamaConfig(**sizes.config), torch.float32)
