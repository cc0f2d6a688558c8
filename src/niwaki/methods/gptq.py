"""GPTQ: round column by column and let the remaining columns make up for each error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023),
Algorithm 1. The defaults go beyond it; `clip=false act_order=false rounds=0 damping_frac=0.01` is the published form:

| | Paper | Here |
| --- | --- | --- |
| Scale and zero code | min to max, when the sweep reaches the group | `clip`: least error Σ(w − q)²/U_jj² |
| Order of the columns | from left to right | `act_order`: largest inputs first, on grids fitted before |
| After the sweep | nothing | `rounds` of refitted scales and coordinate descent |
| Damping λ | 1 % of the mean diagonal | `damping_frac`: 3 %, or of least held-out error |

U is the factor of the inverse Gram matrix, H⁻¹ = UᵀU. In the sweep, an error of column j costs (w − q)²/U_jj². The
columns of a group stay neighbors in the file in any order of the sweep.

`learn_rounds` learn codes, scales and zero codes block by block (`learned_rounding`), so that the output of the block
survives. An eighth of the windows is held out and decides which state is kept: the start, if none is better.

With `toward_dense` the sweep starts from weights whose outputs on the compressed inputs are nearest to those in the
dense model. That is the objective of GPTAQ (Li et al. 2025).

A matrix that no token reached is rounded to nearest; its line in blocks.jsonl notes it.

After a pruning method (`sparsegpt+gptq`, target `2:4+4bit`) its zeros stay. The sweep gives a pruned weight the code of
zero only; the error that reached it from the left moves on to the right. Grids are fitted to kept weights alone. The
sweep begins at the weights that the method before left. With `joint` it begins at the dense ones, so that one sweep
makes up for pruning and rounding. That is "Joint Sparsification & Quantization" of SparseGPT; there the mask is chosen
in that pass, here it is given.

Matrices that read the same input are swept together, their rows stacked.

Cost: two forwards, one Gram matrix, one factor and one sweep per group of matrices: O·I² operations for all their rows,
and about half as many for each round. With learning also `learn_rounds` · `samples` forwards and backwards of a window.

    niwaki compress MODEL OUT --method gptq --target 4bit --set group=128 --calibration mine.txt --seq-len 512
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed, join_notes
from niwaki.kernels.codes import sweep_codes
from niwaki.kernels.types import Grid
from niwaki.methods.cost import Scope, Work, gram_factors, sweeps
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.block_training import Reconstruction, Schedule
from niwaki.methods.shared.column_sweep import check_damping, inverse_factor, pull_to_dense
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
    Rounded,
    check_group,
    code_width,
    damped,
    error_propagation,
    grids,
    groups_of,
    improve,
    nearest,
    round_by_sweep,
    rounds_of,
    uniform_bytes,
)
from niwaki.model.decoder import Block

DAMPINGS = (0.03, 0.003, 0.01, 0.1, 0.3)  # the first of equal ones is taken
JUDGED_ROWS = 256  # at least, of the matrices that share a damping


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of GPTQ."""

    group: Annotated[int, "Columns that share a scale; 0 for the whole row."] = 128
    symmetric: Annotated[bool, "Center the levels on zero: no zero codes are stored."] = False
    act_order: Annotated[
        bool, "Round the columns with the largest inputs first, on grids fitted before; false: from left to right."
    ] = True
    clip: Annotated[
        bool, "Search for the scale and zero code that lose least in the sweep; false: from min to max."
    ] = True
    rounds: Annotated[int, "Rounds of refitted scales and coordinate descent on the codes after the sweep."] = 4
    joint: Annotated[bool, "After a pruning method, begin at the dense weights and not at those that it left."] = False
    damping_frac: Annotated[
        float, "A share of the mean diagonal of XᵀX, added to the diagonal (λ); 0 chooses it by held-out tokens."
    ] = 0.03
    toward_dense: Annotated[
        float, "Share of the way to weights whose outputs are those in the dense model, before the sweep (GPTAQ)."
    ] = 0.0
    learn_rounds: Annotated[int, "Rounds of block-wise learning of codes, scales and zero codes; 0 for none."] = 0
    samples: Annotated[int, "Windows per round of learning."] = 32
    batch: Annotated[int, "Windows per step of learning."] = 2
    rate_frac: Annotated[float, "Length of a step of learning as a share of the step between two levels."] = 0.005
    target: LearningTarget = "both"
    reconstruct: Reconstruct = "block"
    ahead: Ahead = 0
    kl: LogitDivergence = 0.0

    def __post_init__(self) -> None:
        if min(self.group, self.rounds, self.learn_rounds) < 0:
            raise ValueError("expected group, rounds and learn_rounds ≥ 0")
        if self.samples < 1 or self.batch < 1 or self.rate_frac <= 0:
            raise ValueError("expected samples and batch ≥ 1, rate_frac > 0")
        check_learning_options(self.target, reconstruct=self.reconstruct, ahead=self.ahead, kl=self.kl)
        if self.damping_frac:
            check_damping(self.damping_frac)
        if not 0 <= self.toward_dense <= 1:
            raise ValueError(f"toward_dense must lie between 0 and 1, got {self.toward_dense}")


