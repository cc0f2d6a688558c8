"""The shapes that a structured method may take, before any text is read.

The shape that a method finds depends on the text. Here its own search runs with equal losses: every shape that it may
take removes about as much, and changes the same kinds of parts. So what cannot be stored is refused now.
"""

from dataclasses import dataclass, replace

from niwaki.compression.allocation import OWN_WIDTHS
from niwaki.config.recipe import Recipe
from niwaki.config.targets import Sparsity
from niwaki.errors import InputError
from niwaki.methods.registry import Step
from niwaki.model.decoder import Decoder
from niwaki.model.prunable import BlockInfo, PrunedShape, ShapeSpace


@dataclass(frozen=True)
class ExpectedShape:
    """The space of a structured stage, a shape that its method may take, and how many shapes it may evaluate.

    `notes` are lines on what the method leaves out for this model.
    """

    space: ShapeSpace
    shape: PrunedShape
    candidates: int
    notes: tuple[str, ...]


def is_cut(shape: PrunedShape, recipe: Recipe) -> bool:
    """Return whether what a shape removes leaves the file, and is not stored as zeros."""
    return shape.even or (shape.whole and recipe.pack != "none")


def expect_shape(
    decoder: Decoder, recipe: Recipe, step: Step, target: Sparsity, columns_multiple: int
) -> tuple[Step, ExpectedShape]:
    """Return the step as it fits the model, and the shape that it takes if all losses are equal.

    Raises an InputError if there is no shape, or if the result could not be stored.
    """
    config = decoder.checkpoint.config_content()
    space = ShapeSpace(decoder.anatomy, decoder.model, config, columns_multiple, cuts=recipe.pack != "none")
    settled, note = step.shape_method.settle(step.config, space)
    step = replace(step, config=settled)
    units = {kind: unit.count for kind, unit in space.units.items()}
    infos = [BlockInfo(1 - index / 1e3, {kind: [0.0] * n for kind, n in units.items()}) for index in range(len(space))]
    search = step.shape_method.search(space, target.zeros_frac, infos, settled)
    tried: set[PrunedShape] = set()
    try:
        shapes = next(search)
        while True:
            tried |= set(shapes)
            shapes = search.send([0.0] * len(shapes))
    except StopIteration as stop:
        shape: PrunedShape | None = stop.value
    if shape is None:
        raise space.no_shape(target, step.name)
    space.check(shape, is_cut(shape, recipe))
    if recipe.allocation in OWN_WIDTHS and not space.movable_kinds:
        raise InputError(
            f"blocks with widths of their own cannot be cut ({'; '.join(space.problems)}): "
            f"drop --allocation {recipe.allocation}, or use --pack none"
        )
    stays = tuple(f"{recipe.method} leaves a part as it is: {problem}" for problem in space.problems)
    return step, ExpectedShape(space, shape, len(tried), (*filter(None, [note]), *stays))
