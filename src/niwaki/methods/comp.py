"""COMP: fewer blocks, heads and neurons, and least squares on what is left; no training.

Source: "COMP" (arXiv 2501.15255). Only its abstract could be read: a reconstruction, every choice an option.

1. Whole blocks go by importance, here 1 − cos(h_in, h_out), as in ShortGPT. How many go, how many groups of heads
   go from the other blocks, and so how many neurons, is not fixed: from all of both, one less of either is tried on a
   part of the calibration text, and taken if that lowers the loss on another part (`try_blocks`, `try_heads`). One
   cosine alone has let models collapse (3419 instead of 5.8 on Llama-3.1-8B at 25 %, by the authors of Týr).
2. Neurons, and groups of heads that share a key and a value, go by a score of the conditioning of what remains
   (`score`); the paper's formula is not verified. Candidates for a group of columns g of the matrix W that writes to
   the residual stream: `surgeon` tr(W_g [H⁻¹]_gg⁻¹ W_gᵀ), taken anew after every `at_once` removals; `leverage`
   w_jᵀ(WWᵀ + λI)⁻¹w_j, which needs no data; `energy` ‖W_g‖² · E[x_g²]; `random` to compare.
3. Mask tuning by least squares (`tune`): `full` W' = W C_:S (C_SS + λI)⁻¹, C from the inputs in the compressed
   model; `scales` one factor a group, as FPT; `none`. `supervise`: `prefix` wants the outputs of the dense matrix on
   those inputs, `outputs` the outputs it has in the dense model, so that drift is corrected: W C_fx (C_xx + λI)⁻¹ in
   the place of W, by `supervise_frac` of the way.
4. Beyond the paper, and off unless asked for (`learn_rounds`): gradients through one block pull its output back to the
   dense one's on the same inputs, all its weights learning together.

Cost: four forwards of the text, and for every split on trial three of a part of it; two Gram matrices, a factor and
2·R·I² operations a block for R removed columns. Memory: one block, and the hidden states of the text. Learning takes a
forward and a backward of `learn_rounds` · `samples` windows.

    niwaki compress MODEL OUT --method comp --target 0.3 --calibration mine.txt --seq-len 512
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.recipe import KeepUnits, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.record import Packed
from niwaki.methods.cost import FLOAT_BYTES, Scope, Work, gram_factors, products
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.block_training import Reconstruction, Schedule, descend, learning_cost, learning_needs
from niwaki.methods.shared.column_sweep import check_damping, inverse
from niwaki.methods.shared.rounding import damped
from niwaki.methods.shared.unit_pruning import (
    Choice,
    by_group,
    fit,
    kept_of,
    remove,
    scaled,
    unit_by_unit,
    unreached,
    without,
)
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, ShapeSearch, ShapeSpace

SCORES = ("surgeon", "energy", "leverage", "random")
TUNES = ("full", "scales", "none")
SUPERVISIONS = ("prefix", "outputs")
AT_ONCE_SHARE = 64
HEAD_STEPS = 8  # from all heads to none, where a model has more groups of them


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of COMP."""

    score: Annotated[str, "Score of a group of columns: surgeon, energy, leverage or random."] = "surgeon"
    tune: Annotated[str, "How the kept weights are refitted: full, one scale per group (scales), or none."] = "full"
    supervise: Annotated[
        str,
        "Outputs to preserve: those of the dense matrix on the compressed model's inputs (prefix), "
        "or those in the dense model (outputs).",
    ] = "prefix"
    supervise_frac: Annotated[float, "Share of the way from the dense weights to the supervised ones."] = 1.0
    at_once: Annotated[int, "Neurons that are removed before the scores are computed again; 0 for 1/64 of them."] = 0
    try_blocks: Annotated[int, "Max blocks that the search removes."] = 8
    try_heads: Annotated[int, "Max steps, each an eighth of the heads, that the search removes."] = 8
    multiple: Annotated[int, "Divisor of the number of neurons; 0 for 8, or 256 in large models."] = 0
    damping_frac: Annotated[float, "A share of the mean diagonal of XᵀX, added to the diagonal (λ)."] = 0.01
    learn_rounds: Annotated[int, "Rounds of block-wise learning (not in the paper)."] = 0
    samples: Annotated[int, "Windows per round of learning."] = 32
    batch: Annotated[int, "Windows per step."] = 2
    rate_frac: Annotated[float, "Length of a step as a share of the RMS of a matrix."] = 0.004

    def __post_init__(self) -> None:
        for name, known in (("score", SCORES), ("tune", TUNES), ("supervise", SUPERVISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if min(self.try_blocks, self.try_heads, self.multiple, self.at_once) < 0:
            raise ValueError("expected try_blocks, try_heads, multiple and at_once ≥ 0")
        if self.learn_rounds < 0 or min(self.samples, self.batch) < 1 or not 0 < self.rate_frac < 1:
            raise ValueError("expected learn_rounds ≥ 0, samples and batch ≥ 1, 0 < rate_frac < 1")
        if not 0 < self.supervise_frac <= 1:
            raise ValueError(f"supervise_frac must lie in (0, 1], got {self.supervise_frac}")
        check_damping(self.damping_frac)


def needs(config: Config) -> Needs:
    """Gram matrices of the inputs, with those of the dense model if it supervises; windows to learn from."""
    full = config.supervise == "outputs"
    learning = learning_needs(config.batch, "block") if config.learn_rounds else Needs()
    return Needs(gram=True, full=full, dense=full) | learning


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """Descent from all blocks and heads: one block or one step of heads less, as long as that lowers the loss."""
    order = sorted(range(len(sizes)), key=lambda index: looks[index].influence)
    legal = sizes.legal_heads()
    legal = legal[:: math.ceil(len(legal) / HEAD_STEPS)][: config.try_heads + 1]
    most = min(config.try_blocks, len(sizes) - 1)
    corners = {
        (blocks, step): shape
        for blocks in range(most + 1)
        for step, heads in enumerate(legal)
        if (shape := sizes.fitting(removed_frac, heads, sorted(order[:blocks]), config.multiple))
    }
    if not corners:
        return None
    here, least = min(corners, key=sum), math.nan
    while near := [at for at in ((here[0] + 1, here[1]), (here[0], here[1] + 1)) if at in corners]:
        if math.isnan(least):
            (least,) = yield [corners[here]]
        losses = yield [corners[at] for at in near]
        if min(losses) >= least:
            break
        least = min(losses)
        here = near[losses.index(least)]
    return corners[here]


def cost(scope: Scope, config: Config) -> Work:
    """For the matrices that alone read their input: H⁻¹, and the removal of what goes, or a fit of what stays."""
    alone = Scope(tuple(group for group in scope.groups if len(group) == 1), scope.windows, scope.tokens)
    learned = learning_cost(scope, config.learn_rounds, config.samples, config.batch)
    inverses = replace(gram_factors(alone), held_bytes=2 * FLOAT_BYTES * max(alone.inputs, default=0) ** 2)
    return inverses + products(alone, 2 if config.score == "surgeon" else 3) + learned


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Chooses groups and refits the matrix that reads them, unit by unit."""

    def choose(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> Choice:
        if not statistics.tokens:
            return unreached(keep, weight_OI)
        wanted_OI = _wanted(weight_OI, statistics, config)
        return Choice(*_choose(wanted_OI, weight_OI, statistics, keep, config, generator))

    with torch.no_grad():
        found = unit_by_unit(block, calib, targets, choose)
    # A shape on trial is judged without learning: its stream keeps no outputs to learn from.
    if not config.learn_rounds or calib.stream is None or calib.stream.outputs is None:
        return found
    return _learned(block, calib, found, config, generator)


def _learned(
    block: Block, calib: CalibrationData, found: Mapping[str, Packed], config: Config, generator: torch.Generator
) -> dict[str, Packed]:
    """The records after block-wise learning; what is gone stays gone."""
    start = {name: record.weight_OI for name, record in found.items()}
    keep = {name: w_OI.any(1, keepdim=True) & w_OI.any(0, keepdim=True) for name, w_OI in start.items()}
    reached = any(calib.statistics[name].tokens for name in found)
    if not reached or not any(bool(kept_OI.any()) for kept_OI in keep.values()):
        return dict(found)
    schedule = Schedule(
        rounds=config.learn_rounds,
        samples=config.samples,
        batch=config.batch,
        rate_frac=config.rate_frac,
        optimizer="adam",
    )
    weights, errors = descend(Reconstruction(block, calib, "block", generator), start, keep, schedule, generator)
    return {
        name: replace(record, weight_OI=weights[name], detail={**record.detail, **errors.detail})
        for name, record in found.items()
    }


def _wanted(weight_OI: Tensor, statistics: Statistics, config: Config) -> Tensor:
    """The matrix whose outputs are to survive."""
    if config.supervise == "prefix":
        return weight_OI
    damped_II = damped(statistics.gram_II, config.damping_frac)
    cross_II = statistics.full_II[1].clone()
    cross_II.diagonal().add_(damped_II.diagonal() - statistics.gram_II.diagonal())  # λ pulls to W itself
    pulled_OI = torch.cholesky_solve((weight_OI @ cross_II).T, torch.linalg.cholesky(damped_II)).T
    return weight_OI + config.supervise_frac * (pulled_OI - weight_OI)


def _choose(
    wanted_OI: Tensor,
    weight_OI: Tensor,
    statistics: Statistics,
    keep: KeepUnits,
    config: Config,
    generator: torch.Generator,
) -> tuple[list[int], Tensor]:
    """The groups that stay, and the matrix for them."""
    inverse_II, damping_frac = inverse(statistics.gram_II, config.damping_frac)
    if config.score == "surgeon":
        asked = config.at_once if keep.unit.kind == "neurons" else 1
        at_once = asked or max(1, keep.unit.count // AT_ONCE_SHARE)
        kept, found_OI = remove(wanted_OI, inverse_II, keep.unit, keep.count, at_once)
        if config.tune == "full":
            return kept, found_OI
    else:
        scores_I = _scores(weight_OI, statistics, config, generator)
        kept = kept_of(by_group(scores_I, keep.unit), keep.count)
    damped_II = damped(statistics.gram_II, damping_frac)
    if config.tune == "full":
        return kept, fit(wanted_OI, damped_II, kept, keep.unit)
    if config.tune == "scales":
        return kept, scaled(wanted_OI, damped_II, kept, keep.unit)
    return kept, without(wanted_OI, keep, kept)


def _scores(weight_OI: Tensor, statistics: Statistics, config: Config, generator: torch.Generator) -> Tensor:
    """How much every column [I] is worth."""
    if config.score == "random":
        return torch.rand(weight_OI.shape[1], generator=generator).to(weight_OI.device)
    if config.score == "energy":
        return weight_OI.square().sum(0) * statistics.sqnorm_I
    outer_OO = weight_OI @ weight_OI.T
    outer_OO.diagonal().add_(config.damping_frac * outer_OO.diagonal().mean())
    solved_OI: Tensor = torch.linalg.solve(outer_OO, weight_OI)
    return (weight_OI * solved_OI).sum(0)


METHOD = ShapeMethod(
    doc=__doc__,
    paper="COMP (arXiv 2501.15255), a reconstruction",
    accepts=(Sparsity,),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
    search=search,
    multiple=lambda config: config.multiple,
)