def needs(config: Config) -> Needs:
    """Ask for Gram matrices of the inputs, with those in the dense model if it pulls, and windows to learn from."""
    full = config.toward_dense > 0
    return Needs(gram=True, full=full, dense=full, held=not config.damping_frac) | code_learning_needs(config)


def stored_bytes(name: str, rows: int, columns: int, target: Target, config: Config) -> int:
    """Return the bytes of the planes, scales and zero codes of one matrix."""
    return uniform_bytes(name, rows, columns, code_width(target), config.group, config.symmetric)


def cost(scope: Scope, config: Config) -> Work:
    """Count a factor per group and tried damping, a sweep per matrix, rounds on the codes, and learning."""
    factors = gram_factors(scope) * (1 if config.damping_frac else 1 + len(DAMPINGS))
    swept = factors + sweeps(scope) + grids(scope, config.clip) + rounds_of(scope, config.rounds)
    return swept + code_learning_cost(scope, config)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Round matrix by matrix, then learn the block as a whole."""
    learns = config.learn_rounds > 0 and any(calib.statistics[name].tokens for name in targets)
    rounded: dict[str, Rounded] = {}
    latents: dict[str, Latent] = {}
    for name, codes, weight_OI, keep_OI in _sweep(block, calib, targets, config):
        rounded[name] = codes
        if learns:
            order_I = torch.arange(weight_OI.shape[1], device=weight_OI.device)
            latents[name] = Latent.start(codes, weight_OI, order_I, keep_OI)
    note, detail = "", {}
    if learns:
        task = Reconstruction(
            block, calib, config.target, generator, config.reconstruct, ahead=config.ahead, kl=config.kl
        )
        rounded, best = learn(task, latents, Schedule.of(config, config.learn_rounds), generator)
        note, detail = "" if best.improved else KEPT_START, best.detail
    packed = {}
    for name, codes in rounded.items():
        unreached = "" if calib.statistics[name].tokens else ROUNDED_UNREACHED
        columns_I = torch.arange(codes.code_OI.shape[1], device=codes.code_OI.device)
        packed[name] = Packed.codes(codes.parts(columns_I), join_notes(note, unreached), dict(detail))
    return packed


@torch.no_grad()
def _sweep(
    block: Block, calib: CalibrationData, targets: Mapping[str, Target], config: Config
) -> Iterator[tuple[str, Rounded, Tensor, Tensor | None]]:
    """Yield every matrix with its codes, the weights that they stand for, and its mask.

    Matrices that read the same input are rounded with one factor and one sweep.
    """
    for names in block.anatomy.sharing(targets):
        group = calib.statistics[names[0]]
        problem = None
        if group.tokens:
            damping_frac = config.damping_frac or _chosen_damping(block, names, targets, group, config)
            problem = _Problem.of(group, config, damping_frac)
        for bits, alike in groupby(names, key=lambda name: code_width(targets[name])):
            together = list(alike)
            sources = [_source(block, calib, name, config.joint and problem is not None) for name in together]
            if problem is not None and problem.pull_II is not None:
                sources = [source @ problem.pull_II for source in sources]
            columns = sources[0].shape[1]
            check_group(columns, config.group, together[0])
            groups = groups_of(0, columns, bits, "symmetric" if config.symmetric else "affine", config.group)
            keeps = [calib.start[name].weight_OI != 0 if calib.start else None for name in together]
            keep_OI = torch.cat([keep for keep in keeps if keep is not None]) if calib.start else None
            weight_OI = torch.cat(sources)
            if problem is None:
                rounded = nearest(weight_OI, groups, config.clip).storable()
            else:
                rounded = problem.round(weight_OI, groups, config, keep_OI)
            yield from zip(together, rounded.split([len(source) for source in sources]), sources, keeps, strict=True)


def _source(block: Block, calib: CalibrationData, name: str, joint: bool) -> Tensor:
    """Return the weights to round: those of the step before, or the dense ones for a joint sweep."""
    if calib.start and not joint:
        return calib.start[name].weight_OI.float()
    return block.weight(name).float()


def _chosen_damping(
    block: Block, names: Sequence[str], targets: Mapping[str, Target], statistics: Statistics, config: Config
) -> float:
    """Return the damping whose codes have the least error on held-out tokens.

    The codes are those of some rows of all matrices, rounded by the other tokens.
    """
    stacked_OI = torch.cat([block.weight(name).float() for name in names])
    weight_OI = stacked_OI[:: max(1, len(stacked_OI) // JUDGED_ROWS)].contiguous()
    columns, grid = weight_OI.shape[1], "symmetric" if config.symmetric else "affine"
    check_group(columns, config.group, names[0])
    groups = groups_of(0, columns, code_width(targets[names[0]]), grid, config.group)
    other_II = statistics.gram_II - statistics.held_II
    errors = {}
    for damping_frac in DAMPINGS:
        rounded = _Problem.of_gram(other_II, config, damping_frac).round(weight_OI, groups, config, None)
        missing_OI = rounded.values_OI - weight_OI
        errors[damping_frac] = float(((missing_OI @ statistics.held_II) * missing_OI).sum(dtype=torch.float64))
    return min(errors, key=errors.__getitem__)


@dataclass(frozen=True)
class _Problem:
    """Objective of matrices with the same input: XᵀX, its damping, U in the order of the sweep (None: unchanged).

    `pull_II` moves the weights toward the outputs in the dense model, None: they stay.
    """

    gram_II: Tensor
    damping_frac: float
    order_I: Tensor | None
    upper_II: Tensor
    pull_II: Tensor | None

    @classmethod
    def of(cls, statistics: Statistics, config: Config, damping_frac: float) -> "_Problem":
        """Return the problem of a group of matrices."""
        problem = cls.of_gram(statistics.gram_II, config, damping_frac)
        if not config.toward_dense:
            return problem
        damped_II = damped(problem.gram_II, problem.damping_frac)
        pull_II = pull_to_dense(statistics.full_II[1], problem.gram_II, damped_II, config.toward_dense)
        return replace(problem, pull_II=pull_II)

    @classmethod
    def of_gram(cls, gram_II: Tensor, config: Config, damping_frac: float) -> "_Problem":
        """Return the problem of a Gram matrix, without a pull."""
        order_I = gram_II.diagonal().argsort(descending=True, stable=True) if config.act_order else None
        ordered_II = gram_II if order_I is None else gram_II[order_I][:, order_I]
        upper_II, damping_frac = inverse_factor(ordered_II, damping_frac)
        return cls(gram_II, damping_frac, order_I, upper_II, None)

    def round(self, weight_OI: Tensor, groups: list[Group], config: Config, keep_OI: Tensor | None) -> Rounded:
        """Round by a sweep, then by rounds of refits and coordinate descent."""
        if self.order_I is None:
            importance_I = 1 / self.upper_II.diagonal().square()
            rounded = round_by_sweep(weight_OI, self.upper_II, groups, config.clip, keep_OI, importance_I)
        else:
            rounded = self._round_in_order(weight_OI, groups, config.clip, keep_OI)
        # without rounds the Gram matrix is not read
        gram_II = damped(self.gram_II, self.damping_frac) if config.rounds else self.gram_II
        return improve(rounded, weight_OI, gram_II, config.rounds, keep_OI)

    def _round_in_order(self, weight_OI: Tensor, groups: list[Group], clip: bool, keep_OI: Tensor | None) -> Rounded:
        """Round in one pass over permuted columns, with grids that are fixed before."""
        assert self.order_I is not None
        importance_I = torch.empty_like(self.upper_II[0])
        importance_I[self.order_I] = 1 / self.upper_II.diagonal().square()
        fixed = nearest(weight_OI if keep_OI is None else weight_OI * keep_OI, groups, clip, importance_I)
        grid = fixed.grid
        ordered = Grid(grid.scale_OG, grid.offset_OG, grid.group_I[self.order_I], grid.top_I[self.order_I])
        keep_OI = None if keep_OI is None else keep_OI[:, self.order_I]
        propagation_II = error_propagation(self.upper_II)
        swept_OI, _ = sweep_codes(weight_OI[:, self.order_I].contiguous(), None, propagation_II, ordered, keep_OI)
        code_OI = torch.empty_like(swept_OI)
        code_OI[:, self.order_I] = swept_OI
        return replace(fixed, code_OI=code_OI)


METHOD = WalkMethod(
    doc=__doc__,
    paper="Frantar et al. 2023, GPTQ",
    accepts=(Bits,),
    config=Config,
    needs=needs,
    continues=True,
    compress=compress,
    cost=cost,
    stored_bytes=stored_bytes,
    group=lambda config: config.group,
    masked_options={"symmetric": True},  # of symmetric codes, one stands for zero
)
