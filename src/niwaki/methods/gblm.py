"""Gradient-blended Wanda: the norm of a weight's gradient over the calibration windows joins that of its input.

Source: Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models" (GBLM-Pruner, 2023).
Score S_ij = |W_ij| · (α·‖G_ij‖₂ + ‖X_j‖₂): G_ij holds the gradients of the loss of each window with respect to this
weight of the dense model, and ‖X_j‖₂ is Wanda's norm of the input feature j. Within each output row the lowest go.

The paper could not be read here. Unverified: α = 100, L2 over windows without a mean, ‖X_j‖² divided by the number of
windows (as Wanda's released code does), and that the loss is the mean over the tokens of a window. Deviation: inputs
are those behind the compressed prefix, gradients those of the dense model, exact through all blocks.

Cost: beside Wanda's, the walk backwards (two forwards, a backward, windows one at a time) and the squares of all
gradients in float32 on disk while it runs. A matrix without tokens is ranked by |W| alone, and noted.

    niwaki compress MODEL OUT --method gblm --target 2:4 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

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
    """Options of GBLM."""

    alpha: Annotated[float, "α: weight of the gradients relative to the norms of the inputs; 0 is Wanda."] = 100.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be 0 or more, got {self.alpha}")


def needs(config: Config) -> Needs:
    """Squared norms of the inputs, and squares of the gradients."""
    return Needs(sqnorm=True, gradient=True)


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
    """Score |W|·(α‖G‖ + ‖X‖) per output row."""
    packed = {}
    for name, target in targets.items():
        weight_OI = block.weight(name).float()
        scores_OI, statistics = weight_OI.abs(), calib.statistics[name]
        if statistics.tokens:
            assert calib.stream is not None
            input_I = (statistics.sqnorm_I / len(calib.stream)).sqrt()
            scores_OI = scores_OI * (config.alpha * calib.gradients[name].sqrt() + input_I)
        note = "" if statistics.tokens else UNREACHED
        packed[name] = Packed.masked(weight_OI, keep_by_row(scores_OI, target), note)
    return packed


METHOD = WalkMethod(
    doc=__doc__,
    paper="Das et al. 2023, Beyond Size: How Gradients Shape Pruning Decisions in LLMs (constants unverified)",
    accepts=(Sparsity, NM),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
)
