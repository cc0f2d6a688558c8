"""COMP: fewer blocks, heads and neurons, and least squares on what is left; no training.

Source: "COMP" (arXiv 2501.15255). Only its abstract could be read: a reconstruction, every choice an option.

1. Whole blocks go by importance, here 1 − cos(h_in, h_out), as in ShortGPT. The numbers of blocks and of groups of
   heads that go are not fixed; neurons make up for the rest of the budget. `search` starts with all blocks and heads,
   and tries to remove one more of either (`try_blocks`, `try_heads`). A candidate is compressed on a part of the
   calibration text, and taken if that lowers the loss on another part. One cosine alone has let models collapse
   (perplexity 3419 instead of 5.8 on Llama-3.1-8B at 25 %, by the authors of Týr).
2. Neurons, and groups of heads that share a key and a value, go by a score of the conditioning of the rest (`score`).
   The paper's formula is not verified.
3. Least squares tune the kept weights (`tune`). C are the second moments of the inputs x in the compressed model, C_fx
   those with the inputs f in the dense model.
4. Not in the paper: with `--allocation damage` each block has widths of its own. One walk measures the rise of the
   loss for each unit that is pruned alone, and more goes where that costs less.
5. Not in the paper, and off by default (`learn_rounds`): gradients through one block pull its output back to the dense
   one's on the same inputs. All its weights learn together.

| `score` | of the columns g of the matrix W that writes to the residual stream |
| --- | --- |
| `surgeon` | tr(W_g [H⁻¹]_gg⁻¹ W_gᵀ), computed again after every `at_once` removals |
| `gram_condition` | condition of the Gram matrix of all other inputs, scaled by their columns' norms; again as above |
| `weight_condition` | condition of W_S W_Sᵀ + λI for all other columns S, which needs no data; again as above |
| `pca` | energy of W_g x_g in the first principal components of all such parts, as many as groups stay |
| `leverage` | w_jᵀ(WWᵀ + λI)⁻¹w_j, which needs no data |
| `energy` | ‖W_g‖² · E[x_g²] |
| `random` | for comparison |

| `tune` | kept weights, kept columns S |
| --- | --- |
| `full` | W C_:S (C_SS + λI)⁻¹ |
| `scales` | one factor per group, as in FPT |
| `none` | unchanged |

`supervise=prefix` preserves the outputs of the dense matrix on x. `supervise=outputs` preserves its outputs on f, so
that drift is corrected: W C_fx (C_xx + λI)⁻¹ takes the place of W, by `supervise_frac` of the way.

Cost: four forwards of the text, and three of a part of it for every candidate. Per block two Gram matrices, a factor
and 2·R·I² operations for R removed columns. Learning takes a forward and a backward of `learn_rounds` · `samples`
windows. Memory: one block, and the hidden states of the text.

    niwaki compress MODEL OUT --method comp --target 0.3 --calibration mine.txt --seq-len 512
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import KeepUnits, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.methods.cost import FLOAT_BYTES, Scope, Work, gram_factors, products
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.block_training import Reconstruction, Schedule, train_block
from niwaki.methods.shared.column_sweep import check_damping, inverse
from niwaki.methods.shared.learning_options import (
    LearningTarget,
    LogitDivergence,
    Reconstruct,
    check_learning_options,
    learning_cost,
    learning_needs,
)
from niwaki.methods.shared.rounding import damped
from niwaki.methods.shared.unit_pruning import (
    PrunedUnit,
    compress_units,
    fit_kept,
    fit_scales,
    highest_groups,
    prune_by_weights,
    remove_groups,
    sum_by_group,
    zero_other_groups,
)
from niwaki.methods.shared.unit_scores import gram_condition_costs, keep_conditioned, principal_energy
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, ShapeSearch, ShapeSpace

SCORES = ("surgeon", "gram_condition", "weight_condition", "pca", "energy", "leverage", "random")
PRODUCTS = {"surgeon": 2, "weight_condition": 12}  # with the Gram matrix; 3 for all others
TUNES = ("full", "scales", "none")
SUPERVISIONS = ("prefix", "outputs")
AT_ONCE_SHARE = 64
HEAD_STEPS = 8  # from all heads to none, where a model has more groups of them


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of COMP."""

    score: Annotated[str, f"Score of a group of columns: {', '.join(SCORES)}."] = "surgeon"
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
    samples: Annotated[int, "Windows per round of learning."] = 64
    batch: Annotated[int, "Windows per step."] = 4
    rate_frac: Annotated[float, "Length of a step as a share of the RMS of a matrix."] = 0.008
    target: LearningTarget = "both"
    reconstruct: Reconstruct = "block"
    kl: LogitDivergence = 0.0

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
        check_learning_options(self.target, reconstruct=self.reconstruct, kl=self.kl)


