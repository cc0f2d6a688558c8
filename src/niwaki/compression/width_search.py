"""Search of widths: every block keeps as many neurons and groups of heads as the loss says that it needs.

Losses are measured on proposed shapes (see `structured`). From an even shape, every unit of every block in turn becomes
a step narrower. With r the share of a unit that is gone, the rise of the loss is read as a·((r + step)² − r²). That
gives each unit a stiffness a. Among shapes that remove the same number of parameters, Σ a·r² is minimal at r = μ·P/a. P
is the number of parameters of the unit, and μ is the same for all. Points on the way there are evaluated, the best is
kept, and the search repeats from it.

Source: our own. Týr-the-Pruner and EvoPress (2025) also search by evaluation, with hundreds of shapes. This search
takes two for every block and round, and at most ROUNDS rounds, as long as they help.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from niwaki.config.targets import Kind
from niwaki.model.prunable import PrunedShape, ShapeSearch, ShapeSpace

ROUNDS = 3
EXPECTED_ROUNDS = 2  # of a typical search
STEP_FRAC = 0.125  # share of a unit that a probe removes
STRIDES = (0.35, 0.7, 1.0)  # parts of the way to the best shape
MAX_GONE = 0.875
MIN_STIFFNESS = 0.05  # share of the mean; a smaller rise is noise

Place = tuple[int, Kind]  # a unit: its block and its kind


def spread(sizes: ShapeSpace, start: PrunedShape, removed_frac: float, multiple: int) -> ShapeSearch:
    """Yield shapes that remove as much as `start`; return the one with the lowest loss, `start` if none is lower."""
    (least,) = yield [start]
    for _ in range(ROUNDS):
        probes = dict(_probes(sizes, start))
        losses = yield list(probes.values())
        rises = {place: loss - least for place, loss in zip(probes, losses, strict=True)}
        stiff = {
            place: rise / (_gone(sizes, probes[place], place) ** 2 - _gone(sizes, start, place) ** 2)
            for place, rise in rises.items()
        }
        wanted = balanced(sizes, start, stiff, removed_frac)
        near = [toward(sizes, start, wanted, stride, removed_frac, multiple) for stride in STRIDES]
        fitting = [shape for shape in near if sizes.removed_frac(shape) >= removed_frac - 1e-9]
        losses = yield fitting
        if min(losses, default=least) >= least:
            break
        least = min(losses)
        start = fitting[losses.index(least)]
    return start


def _probes(sizes: ShapeSpace, start: PrunedShape) -> Iterator[tuple[Place, PrunedShape]]:
    """Yield `start` with one unit a step narrower, for every unit that can be."""
    for index in range(len(sizes)):
        for kind in sizes.movable_kinds:
            kept = list(start.kept(kind))
            step = max(1, round(STEP_FRAC * sizes.units[kind].count))
            if kept[index] > step:
                kept[index] -= step
                yield (index, kind), replace(start, **{kind: tuple(kept)})


def _gone(sizes: ShapeSpace, shape: PrunedShape, place: Place) -> float:
    index, kind = place
    return gone_share(sizes, shape.kept(kind)[index], place)


def gone_share(sizes: ShapeSpace, kept: int, place: Place) -> float:
    """Return the share of the groups of a unit that is gone if it keeps `kept`."""
    return 1 - kept / sizes.units[place[1]].count


def balanced(
    sizes: ShapeSpace, start: PrunedShape, stiff: Mapping[Place, float], removed_frac: float
) -> dict[Place, float]:
    """Return the share of every unit in `stiff` (a by unit) that is gone where Σ a·r² is minimal."""
    floor = MIN_STIFFNESS * sum(max(a, 0.0) for a in stiff.values()) / len(stiff)
    stiff = {place: max(a, floor, 1e-12) for place, a in stiff.items()}
    size = {kind: unit.count * sizes.group_parameters[kind] for kind, unit in sizes.units.items()}
    fixed = sizes.removed(start) - sum(_gone(sizes, start, place) * size[place[1]] for place in stiff)
    total = removed_frac * len(sizes) * sizes.block_parameters - fixed

    def shares(mu: float) -> dict[Place, float]:
        return {place: min(mu * size[place[1]] / a, MAX_GONE) for place, a in stiff.items()}

    low, high = 0.0, max(a / size[place[1]] for place, a in stiff.items())
    for _ in range(60):
        mu = (low + high) / 2
        enough = sum(share * size[place[1]] for place, share in shares(mu).items()) >= total
        low, high = (low, mu) if enough else (mu, high)
    return shares(high)


def toward(
    sizes: ShapeSpace,
    start: PrunedShape,
    wanted: Mapping[Place, float],
    stride: float,
    removed_frac: float,
    multiple: int,
) -> PrunedShape:
    """Return the shape a part of the way from `start`; all neurons give or take the same share to meet the budget."""
    gone = {place: (1 - stride) * _gone(sizes, start, place) + stride * share for place, share in wanted.items()}
    heads = [
        sizes.rounded("heads", sizes.heads * (1 - gone[index, "heads"]), 0) if (index, "heads") in gone else kept
        for index, kept in enumerate(start.heads)
    ]

    def shifted(shift: float) -> PrunedShape:
        neurons = [
            sizes.rounded("neurons", sizes.neurons * (1 - gone[index, "neurons"] + shift), multiple)
            if (index, "neurons") in gone
            else kept
            for index, kept in enumerate(start.neurons)
        ]
        return PrunedShape(tuple(neurons), tuple(heads))

    low, high = -1.0, 1.0
    for _ in range(30):
        shift = (low + high) / 2
        enough = sizes.removed_frac(shifted(shift)) >= removed_frac - 1e-9
        low, high = (shift, high) if enough else (low, shift)
    return shifted(low)
