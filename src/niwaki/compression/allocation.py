"""Allocation of one overall target to all matrices (bits by `sensitivity`: see `bit_allocation`).

`auto` is `sensitivity` for methods that spend any number of bits, and `uniform` for all others. `searched` and
`damage` give blocks widths of their own (see `width_search`, `unit_damage`). `uniform` gives every matrix the same
target.

`owl` gives blocks with more outlier weights less sparsity: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)" (ICML
2024), equations 2 and 3. The outlier share of a block is the fraction of its Wanda scores |W|·‖X‖ that exceed M times
their mean, on the dense model. Densities are the shares, stretched linearly to a range of 2λ. They are shifted so that
the mean, weighted by parameters, meets the target exactly. The released code uses the plain mean, which is the same for
equal blocks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch

from niwaki.config.targets import Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.errors import TargetError
from niwaki.model.anatomy import Anatomy
from niwaki.model.decoder import Block

OWN_WIDTHS = ("damage", "searched")  # blocks of a structured method get widths of their own
ALLOCATIONS = ("auto", "damage", "owl", "searched", "sensitivity", "uniform")
OWL_NEEDS = Needs(sqnorm=True)
SCAN_FORWARDS = {"owl": 2.0, "sensitivity": 1.0}  # forwards of all blocks that an allocation takes

# block index → matrix name → target
Targets = list[dict[str, Target]]


@dataclass(frozen=True, kw_only=True)
class OwlConfig:
    """Options of OWL, an allocation by the share of outliers in each block."""

    outlier_multiple: Annotated[float, "M: a score above this many times the mean is an outlier."] = 5.0
    spread_frac: Annotated[float, "λ: how far a block may move from the target (0.08 in the paper)."] = 0.08

    def __post_init__(self) -> None:
        if self.outlier_multiple <= 0 or not 0 <= self.spread_frac < 0.5:
            raise ValueError("expected outlier_multiple > 0 and 0 ≤ spread_frac < 0.5")


def uniform(anatomy: Anatomy, target: Target) -> Targets:
    """Return the same target for every matrix. Raises TargetError naming a matrix that it does not fit."""
    for index, block in enumerate(anatomy.blocks):
        for linear in block.linears.values():
            try:
                target.zeros_in(linear.rows, linear.columns)
            except TargetError as error:
                raise TargetError(f"{anatomy.prefix(index)}{linear.name}: {error}") from error
    return [dict.fromkeys(block.linears, target) for block in anatomy.blocks]


def owl(anatomy: Anatomy, target: Target, outlier_shares: list[float], config: OwlConfig) -> Targets:
    """Return targets per block from the outlier share of each.

    Raises TargetError for a target that is not a share of zeros, or an impossible spread.
    """
    if not isinstance(target, Sparsity):
        raise TargetError(f"owl moves unstructured sparsity between blocks, got {target}: use --allocation uniform")
    shares = {index: outlier_shares[index] for index, block in enumerate(anatomy.blocks) if block.linears}
    low, high = min(shares.values()), max(shares.values())
    span = (high - low) or 1.0
    raised = {index: (share - low) / span * 2 * config.spread_frac for index, share in shares.items()}
    mean = sum(r * anatomy.blocks[index].weights for index, r in raised.items()) / anatomy.weights
    zeros = {index: target.zeros_frac + mean - r for index, r in raised.items()}
    if not all(0 < fraction < 1 for fraction in zeros.values()):
        raise TargetError(
            f"owl would give a block {min(zeros.values()):.2f} to {max(zeros.values()):.2f} zeros at target {target}: "
            "lower spread_frac"
        )
    return [
        dict.fromkeys(block.linears, Sparsity(zeros[index])) if block.linears else {}
        for index, block in enumerate(anatomy.blocks)
    ]


def outlier_share(block: Block, statistics: Mapping[str, Statistics], config: OwlConfig) -> float:
    """Return the fraction of the Wanda scores of the block that exceed `outlier_multiple` times their mean."""
    total, count = 0.0, 0
    scores = {}
    for name in block.linears:
        if statistics[name].tokens:
            scores[name] = block.weight(name).float().abs() * statistics[name].sqnorm_I.sqrt()
            total += float(scores[name].sum(dtype=torch.float64))
            count += scores[name].numel()
    threshold = config.outlier_multiple * total / max(count, 1)
    above = sum(int((score > threshold).sum()) for score in scores.values())
    share = above / max(count, 1)
    return share if math.isfinite(share) else 0.0