def needs(config: Config) -> Needs:
    """Ask for Gram matrices of the inputs, also of the dense model if it supervises, and windows to learn from."""
    full = config.supervise == "outputs"
    learning = learning_needs(config.batch, config.target, kl=config.kl) if config.learn_rounds else Needs()
    return Needs(gram=True, full=full, dense=full) | learning


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """Search the grid of removed blocks and steps of heads: go to the neighbor with the lower loss until none is lower.

        heads removed      A  the corner with the least removed that meets the budget
        2 │ .   .   .      B  one block more    ─ both are tried; the lower loss wins
        1 │ C   .   .      C  one step of heads more
        0 │ A ─ B   .      The budget fixes the neurons of every point.
          └─────────── blocks removed

    Yield the shapes to try and receive their losses. Return None if no shape meets the budget.
    """
    order = sorted(range(len(sizes)), key=lambda index: looks[index].influence)
    legal_heads = sizes.legal_heads()
    steps = legal_heads[:: math.ceil(len(legal_heads) / HEAD_STEPS)][: config.try_heads + 1]
    max_blocks = min(config.try_blocks, len(sizes) - 1)
    max_blocks = 0 if max_blocks and sizes.drop_problem else max_blocks
    shapes = {
        (blocks, step): shape
        for blocks in range(max_blocks + 1)
        for step, heads in enumerate(steps)
        if (shape := sizes.fitting(removed_frac, heads, sorted(order[:blocks]), config.multiple))
    }

    def neighbors(place: tuple[int, int]) -> list[tuple[int, int]]:
        return [near for near in ((place[0] + 1, place[1]), (place[0], place[1] + 1)) if near in shapes]

    if not shapes:
        return None
    place = min(shapes, key=sum)
    if not neighbors(place):
        return shapes[place]
    (lowest,) = yield [shapes[place]]
    while near := neighbors(place):
        losses = yield [shapes[other] for other in near]
        if min(losses) >= lowest:
            break
        lowest = min(losses)
        place = near[losses.index(lowest)]
    return shapes[place]


