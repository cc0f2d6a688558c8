"""Resolution of a recipe: what every stage does to a model, before anything is opened for work or written.

`niwaki.plan`, `niwaki.compress` and its early check share it. It reads the recipe and the shapes of the decoder. It
opens nothing and prints nothing, and raises an error for everything that can be known to be wrong.

    plan = resolve(recipe, decoder)
    plan.stages[-1].target
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from niwaki.compression.allocation import ALLOCATIONS, OWN_WIDTHS, OwlConfig, Targets, owl, uniform
from niwaki.compression.bit_allocation import bits_within, kept_targets
from niwaki.compression.shapes import ExpectedShape, expect_shape
from niwaki.compression.stages import split_stages
from niwaki.config.presets import BITS_OPTION
from niwaki.config.recipe import MISSING, Calibration, Recipe, make_options
from niwaki.config.targets import Bits, Sparsity, Target, format_blocks, parse_target
from niwaki.data.statistics import Needs
from niwaki.data.text_amount import fit_seq_len
from niwaki.errors import CalibrationError, InputError, TargetError, unknown
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import METHODS, MethodInfo, Step, make_steps, merged_needs, method_infos, method_names
from niwaki.model.anatomy import Anatomy
from niwaki.model.decoder import Decoder
from niwaki.runtime.contextual.places import find_places
from niwaki.runtime.contextual.traces import prompt_lengths
from niwaki.runtime.contextual.units import find_layout

OWL_PREFIX = "owl_"
MIN_CONTEXTUAL_WINDOWS = 8  # fewer cannot be split into windows to fit and windows to evaluate
MIN_INPUT_TOKENS, MAX_INPUT_SHARE = 8, 0.9


@dataclass(frozen=True)
class RecipeStage:
    """One stage of a recipe, as far as it is known without a model.

    `recipe` has its allocation chosen. `target` is None where bits follow from `target_bytes` and the model.
    """

    recipe: Recipe
    target: Target | None
    steps: tuple[Step, ...]
    owl: OwlConfig

    @property
    def columns_multiple(self) -> int:
        """Return the number that must divide the columns of every matrix for this stage."""
        groups = [step.group or 1 for step in self.steps]
        return math.lcm(1 if self.target is None else self.target.columns_multiple, *groups)


@dataclass(frozen=True)
class ResolvedStage:
    """One stage of a recipe for a model.

    `anatomy` has the matrices of the blocks that the stage compresses; the other blocks have none there.

    All `steps` have the same `kind`. `targets` are provisional: the job replaces those that the calibration text
    decides (`Allocation.targets`). `dense_stream`: the dense model runs beside the compressed one.
    `columns_multiple`: the next stage needs columns in multiples of it. `windows` of `tokens` are the calibration, both
    0 if nothing needs any. `expected` is what is known of the shape of a structured method.
    """

    recipe: Recipe
    anatomy: Anatomy
    kind: MethodKind
    target: Target
    steps: tuple[Step, ...]
    owl: OwlConfig
    targets: Targets
    needs: Needs
    dense_stream: bool
    columns_multiple: int
    windows: int
    tokens: int
    expected: ExpectedShape | None = None


@dataclass(frozen=True)
class ResolvedPlan:
    """A recipe with its stages: one, or two if a structured method comes first."""

    recipe: Recipe
    stages: tuple[ResolvedStage, ...]


def recipe_stages(recipe: Recipe) -> list[RecipeStage]:
    """Return the stages of a recipe. Raises InputError or TargetError for what is wrong without a model."""
    stages = []
    for part in split_stages(recipe):
        target = None if part.target is None else parse_target(part.target)
        if part.allocation not in ALLOCATIONS:
            raise InputError(unknown("allocation", part.allocation, ALLOCATIONS))
        part = resolve_allocation(part)
        owl_config, steps = _split_options(part, target)
        if target is None and part.target_bytes is None and not bits_are_named(part, method_infos(part.method)):
            raise InputError(MISSING.format("target"))
        stages.append(RecipeStage(part, target, tuple(steps), owl_config))
    if recipe.calibration.held_out and not any(step.needs.windows for stage in stages for step in stage.steps):
        raise InputError(
            f"held_out {recipe.calibration.held_out} judges what is learned inside blocks, and {recipe.method} learns "
            "nothing there: leave it out, or take a method or option that learns, such as wandapp or learn_rounds=8"
        )
    return stages


def resolve(recipe: Recipe, decoder: Decoder, *, dense_stream: bool = False) -> ResolvedPlan:
    """Return what a recipe does to a model. Raises InputError or TargetError for what is wrong.

    A second stage is resolved against the dense decoder: the shape that the first one leaves depends on the text.
    `compress` resolves it again for the smaller model.
    """
    *before, last = recipe_stages(recipe)
    stages = [resolve_stage(stage, decoder, columns_multiple=last.columns_multiple) for stage in before]
    return ResolvedPlan(recipe, (*stages, resolve_stage(last, decoder, dense_stream=dense_stream)))


def resolve_stage(
    stage: RecipeStage, decoder: Decoder, *, dense_stream: bool = False, columns_multiple: int = 1
) -> ResolvedStage:
    """Return one stage for a model. Raises TargetError for a matrix that the target does not fit."""
    recipe, anatomy = stage.recipe, _named_blocks(stage.recipe, decoder.anatomy)
    _check_reach(stage, len(anatomy.blocks))
    needs = merged_needs(stage.steps)
    target, named = stage.target, _named_targets(stage, anatomy)
    if named is not None:
        recipe, target = _within(recipe, target, _average_bits(anatomy, named))
    elif target is None:
        assert recipe.target_bytes is not None, "a recipe has a target or target_bytes"
        target = bits_within(recipe.target_bytes, decoder, anatomy)
    targets = uniform(anatomy, target) if named is None else named
    if recipe.allocation == "owl":
        owl(anatomy, target, [0.0] * len(decoder), stage.owl)  # raises for targets that it cannot spread
    if recipe.keep_blocks:
        targets = kept_targets(anatomy, target, () if recipe.keep_blocks == "auto" else recipe.keep_blocks)
    kind, given = stage.steps[0].kind, recipe.calibration
    measured = recipe.allocation != "uniform" or recipe.keep_blocks == "auto" or kind is not MethodKind.WALK
    dense_stream = dense_stream or needs.dense
    wanted = needs.anything or measured or dense_stream or bool(given.files or given.mix)
    seq_len = fit_seq_len(given.seq_len, Calibration().seq_len, decoder.positions, "the model")
    windows, tokens = (given.samples, seq_len) if wanted else (0, 0)
    steps, expected = stage.steps, None
    if kind is MethodKind.CONTEXTUAL:
        _check_contextual(steps[0], target, decoder, windows, tokens)
    if kind is MethodKind.SHAPE:
        assert isinstance(target, Sparsity), "the target of a structured method"
        step, expected = expect_shape(decoder, recipe, steps[0], target, columns_multiple)
        steps = (step,)
    return ResolvedStage(
        recipe, anatomy, kind, target, steps, stage.owl, targets, needs, dense_stream, columns_multiple, windows,
        tokens, expected,
    )  # fmt: skip


def _named_blocks(recipe: Recipe, anatomy: Anatomy) -> Anatomy:
    """Return the anatomy of the blocks that the recipe names. Raises TargetError for blocks that do not exist."""
    if recipe.blocks is None:
        return anatomy
    count = len(anatomy.blocks)
    if missing := [index for index in recipe.blocks if index >= count]:
        raise TargetError(f"blocks {format_blocks(missing)}: the model has blocks 0 to {count - 1}")
    named = anatomy.only(recipe.blocks)
    if not named.weights:
        raise TargetError(f"blocks {format_blocks(recipe.blocks)}: these have no matrices to compress")
    return named


def _check_reach(stage: RecipeStage, count: int) -> None:
    """Raise InputError if a step counts logits, and the error of none of the named blocks reaches the last block."""
    blocks = stage.recipe.blocks
    for step in stage.steps if blocks is not None else ():
        reach = max(blocks or ()) + step.needs.ahead
        if getattr(step.config, "kl", 0.0) and reach < count - 1:
            raise InputError(
                f"{step.name}.kl counts logits where the error of a block reaches the last one, {count - 1}, and "
                f"that of blocks {format_blocks(blocks or ())} ends at {reach}: name the last block, raise ahead, or "
                "leave kl out"
            )


def resolve_allocation(recipe: Recipe) -> Recipe:
    """Return the recipe with `auto` replaced by the allocation that is best for its methods.

    Raises TargetError for budgets that a method of the recipe cannot spend as they are meant.
    """
    infos = method_infos(recipe.method)
    if recipe.allocation == "auto":
        by_need = all(info.fractional_bits for info in infos) and not (
            recipe.keep_blocks or bits_are_named(recipe, infos)
        )
        recipe = recipe.model_copy(update={"allocation": "sensitivity" if by_need else "uniform"})
    if recipe.allocation in OWN_WIDTHS and infos[0].kind is not MethodKind.SHAPE:
        names = ", ".join(method_names(MethodKind.SHAPE))
        raise TargetError(f"{recipe.allocation} widths need a structured method ({names}), got {recipe.method}")
    if recipe.drop_unused and infos[0].kind is MethodKind.CONTEXTUAL:
        raise InputError(f"{recipe.method} keeps the files of the weights as they are: leave drop_unused out")
    if recipe.rotate != "none" and recipe.blocks is not None:
        raise InputError(
            f"rotate {recipe.rotate} changes the weights of every block, and blocks {format_blocks(recipe.blocks)} "
            "keeps the others as they are: set rotate to none (--rotate none), or leave blocks out"
        )
    _check_alone(recipe, infos)
    _check_bit_budget(recipe, infos)
    return recipe


def bits_are_named(recipe: Recipe, infos: Sequence[MethodInfo]) -> bool:
    """Return whether an option of a method with fractional bits decides the bits in place of a target."""
    for info in infos:
        named = [f"{info.name}.{BITS_OPTION}", *([BITS_OPTION] if len(infos) == 1 else [])]
        for value in (recipe.options[key] for key in named if key in recipe.options):
            if info.fractional_bits and _not_zero(value):
                return True
    return False


def _not_zero(value: Any) -> bool:
    """Return whether an option is not zero. Any other text counts: `make_options` refuses it."""
    try:
        return float(value) != 0
    except (TypeError, ValueError):
        return True


def _named_targets(stage: RecipeStage, anatomy: Anatomy) -> Targets | None:
    """Return the bits of every matrix that the options of a method name, None if a target decides them."""
    step = stage.steps[-1]
    if step.kind is not MethodKind.WALK or not bits_are_named(stage.recipe, [METHODS[s.name] for s in stage.steps]):
        return None
    targets: Targets = []
    for block in anatomy.blocks:
        bits = {name: step.named_bits(linear.rows, linear.columns) for name, linear in block.linears.items()}
        targets.append({name: Bits(own) for name, own in bits.items() if own is not None})
    return targets


def _average_bits(anatomy: Anatomy, targets: Targets) -> float:
    """Return the average of the bits of all matrices over their weights."""
    total = 0.0
    for block, own in zip(anatomy.blocks, targets, strict=True):
        for name, linear in block.linears.items():
            target = own[name]
            assert isinstance(target, Bits)
            total += target.bits * linear.rows * linear.columns
    return total / anatomy.weights


def _within(recipe: Recipe, ceiling: Target | None, bits: float) -> tuple[Recipe, Bits]:
    """Return the recipe, `bits` its target if it has none, and the target. Raises TargetError above `ceiling`."""
    if ceiling is None:
        written = f"{math.ceil(bits * 1e4) / 1e4:g}bit"
        return recipe.model_copy(update={"target": written}), Bits(bits)
    assert isinstance(ceiling, Bits), "methods with fractional bits meet bits"
    if bits > ceiling.bits:
        raise TargetError(
            f"target {ceiling}: {BITS_OPTION} takes {bits:.4f} bits a weight in this model, scales and mask included: "
            f"leave the target out, raise it, or lower {BITS_OPTION}"
        )
    return recipe, Bits(bits)


def _check_alone(recipe: Recipe, infos: Sequence[MethodInfo]) -> None:
    """Raise InputError or TargetError for a shape or contextual method that shares a stage or gets an allocation."""
    alone = next((info for info in infos if info.kind is not MethodKind.WALK), None)
    if alone is None:
        return
    shapes = alone.kind is MethodKind.SHAPE
    if recipe.blocks is not None:
        what = "changes the shape of all blocks together" if shapes else "learns what all blocks together need"
        raise InputError(f"{alone.name} {what}: leave blocks {format_blocks(recipe.blocks)} out")
    if len(infos) > 1:
        why = (
            "changes the shape of the model: put it first in the chain, with a target of its own (comp+gptq, 0.25+4bit)"
            if shapes
            else "learns what a finished model needs: run it alone, on the result of other methods"
        )
        raise InputError(f"{alone.name} {why}")
    if recipe.allocation != "uniform" and not (shapes and recipe.allocation in OWN_WIDTHS):
        chosen = "the shape" if shapes else "what runs"
        raise TargetError(f"{alone.name} chooses {chosen} itself: drop allocation {recipe.allocation}")


def _check_bit_budget(recipe: Recipe, infos: Sequence[MethodInfo]) -> None:
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
                    f"{field} needs a method that spends any number of bits ({able}), got {info.name}: "
                    f"use another method, or drop {field}"
                )
    for given, what in (recipe.pack, "--pack none"), (recipe.options.get("granularity"), "granularity element"):
        if recipe.target_bytes is not None and given == what.split()[-1]:
            raise TargetError(f"target_bytes counts stored codes, and {what} stores none: give --target in bits")
    if bits_are_named(recipe, infos) and (other := next((name for name, given in budgets.items() if given), None)):
        raise TargetError(f"{other} and {BITS_OPTION} both say where the bits go: drop one of them")
    if by_need and recipe.keep_blocks:
        raise TargetError("keep_blocks and allocation sensitivity both say where the bits go: drop one of them")


def _check_contextual(step: Step, target: Target, decoder: Decoder, windows: int, tokens: int) -> None:
    """Raise an error for a decoder without units to skip, and for windows that are too short or too few."""
    if windows < MIN_CONTEXTUAL_WINDOWS:
        raise InputError(
            f"a predictor cannot be learned from {windows} windows: give --samples {MIN_CONTEXTUAL_WINDOWS} or more"
        )
    if step.config.unit == "inputs":
        find_places(decoder.anatomy)
        if tokens < MIN_INPUT_TOKENS:
            raise CalibrationError(
                f"windows of {tokens} tokens cannot be cut into a prompt and what follows: raise --seq-len"
            )
        if isinstance(target, Sparsity) and target.zeros_frac > MAX_INPUT_SHARE:
            raise TargetError(f"shadow skips at most {MAX_INPUT_SHARE:g} of the inputs, got {target}: lower the target")
        return
    find_layout(decoder.anatomy, decoder.model, step.config.neuron_width)
    if prompt_lengths(tokens, step.config.cuts)[0] < 2:
        raise CalibrationError(
            f"windows of {tokens} tokens cannot be cut into {step.config.cuts} prompts and what follows: "
            "raise --seq-len, or lower cuts"
        )


def _split_options(recipe: Recipe, target: Target | None) -> tuple[OwlConfig, list[Step]]:
    """Return the options that start with `owl_` for the allocation, and the steps with all others."""
    of_owl = {k.removeprefix(OWL_PREFIX): v for k, v in recipe.options.items() if k.startswith(OWL_PREFIX)}
    of_methods = {k: v for k, v in recipe.options.items() if not k.startswith(OWL_PREFIX)}
    if of_owl and recipe.allocation != "owl":
        raise InputError(f"option {OWL_PREFIX}{next(iter(of_owl))} needs the allocation owl")
    return make_options(OwlConfig, of_owl, "owl"), make_steps(recipe.method, of_methods, target)
