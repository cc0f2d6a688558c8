"""Squeeze10-LLM: most columns at one bit, the salient ones at four, staged through four bits.

Source: "Squeeze10-LLM: Squeezing LLMs' Weights by 10 Times via a Staged Mixed-Precision Quantization Method"
(arXiv 2507.18073). Only its abstract and introduction could be read: a reconstruction, every choice an option.

1. Stage 1 rounds everything to 4 bits (`staged`), a buffer before the loss of one bit.
2. Post-binarization activation robustness (PBAR) estimates the columns that would suffer from one bit (`choose`). Its
   formula is not verified.
3. One error-compensated sweep rounds the columns at their widths, the salient ones first or last (`salient_first`).
4. Full-information activations supervise (FIAS, `supervise`); this formula is not verified either.

| `choose` | score of a column j; W₄ is from stage 1, B its one-bit form |
| --- | --- |
| `robustness` | Σ(W₄ − B)²·H_jj |
| `surgeon` | Σ(W₄ − B)²/[H⁻¹]_jj |
| `activation` | H_jj, for comparison |
| `magnitude` | ΣW², for comparison |
| `random` | for comparison |

| `supervise` | error to minimize; F and X are the inputs in the full and in the compressed model |
| --- | --- |
| `prefix` | ‖(W − Q)X‖: each block makes up for those before it, as far as its own columns can |
| `inputs` | ‖(W − Q)F‖ |
| `outputs` | ‖WF − QX‖, which is `prefix` for the weights W·FXᵀ(XXᵀ)⁻¹ |

`supervise_frac` goes a part of the way from W to those weights. Learning has a `target` of its own.

Three things are not in the paper. `rounds` refit the scales, with coordinate descent on all codes. `learn_rounds` learn
codes and scales block by block (`learned_rounding`). `widths` may be other than 1 and 4 bits. Of the energy of normal
weights one bit loses 36 %, two bits 12 % and four 1 %. So a second bit for three columns gains twice as much as three
more bits for one column. `auto` takes the two neighboring widths around the target.

Whole columns are chosen, so that the choice costs one bit per column. The target counts everything that is stored
(codes, scales, offsets, the mask of columns) and decides how many columns are salient. With `granularity=element` the
weights are chosen one by one, and the mask costs one bit per weight. It exists for comparison (see `element_bits`).

`salient_frac=0.2` is the published split without a target: a fifth of the columns at four bits, the others at one. The
average bits follow, scales and mask included. A target beside it is a ceiling.

Cost: two forwards, one Gram matrix and factor per group of matrices, another factor, two sweeps and `rounds` + 1
passes per matrix. With learning also `learn_rounds` · `samples` forwards and backwards of a window.

    niwaki compress MODEL OUT --method squeeze10 --target 1.75bit --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.errors import TargetError
from niwaki.formats.packed import Packed, join_notes
from niwaki.formats.quantized import TILE
from niwaki.methods.cost import Scope, Work, gram_factors, sweeps
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.block_training import Reconstruction, Schedule
from niwaki.methods.shared.column_sweep import check_damping, inverse_factor, pull_to_dense
from niwaki.methods.shared.element_bits import element_bits, pack_elements, salient_elements
from niwaki.methods.shared.learned_rounding import KEPT_START, Latent, code_learning_cost, code_learning_needs, learn
from niwaki.methods.shared.learning_options import (
    Ahead,
    LearningTarget,
    LogitDivergence,
    Reconstruct,
    check_learning_options,
)
from niwaki.methods.shared.rounding import (
    ROUNDED_UNREACHED,
    Group,
    damped,
    grids,
    groups_of,
    improve,
    nearest,
    round_by_sweep,
    rounds_of,
)
from niwaki.model.decoder import Block

CHOICES = ("robustness", "surgeon", "activation", "magnitude", "random")
SUPERVISIONS = ("prefix", "inputs", "outputs")
WIDTHS = {"auto": ((1, 2), (2, 3), (3, 4)), "1+2": ((1, 2),), "1+3": ((1, 3),), "1+4": ((1, 4),)}
GRANULARITIES = ("column", "element")
STAGE_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of Squeeze10-LLM."""

    choose: Annotated[str, "Score of a column: robustness, surgeon, activation, magnitude or random."] = "robustness"
    choose_columns: Annotated[int, "Neighboring columns that are chosen together: 1, 2, 4 or 8."] = 1
    staged: Annotated[bool, "Round everything to 4 bits first."] = True
    salient_first: Annotated[bool, "Sweep the salient columns first; false sweeps them last."] = True
    salient_frac: Annotated[
        float,
        "Share of the salient columns, or weights; the bits follow, and no target is needed (0.2 in the paper). 0 lets "
        "the target decide.",
    ] = 0.0
    widths: Annotated[
        str,
        "Bits of the other and of the salient columns: 1+2, 1+3, 1+4, or auto: neighbors around the target, 1+4 with "
        "salient_frac.",
    ] = "auto"
    granularity: Annotated[str, "What is chosen: columns, or single weights (element, for comparison only)."] = "column"
    supervise: Annotated[
        str,
        "Outputs to preserve: those of the dense matrix on the compressed model's inputs (prefix) or on the dense "
        "model's (inputs), or those in the dense model (outputs).",
    ] = "prefix"
    supervise_frac: Annotated[float, "Share of the way from the dense weights to the supervised ones."] = 1.0
    group: Annotated[int, "Columns of the lower width that share a scale; 0 for all of them."] = 0
    salient_group: Annotated[int, "Salient columns that share a scale; 0 for all of them."] = 0
    mean: Annotated[bool, "Put one-bit levels around a stored mean instead of zero."] = True
    rounds: Annotated[int, "Rounds of refitted scales and coordinate descent on the codes (not in the paper)."] = 8
    damping_frac: Annotated[float, "A share of the mean diagonal of XᵀX, added to the diagonal (λ)."] = 0.01
    learn_rounds: Annotated[int, "Rounds of block-wise learning of codes and scales (not in the paper)."] = 8
    samples: Annotated[int, "Windows per round of learning."] = 32
    batch: Annotated[int, "Windows per step."] = 2
    rate_frac: Annotated[float, "Length of a step as a share of the RMS of a parameter."] = 0.005
    target: LearningTarget = "both"
    reconstruct: Reconstruct = "block"
    ahead: Ahead = 0
    kl: LogitDivergence = 0.0

    def __post_init__(self) -> None:
        check_learning_options(self.target, reconstruct=self.reconstruct, ahead=self.ahead, kl=self.kl)
        for name, known in (
            ("choose", CHOICES),
            ("supervise", SUPERVISIONS),
            ("widths", WIDTHS),
            ("granularity", GRANULARITIES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.salient_frac < 1:
            raise ValueError(f"salient_frac must lie between 0 and 1, got {self.salient_frac}")
        if self.granularity == "element" and (self.splits[0] != (1, 4) or self.rounds or self.learn_rounds):
            raise ValueError(
                "granularity=element is the paper's claim alone: it needs widths=1+4, rounds=0 and learn_rounds=0"
            )
        if self.choose_columns not in (1, 2, 4, 8):  # the budget counts columns in bytes
            raise ValueError(f"choose_columns must be 1, 2, 4 or 8, got {self.choose_columns}")
        if min(self.group, self.salient_group, self.rounds, self.learn_rounds) < 0:
            raise ValueError("expected group, salient_group, rounds and learn_rounds ≥ 0")
        if self.samples < 1 or self.batch < 1 or self.rate_frac <= 0:
            raise ValueError("expected samples and batch ≥ 1, rate_frac > 0")
        if not 0 < self.supervise_frac <= 1:
            raise ValueError(f"supervise_frac must lie in (0, 1], got {self.supervise_frac}")
        check_damping(self.damping_frac)

    @property
    def splits(self) -> tuple[tuple[int, int], ...]:
        """Return the widths of the other and of the salient columns that a target may choose from, ascending."""
        published = self.widths == "auto" and self.salient_frac
        return WIDTHS["1+4" if published else self.widths]


def needs(config: Config) -> Needs:
    """Ask for Gram matrices of the inputs, also of the dense model if it supervises, and windows to learn from."""
    full = config.supervise != "prefix"
    return Needs(gram=True, full=full, dense=full) | code_learning_needs(config)


def stored_bytes(name: str, rows: int, columns: int, target: Target, config: Config) -> int | None:
    """Return the bytes of codes, scales and the mask of columns; None for a choice by element, stored as weights."""
    if config.granularity == "element":
        _element_count(rows, columns, target, config, f"{name}: ")
        return None
    return split_columns(rows, columns, target, config, f"{name}: ").nbytes(rows, columns, config)


def cost(scope: Scope, config: Config) -> Work:
    """Count a factor per group and per matrix, two sweeps, rounds on the codes, and learning."""
    own = gram_factors(Scope(tuple((matrix,) for matrix in scope.matrices), scope.windows, scope.tokens))
    sweeping = (sweeps(scope) + grids(scope, clip=True)) * 2
    learned = code_learning_cost(scope, config)
    return gram_factors(scope) + own + sweeping + rounds_of(scope, config.rounds) + learned


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Choose, sweep and improve matrix by matrix, then learn the block as a whole."""
    latents: dict[str, Latent] = {}
    packed: dict[str, Packed] = {}
    detail: dict[str, dict[str, float]] = {}
    for names in block.anatomy.sharing(targets):
        problem = RoundingProblem.of(calib.statistics[names[0]], config)
        for name in names:
            weight_OI = block.weight(name).float()
            if config.granularity == "element":
                packed[name] = _by_element(weight_OI, problem, targets[name], config, generator)
                continue
            rows, columns = weight_OI.shape
            split = split_columns(rows, columns, targets[name], config, f"block {block.index} {name}: ")
            latents[name] = _squeeze(weight_OI, problem, split, config, generator)
            detail[name] = {"salient_columns": split.count}
    rounded = {name: latent.rounded for name, latent in latents.items()}
    note = ""
    if config.learn_rounds and any(calib.statistics[name].tokens for name in targets):
        task = Reconstruction(
            block, calib, config.target, generator, config.reconstruct, ahead=config.ahead, kl=config.kl
        )
        rounded, best = learn(task, latents, Schedule.of(config, config.learn_rounds), generator)
        note = "" if best.improved else KEPT_START
        for name in targets:
            detail[name] |= best.detail
    for name, codes in rounded.items():
        unreached = "" if calib.statistics[name].tokens else ROUNDED_UNREACHED
        packed[name] = Packed.codes(
            codes.parts(latents[name].groups.order_I), join_notes(note, unreached), detail[name]
        )
    return packed


@dataclass(frozen=True)
class RoundingProblem:
    """Objective of a group of matrices with the same input: ‖(W·pull − Q)X‖², H = XᵀX + λI (`damped_II`), H⁻¹ = UᵀU."""

    gram_II: Tensor
    damping_frac: float
    damped_II: Tensor
    upper_II: Tensor
    pull_II: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, statistics: Statistics, config: Config) -> "RoundingProblem | None":
        """Return the problem of a group, None if no token reached it."""
        if not statistics.tokens:
            return None
        gram_II = statistics.full_II[0] if config.supervise == "inputs" else statistics.gram_II
        upper_II, damping_frac = inverse_factor(gram_II, config.damping_frac)
        damped_II, pull_II = damped(gram_II, damping_frac), None
        if config.supervise == "outputs":
            pull_II = pull_to_dense(statistics.full_II[1], gram_II, damped_II, config.supervise_frac)
        return cls(gram_II, damping_frac, damped_II, upper_II, pull_II)

    def wanted(self, weight_OI: Tensor) -> Tensor:
        """Return the weights to approximate."""
        return weight_OI if self.pull_II is None else weight_OI @ self.pull_II


@dataclass(frozen=True)
class Split:
    """Widths of the columns of a matrix: `count` have `salient_bits`, all others `base_bits`."""

    base_bits: int
    salient_bits: int
    count: int

    def groups(self, columns: int, config: Config) -> list[Group]:
        """Return the groups that share scales, in the order of the sweep."""
        grid = "free" if config.mean and self.base_bits == 1 else "midrise"
        if config.salient_first:
            salient = groups_of(0, self.count, self.salient_bits, "midrise", config.salient_group)
            return salient + groups_of(self.count, columns, self.base_bits, grid, config.group)
        base = groups_of(0, columns - self.count, self.base_bits, grid, config.group)
        return base + groups_of(columns - self.count, columns, self.salient_bits, "midrise", config.salient_group)

    def nbytes(self, rows: int, columns: int, config: Config) -> int:
        """Return the bytes of a matrix, as `Packed.nbytes` counts them."""
        base = columns - self.count
        widths = self.salient_bits * -(-self.count // 8) + self.base_bits * -(-base // 8)
        groups = -(-base // (config.group or columns)) * (2 if config.mean and self.base_bits == 1 else 1)
        groups += -(-self.count // (config.salient_group or columns))
        mask = -(-columns // 8) if self.count and base else 0
        return -(-rows // TILE) * TILE * widths + 2 * rows * groups + mask


def split_columns(rows: int, columns: int, target: Target, config: Config, name: str = "") -> Split:
    """Return the split with the most salient columns within the target, everything counted (a multiple of 8).

    Of several widths the widest that fit are taken. Raises TargetError, which begins with `name`, if the narrowest
    width for all columns does not fit. With `salient_frac` the share alone decides.
    """
    if config.salient_frac:
        return named_split(columns, config)
    assert isinstance(target, Bits)
    budget_bytes = target.bytes_in(rows, columns)
    counts = [*range(0, columns, 8), columns]
    splits = [Split(*widths, count) for widths in config.splits for count in counts]
    fitting = [split for split in splits if split.nbytes(rows, columns, config) <= budget_bytes]
    if not fitting:
        needed = min_bits(rows, columns, config)
        raise TargetError(
            f"{name}target {target}: a {rows}×{columns} matrix needs at least {needed:.3f} bits with these groups: "
            "raise the target, or widen group"
        )
    return fitting[-1]


def named_split(columns: int, config: Config) -> Split:
    """Return the split that `salient_frac` names."""
    together = config.choose_columns
    count = round(config.salient_frac * columns / together) * together
    return Split(*config.splits[0], min(count, columns))


def named_bits(rows: int, columns: int, config: Config) -> float | None:
    """Return the bits per weight that `salient_frac` gives a matrix, everything counted; None if a target decides."""
    if not config.salient_frac:
        return None
    if config.granularity == "element":
        return element_bits(rows, columns, _named_elements(rows, columns, config))
    return 8 * named_split(columns, config).nbytes(rows, columns, config) / (rows * columns)


def min_bits(rows: int, columns: int, config: Config) -> float:
    """Return the bits per weight of a matrix without any salient column, or weight."""
    if config.granularity == "element":
        return element_bits(rows, columns, 0)
    base_bits, salient_bits = config.splits[0]
    return 8 * Split(base_bits, salient_bits, 0).nbytes(rows, columns, config) / (rows * columns)


@torch.no_grad()
def _squeeze(
    weight_OI: Tensor, problem: RoundingProblem | None, split: Split, config: Config, generator: torch.Generator
) -> Latent:
    """Choose the salient columns of one matrix and round it."""
    columns = weight_OI.shape[1]
    groups = split.groups(columns, config)
    if problem is None:
        order_I = torch.arange(columns, device=weight_OI.device)
        return Latent.start(nearest(weight_OI, groups, clip=True).storable(), weight_OI, order_I)
    weight_OI = problem.wanted(weight_OI)
    start_OI = _four_bit_stage(weight_OI, problem, config)
    scores_I = _scores(start_OI, problem, split.base_bits, config, generator)
    best_I = _sum_neighbors(scores_I, config.choose_columns).argsort(descending=True, stable=True)
    parts = [best_I[: split.count].sort().values, best_I[split.count :].sort().values]
    order_I = torch.cat(parts if config.salient_first else parts[::-1])
    upper_II, _ = inverse_factor(problem.gram_II[order_I][:, order_I], problem.damping_frac)
    swept_OI = start_OI if config.staged else weight_OI
    rounded = round_by_sweep(swept_OI[:, order_I].contiguous(), upper_II, groups, clip=True)
    ordered_OI, ordered_II = weight_OI[:, order_I].contiguous(), problem.damped_II[order_I][:, order_I].contiguous()
    return Latent.start(improve(rounded, ordered_OI, ordered_II, config.rounds), ordered_OI, order_I)


def _four_bit_stage(weight_OI: Tensor, problem: RoundingProblem, config: Config) -> Tensor:
    """Return W₄ of stage 1, or the weights themselves if no option uses it."""
    if not config.staged and config.choose not in ("robustness", "surgeon"):
        return weight_OI
    whole = groups_of(0, weight_OI.shape[1], STAGE_BITS, "midrise", config.salient_group)
    return round_by_sweep(weight_OI, problem.upper_II, whole, clip=True).values_OI


@torch.no_grad()
def _by_element(
    weight_OI: Tensor, problem: RoundingProblem | None, target: Target, config: Config, generator: torch.Generator
) -> Packed:
    """Round with a choice of single weights, for comparison: one sweep, stored as decoded weights."""
    count = _element_count(weight_OI.shape[0], weight_OI.shape[1], target, config)
    if problem is None:
        return pack_elements(weight_OI, None, weight_OI.square(), count)
    weight_OI = problem.wanted(weight_OI)
    start_OI = _four_bit_stage(weight_OI, problem, config)
    scores_OI = _element_scores(start_OI, problem, 1, config, generator)
    return pack_elements(start_OI if config.staged else weight_OI, problem.upper_II, scores_OI, count)


def _element_count(rows: int, columns: int, target: Target, config: Config, name: str = "") -> int:
    """Return the number of single weights at four bits. Raises TargetError, which begins with `name`."""
    if config.salient_frac:
        return _named_elements(rows, columns, config)
    return salient_elements(rows, columns, target, name)


def _named_elements(rows: int, columns: int, config: Config) -> int:
    return round(config.salient_frac * rows * columns)


def robustness(weight_OI: Tensor, statistics: Statistics, config: Config) -> Tensor:
    """Return PBAR of each column [I]: the energy of the outputs that one bit would lose, by stage 1 and its scores."""
    problem = RoundingProblem.of(statistics, config)
    assert problem is not None, "no token reached this matrix"
    start_OI = _four_bit_stage(weight_OI, problem, config)
    return _scores(start_OI, problem, 1, config, torch.Generator())


def coarse_form(weight_OI: Tensor, scores_I: Tensor, config: Config) -> Tensor:
    """Return the matrix with the named share of its columns at the higher width, all rounded to nearest at once."""
    split = named_split(len(scores_I), config)
    order_I = scores_I.argsort(descending=True, stable=True)
    rounded = nearest(weight_OI[:, order_I].contiguous(), split.groups(len(order_I), config), clip=True)
    return torch.empty_like(weight_OI).index_copy_(1, order_I, rounded.values_OI)


def _sum_neighbors(scores_I: Tensor, width: int) -> Tensor:
    """Return the sum of the scores of every `width` neighbors, for each of them; the last group may be shorter."""
    numbers_I = torch.arange(len(scores_I), device=scores_I.device) // width
    sums = scores_I.new_zeros(int(numbers_I[-1]) + 1).index_add_(0, numbers_I, scores_I)
    return sums[numbers_I]


def _scores(
    weight_OI: Tensor, problem: RoundingProblem, bits: int, config: Config, generator: torch.Generator
) -> Tensor:
    """Return the score of each column [I]: how much it would suffer from `bits`."""
    if config.choose == "activation":
        return problem.damped_II.diagonal()
    if config.choose == "random":
        return torch.rand(weight_OI.shape[1], generator=generator).to(weight_OI.device)
    return _element_scores(weight_OI, problem, bits, config, generator).sum(0)


def _element_scores(
    weight_OI: Tensor, problem: RoundingProblem, bits: int, config: Config, generator: torch.Generator
) -> Tensor:
    """Return the score of each weight [O, I]: how much it would suffer from `bits`."""
    if config.choose == "activation":
        return problem.damped_II.diagonal() * weight_OI.abs()
    if config.choose == "random":
        return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
    if config.choose == "magnitude":
        return weight_OI.square()
    grid = Group(0, weight_OI.shape[1], bits, "free" if config.mean and bits == 1 else "midrise")
    lost_OI = (weight_OI - nearest(weight_OI, [grid], clip=True).values_OI).square()
    if config.choose == "robustness":
        return lost_OI * problem.damped_II.diagonal()
    return lost_OI / problem.upper_II.square().sum(0)  # the diagonal of H⁻¹ = UᵀU


METHOD = WalkMethod(
    doc=__doc__,
    paper="Squeeze10-LLM (arXiv 2507.18073), a reconstruction",
    accepts=(Bits,),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
    stored_bytes=stored_bytes,
    group=lambda config: config.group,
    min_bits=min_bits,
    named_bits=named_bits,
)
