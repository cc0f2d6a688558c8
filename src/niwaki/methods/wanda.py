"""Wanda: prune by weight times activation, row by row, without changing what stays.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (ICLR 2024).
The score is S_ij = |W_ij|·‖X_j‖₂. ‖X_j‖₂ is the L2 norm of input feature j over all calibration tokens (section 3).
Within each output row the lowest scores go; for N:M the lowest of every group along the inputs.

Deviations: the number of zeros of a matrix is exact. Rows differ by at most one zero when the width does not divide.
A matrix that no calibration token reached (a rarely chosen expert) has no norms. Its weights are ranked by |W| alone,
and its line in blocks.jsonl notes it.

Cost: one forward for the norms, one to propagate, one selection per matrix. Memory: the block.

    niwaki compress MODEL OUT --method wanda --target 2:4 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.config.targets import NM, Sparsity, Target
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.masks import compress_by_score, keep_by_row, wanda_scores
from niwaki.model.decoder import Block


@dataclass(frozen=True, kw_only=True)
class Config:
    """Wanda has no options."""


def needs(config: Config) -> Needs:
    """Ask for squared norms of the inputs."""
    return Needs(sqnorm=True)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Prune every output row by the score |W|·‖X‖."""

    def score(name: str, weight_OI: Tensor) -> Tensor:
        return wanda_scores(weight_OI, calib.statistics[name])

    return compress_by_score(block, targets, score, keep_by_row, calib.statistics)


METHOD = WalkMethod(
    doc=__doc__,
    paper="Sun et al. 2024, A Simple and Effective Pruning Approach for Large Language Models",
    accepts=(Sparsity, NM),
    config=Config,
    needs=needs,
    compress=compress,
)
