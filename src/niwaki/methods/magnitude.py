"""Magnitude pruning: the smallest weights go. The floor that every other method must beat.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (NeurIPS 2015), without
retraining. `scope="matrix"` (default, as in the tables of the literature) compares all weights of a matrix;
`scope="row"` compares those of one output. Needs no calibration text. Cost: one selection per matrix.

    niwaki compress MODEL OUT --method magnitude --target 0.5 --set scope=row
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
from niwaki.methods.shared.masks import compress_by_score, keep_by_matrix, keep_by_row
from niwaki.model.decoder import Block


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of magnitude pruning."""

    scope: Annotated[
        str, "Weights that are compared: those of a matrix, or those of a row (all rows get the same number of zeros)."
    ] = "matrix"

    def __post_init__(self) -> None:
        if self.scope not in ("matrix", "row"):
            raise ValueError(f"scope must be matrix or row, got {self.scope!r}")


def needs(config: Config) -> Needs:
    """Ask for no data."""
    return Needs()


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Prune by the score |W|."""

    def score(name: str, weight_OI: Tensor) -> Tensor:
        return weight_OI.abs()

    choose = keep_by_matrix if config.scope == "matrix" else keep_by_row
    return compress_by_score(block, targets, score, choose, statistics=None)


METHOD = WalkMethod(
    doc=__doc__,
    paper="Han et al. 2015, Learning both Weights and Connections",
    accepts=(Sparsity, NM),
    config=Config,
    needs=needs,
    compress=compress,
)
