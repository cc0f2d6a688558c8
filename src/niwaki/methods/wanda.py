"""Wanda: prune by weight times activation, row by row, without changing what stays.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (ICLR 2024).
Score S_ij = |W_ij|·‖X_j‖₂, where ‖X_j‖₂ is the L2 norm of input feature j over all calibration tokens
(section 3); within each output row the lowest scores go, for N:M the lowest of every group along the inputs.

Deviations: the number of zeros of a matrix is exact (rows differ by at most one zero when the row width does
not divide). A matrix that no calibration token reached (a rarely chosen expert) has no norms: its weights are
ranked by |W| alone and its line in blocks.jsonl notes it.

Cost: one forward for the norms, one to propagate, one selection per matrix. Memory: the block.

    niwaki compress MODEL OUT --method wanda --target 2:4 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from niwaki.config.recipe import NM, Sparsity, Target
from niwaki.data.statistics import UNREACHED, Needs
from niwaki.data.stream import CalibrationData
from niwaki.formats.record import Packed
from niwaki.methods.cost import Scope, Work, masks
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.masks import keep_by_row
from niwaki.model.decoder import Block


@dataclass(frozen=True, kw_only=True)
class Config:
    """Wanda has no options."""


def needs(config: Config) -> Needs:
    """Squared norms of the inputs."""
    return Needs(sqnorm=True)


def cost(scope: Scope, config: Config) -> Work:
    """One score and one selection a matrix."""
    return masks(scope)


@torch.no_grad()
def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Score |W|·‖X‖ per output row."""
    packed = {}
    for name, target in targets.items():
        weight_OI = block.weight(name).float()
        scores_OI = weight_OI.abs()
        if calib.statistics[name].tokens:
            scores_OI = scores_OI * calib.statistics[name].sqnorm_I.sqrt()
        note = "" if calib.statistics[name].tokens else UNREACHED
        packed[name] = Packed.masked(weight_OI, keep_by_row(scores_OI, target), note)
    return packed


METHOD = WalkMethod(
    doc=__doc__,
    paper="Sun et al. 2024, A Simple and Effective Pruning Approach for Large Language Models",
    accepts=(Sparsity, NM),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
)
