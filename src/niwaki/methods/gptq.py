"""GPTQ: round column by column and let the remaining columns make up for each error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023),
Algorithm 1, with `rounding.round_by_sweep`. `act_order` takes the columns with the largest inputs first. Groups then
keep the grids of the unswept weights, so that the columns of a group stay neighbors in the file.

Not in the paper, and off by default: `rounds` of refitted scales and coordinate descent on the codes
(`rounding.improve`), and `clip`, the range search of `rtn`. A matrix that no token reached is rounded to nearest; its
line in blocks.jsonl notes it.

After a pruning method (`sparsegpt+gptq`, target `2:4+4bit`) its zeros stay. The sweep gives a pruned weight the code of
zero only; the error that reached it from the left moves on to the right. Grids are fitted to kept weights alone. The
sweep begins at the weights that the method before left. With `joint` it begins at the dense ones, so that one sweep
makes up for pruning and rounding. That is "Joint Sparsification & Quantization" of SparseGPT; there the mask is chosen
in that pass, here it is given.

Matrices that read the same input are swept together, their rows stacked.

Cost: two forwards, one Gram matrix, one factor and one sweep per group of matrices: O·I² operations for all their rows.

    niwaki compress MODEL OUT --method gptq --target 4bit --set group=128 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.kernels.codes import sweep_codes
from niwaki.kernels.types import Grid
from niwaki.methods.cost import Scope, Work, gram_factors, sweeps
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.column_sweep import check_damping, inverse_factor
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of GPTQ."""

    group: Annotated[int, "Columns that share a scale; 0 for the whole row."] = 128
    symmetric: Annotated[bool, "Center the levels on zero: no zero codes are stored."] = False
    act_order: Annotated[bool, "Round the columns with the largest inputs first."] = False
    clip: Annotated[bool, "Search for the range of a group that loses least (not in the paper)."] = False
    rounds: Annotated[int, "Rounds of refitted scales and coordinate descent on the codes (not in the paper)."] = 0
    joint: Annotated[bool, "After a pruning method, begin at the dense weights and not at those that it left."] = False
    damping_frac: Annotated[float, "A share of the mean diagonal of XᵀX, added to the diagonal (λ)."] = 0.01

    def __post_init__(self) -> None:
        if self.group < 0 or self.rounds < 0:
            raise ValueError("expected group ≥ 0 and rounds ≥ 0")
        check_damping(self.damping_frac)


def needs(config: Config) -> Needs:
    """Ask for Gram matrices of the inputs."""
    return Needs(gram=True)


def stored_bytes(name: str, rows: int, columns: int, target: Target, config: Config) -> int:
    """Return the bytes of the planes, scales and zero codes of one matrix."""
    return uniform_bytes(name, rows, columns, code_width(target), config.group, config.symmetric)


def cost(scope: Scope, config: Config) -> Work:
    """Count a factor per group, a sweep per matrix, and rounds on the codes."""
    return gram_factors(scope) + sweeps(scope) + grids(scope, config.clip) + rounds_of(scope, config.rounds)


@torch.no_grad()
def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Round every group of matrices that read the same input with one factor and one sweep."""
    packed: dict[str, Packed] = {}
    for names in block.anatomy.sharing(targets):
        group = calib.statistics[names[0]]
        order_I, upper_II, damping_frac = _factor(group.gram_II, config) if group.tokens else (None, None, 0.0)
        note = "" if group.tokens else ROUNDED_UNREACHED
        for bits, alike in groupby(names, key=lambda name: code_width(targets[name])):
            together = list(alike)
            sources = [_source(block, calib, name, config.joint and upper_II is not None) for name in together]
            columns = sources[0].shape[1]
            check_group(columns, config.group, together[0])
            grid = "symmetric" if config.symmetric else "affine"
            groups = groups_of(0, columns, bits, grid, config.group)
            keep_OI = torch.cat([calib.start[name].weight_OI != 0 for name in together]) if calib.start else None
            weight_OI = torch.cat(sources)
            if upper_II is None:
                rounded = nearest(weight_OI, groups, config.clip).storable()
            else:
                if order_I is None:
                    rounded = round_by_sweep(weight_OI, upper_II, groups, config.clip, keep_OI)
                else:
                    rounded = _sweep_in_order(weight_OI, upper_II, groups, order_I, config.clip, keep_OI)
                gram_II = damped(group.gram_II, damping_frac) if config.rounds else group.gram_II  # else it is not read
                rounded = improve(rounded, weight_OI, gram_II, config.rounds, keep_OI)
            columns_I = torch.arange(columns, device=weight_OI.device)
            for name, own in zip(together, rounded.split([len(source) for source in sources]), strict=True):
                packed[name] = Packed.codes(own.parts(columns_I), note)
    return packed


def _source(block: Block, calib: CalibrationData, name: str, joint: bool) -> Tensor:
    """Return the weights to round: those of the step before, or the dense ones for a joint sweep."""
    if calib.start and not joint:
        return calib.start[name].weight_OI.float()
    return block.weight(name).float()


def _factor(gram_II: Tensor, config: Config) -> tuple[Tensor | None, Tensor, float]:
    """Return the order of the columns (None: unchanged), U in that order, and the damping that was needed."""
    order_I = gram_II.diagonal().argsort(descending=True, stable=True) if config.act_order else None
    ordered_II = gram_II if order_I is None else gram_II[order_I][:, order_I]
    return order_I, *inverse_factor(ordered_II, config.damping_frac)


def _sweep_in_order(
    weight_OI: Tensor, upper_II: Tensor, groups: list[Group], order_I: Tensor, clip: bool, keep_OI: Tensor | None
) -> Rounded:
    """Round in one pass over permuted columns, with grids that are fixed before."""
    fixed = nearest(weight_OI if keep_OI is None else weight_OI * keep_OI, groups, clip)
    grid = fixed.grid
    ordered = Grid(grid.scale_OG, grid.offset_OG, grid.group_I[order_I], grid.top_I[order_I])
    keep_OI = None if keep_OI is None else keep_OI[:, order_I]
    swept_OI, _ = sweep_codes(weight_OI[:, order_I].contiguous(), None, error_propagation(upper_II), ordered, keep_OI)
    code_OI = torch.empty_like(swept_OI)
    code_OI[:, order_I] = swept_OI
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
