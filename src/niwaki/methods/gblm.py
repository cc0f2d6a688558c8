"""Gradient-blended Wanda: the norm of a weight's gradient over the calibration windows joins that of its input.

Source: Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models" (GBLM-Pruner, 2023).
The score is S_ij = |W_ij| · (α·‖G_ij‖₂ + ‖X_j‖₂). G_ij holds the gradients of the loss of each window with respect to
this weight of the dense model. ‖X_j‖₂ is Wanda's norm of the input feature j. Within each output row the lowest go.

The paper could not be read here. Unverified: α = 100, and L2 over windows without a mean. ‖X_j‖² is divided by the
number of windows, as in Wanda's released code. The loss is the mean over the tokens of a window. Deviation: inputs are
those after the compressed prefix; gradients are those of the dense model, exact through all blocks. A matrix without
tokens is ranked by |W| alone, and noted.

Cost: that of Wanda, and the walk backwards: two forwards and a backward, windows one at a time. While it runs, the
squares of all gradients lie on disk in float32.

    niwaki compress MODEL OUT --method gblm --target 2:4 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import NM, Sparsity, Target
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.masks import compress_by_score, keep_by_row
from niwaki.model.decoder import Block


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of GBLM."""

    alpha: Annotated[float, "α: weight of the gradients relative to the norms of the inputs; 0 is Wanda."] = 100.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be 0 or more, got {self.alpha}")


def needs(config: Config) -> Needs:
    """Ask for squared norms of the inputs, and squares of the gradients."""
    return Needs(sqnorm=True, gradient=True)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Prune every output row by the score |W|·(α‖G‖ + ‖X‖)."""

    def score(name: str, weight_OI: Tensor) -> Tensor:
        assert calib.stream is not None
        norm_I = (calib.statistics[name].sqnorm_I / len(calib.stream)).sqrt()
        return weight_OI.abs() * (config.alpha * calib.gradients[name].sqrt() + norm_I)

    return compress_by_score(block, targets, score, keep_by_row, calib.statistics)


METHOD = WalkMethod(
    doc=__doc__,
    paper="Das et al. 2023, Beyond Size: How Gradients Shape Pruning Decisions in LLMs (constants unverified)",
    accepts=(Sparsity, NM),
    config=Config,
    needs=needs,
    compress=compress,
)