def cost(scope: Scope, config: Config) -> Work:
    """Count H⁻¹ and the removal or the fit, for the matrices that alone read their input, and the learning."""
    alone = Scope(tuple(group for group in scope.groups if len(group) == 1), scope.windows, scope.tokens)
    learned = learning_cost(
        scope, config.learn_rounds, config.samples, config.batch, reconstruct=config.reconstruct, kl=config.kl
    )
    inverses = replace(gram_factors(alone), held_bytes=2 * FLOAT_BYTES * max(alone.inputs, default=0) ** 2)
    return inverses + products(alone, PRODUCTS.get(config.score, 3)) + learned


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Choose groups and refit the matrix that reads them, unit by unit; then learn, if the options say so."""

    def prune(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> PrunedUnit:
        if not statistics.tokens:
            return prune_by_weights(keep, weight_OI)
        wanted_OI = _supervised(weight_OI, statistics, config)
        return PrunedUnit(*_prune(wanted_OI, weight_OI, statistics, keep, config, generator))

    with torch.no_grad():
        packed = compress_units(block, calib, targets, prune)
    # A candidate shape is evaluated without learning: its stream keeps no outputs to learn from.
    if not config.learn_rounds or calib.stream is None or calib.stream.outputs is None:
        return packed
    return _learn(block, calib, packed, config, generator)


def _learn(
    block: Block, calib: CalibrationData, packed: Mapping[str, Packed], config: Config, generator: torch.Generator
) -> dict[str, Packed]:
    """Return the records after block-wise learning; removed rows and columns stay zero."""
    start = {name: record.weight_OI for name, record in packed.items()}
    keep = {name: w_OI.any(1, keepdim=True) & w_OI.any(0, keepdim=True) for name, w_OI in start.items()}
    reached = any(calib.statistics[name].tokens for name in packed)
    if not reached or not any(bool(kept_OI.any()) for kept_OI in keep.values()):
        return dict(packed)
    schedule = Schedule.of(config, config.learn_rounds)
    task = Reconstruction(block, calib, config.target, generator, config.reconstruct, kl=config.kl)
    weights, best = train_block(task, start, keep, schedule, generator)
    return {
        name: replace(record, weight_OI=weights[name], detail={**record.detail, **best.detail})
        for name, record in packed.items()
    }


def _supervised(weight_OI: Tensor, statistics: Statistics, config: Config) -> Tensor:
    """Return the matrix whose outputs the pruned one must preserve."""
    if config.supervise == "prefix":
        return weight_OI
    damped_II = damped(statistics.gram_II, config.damping_frac)
    cross_II = statistics.full_II[1].clone()
    cross_II.diagonal().add_(damped_II.diagonal() - statistics.gram_II.diagonal())  # λ pulls to W itself
    pulled_OI = torch.cholesky_solve((weight_OI @ cross_II).T, torch.linalg.cholesky(damped_II)).T
    return weight_OI + config.supervise_frac * (pulled_OI - weight_OI)


def _prune(
    wanted_OI: Tensor,
    weight_OI: Tensor,
    statistics: Statistics,
    keep: KeepUnits,
    config: Config,
    generator: torch.Generator,
) -> tuple[list[int], Tensor]:
    """Return the groups that stay, and the matrix for them."""
    inverse_II, damping_frac = inverse(statistics.gram_II, config.damping_frac)
    damped_II = damped(statistics.gram_II, damping_frac)
    unit, at_once = keep.unit, config.at_once if keep.unit.kind == "neurons" else 1
    at_once = at_once or max(1, unit.count // AT_ONCE_SHARE)
    if config.score in ("surgeon", "gram_condition"):
        costs = None if config.score == "surgeon" else gram_condition_costs(weight_OI, damped_II, unit)
        kept, pruned_OI = remove_groups(wanted_OI, inverse_II, unit, keep.count, at_once, costs)
        if config.tune == "full":
            return kept, pruned_OI
    elif config.score == "weight_condition":
        kept = keep_conditioned(weight_OI, unit, keep.count, at_once, config.damping_frac)
    elif config.score == "pca":
        kept = highest_groups(principal_energy(weight_OI, statistics.gram_II, unit, keep.count), keep.count)
    else:
        scores_I = _scores(weight_OI, statistics, config, generator)
        kept = highest_groups(sum_by_group(scores_I, unit), keep.count)
    if config.tune == "full":
        return kept, fit_kept(wanted_OI, damped_II, kept, unit)
    if config.tune == "scales":
        return kept, fit_scales(wanted_OI, damped_II, kept, unit)
    return kept, zero_other_groups(wanted_OI, keep, kept)


def _scores(weight_OI: Tensor, statistics: Statistics, config: Config, generator: torch.Generator) -> Tensor:
    """Return the score of every column [I]."""
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
