"""Resolution of a recipe."""

from niwaki.config.recipe import Recipe
from niwaki.errors import InputError, TargetError
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import METHODS, MethodInfo, chain_infos, method_names


def resolve_allocation(recipe: Recipe) -> Recipe:
    """Return the recipe with `auto` replaced by the allocation that is best for its methods.

    Raises TargetError for budgets that a method of the recipe cannot spend as they are meant.
    """
    infos = chain_infos(recipe.method)
    if recipe.allocation == "auto":
        by_need = all(info.fractional_bits for info in infos) and not recipe.keep_blocks
        recipe = recipe.model_copy(update={"allocation": "sensitivity" if by_need else "uniform"})
    if recipe.allocation == "searched" and infos[0].kind is not MethodKind.SHAPE:
        names = ", ".join(method_names(MethodKind.SHAPE))
        raise TargetError(f"searched widths need a structured method ({names}), got {recipe.method}")
    _check_alone(recipe, infos)
    _check_bit_budget(recipe, infos)
    return recipe


def _check_alone(recipe: Recipe, infos: list[MethodInfo]) -> None:
    """Raise InputError or TargetError for a shape or contextual method that shares a chain or gets an allocation."""
    alone = next((info for info in infos if info.kind is not MethodKind.WALK), None)
    if alone is None:
        return
    shapes = alone.kind is MethodKind.SHAPE
    if len(infos) > 1:
        why = (
            "changes the shape of the model: put it first in the chain, with a target of its own (comp+gptq, 0.25+4bit)"
            if shapes
            else "learns what a finished model needs: run it alone, on the result of other methods"
        )
        raise InputError(f"{alone.name} {why}")
    if recipe.allocation != "uniform" and not (shapes and recipe.allocation == "searched"):
        chosen = "the shape" if shapes else "what runs"
        raise TargetError(f"{alone.name} chooses {chosen} itself: drop allocation {recipe.allocation}")


def _check_bit_budget(recipe: Recipe, infos: list[MethodInfo]) -> None:
    """Raise TargetError for a budget of bits that a method cannot spend, and for two budgets that contradict."""
    by_need = recipe.allocation == "sensitivity"
    budgets = {
        "target_bytes": recipe.target_bytes,
        "keep_blocks": recipe.keep_blocks,
        "allocation sensitivity": by_need,
    }
    for info in infos:
        for field in (field for field, given in budgets.items() if given):
            if not info.fractional_bits:
                able = ", ".join(info.name for info in METHODS.values() if info.fractional_bits)
                raise TargetError(
                    f"{field} needs a method that spends whatever bits it is given ({able}), got {info.name}: "
                    f"use another method, or drop {field}"
                )
    for given, what in (recipe.pack, "--pack none"), (recipe.options.get("granularity"), "granularity element"):
        if recipe.target_bytes is not None and given == what.split()[-1]:
            raise TargetError(f"target_bytes counts stored codes, and {what} stores none: give --target in bits")
    if by_need and recipe.keep_blocks:
        raise TargetError("keep_blocks and allocation sensitivity both say where the bits go: drop one of them")
