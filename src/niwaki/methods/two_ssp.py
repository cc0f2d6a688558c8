"""2SSP: neurons by the norm of their activations, then whole attentions by the loss without them; nothing refitted.

Source: Sandri et al. 2025, "2SSP: A Two-Stage Framework for Structured Pruning of LLMs", as in its released code.

1. Every block keeps the same number of neurons: those with the highest norm over tokens. The norm is that of the input
   of the matrix that writes to the residual stream.
2. round(N · s^((P_mlp / P_attention) / 1.5)) of N attentions go. The one whose removal lowers the quality least goes
   first. Each is judged in the model without the neurons that go.

Neurons make up for the rest of the budget.

No config can say that a block has no attention: the result is stored at full size, with zeros.

Cost: two forwards of the text, and one of a part of it for every attention that is tried.

    niwaki compress MODEL OUT --method two_ssp --target 0.3 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.config.targets import KeepUnits, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.unit_pruning import compress_units_by_score
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, PrunedShape, ShapeSearch, ShapeSpace

EXPONENT = 1.5


@dataclass(frozen=True, kw_only=True)
class Config:
    """2SSP has no options."""


def needs(config: Config) -> Needs:
    """Ask for squared norms of the inputs."""
    return Needs(sqnorm=True)


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """Remove greedily, one attention after another."""
    blocks = len(sizes)
    dense = sizes.group_parameters["neurons"] * sizes.neurons
    attention = sizes.group_parameters["heads"] * sizes.heads
    count = round(blocks * removed_frac ** (dense / attention / EXPONENT))

    def without_attention(gone: Sequence[int], neurons: int) -> PrunedShape:
        return PrunedShape((neurons,) * blocks, tuple(0 if i in gone else sizes.heads for i in range(blocks)))

    step = sizes.columns_multiple
    widths = (
        n
        for n in range(sizes.neurons // step * step, 0, -step)
        if sizes.removed_frac(without_attention(range(count), n)) >= removed_frac
    )
    neurons = next(widths, None)
    if neurons is None:
        return None
    gone: list[int] = []
    while len(gone) < count:
        left = [index for index in range(blocks) if index not in gone]
        losses = yield [without_attention([*gone, index], neurons) for index in left]
        gone.append(left[losses.index(min(losses))])
    return without_attention(gone, neurons)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Keep the neurons with the highest norms; an attention stays or goes as a whole."""

    def score(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> Tensor:
        return statistics.sqnorm_I if statistics.tokens else weight_OI.square().sum(0)

    return compress_units_by_score(block, calib, targets, score)


METHOD = ShapeMethod(
    doc=__doc__,
    paper="2SSP (Sandri et al. 2025)",
    accepts=(Sparsity,),
    config=Config,
    needs=needs,
    compress=compress,
    search=search,
)
