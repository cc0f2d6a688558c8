"""Rounding to nearest: every weight takes the closest of 2^b levels of its group.

Source: the baseline that every quantizer must beat (Frantar et al. 2023, GPTQ, section 4). Needs no data.
Scale and zero code of each group are searched for the least squared error of its weights. With `clip=false` the range
is min to max, as published. An error |w − q|^p with p below one, as in HQQ, cuts outliers and loses more (the log).

Scales are float16, and zero codes of asymmetric grids take b bits; both are counted and stored. After a pruning method
(`wanda+rtn`, target `2:4+4bit`) it rounds the kept weights on symmetric grids, where zeros stay zero.

Cost: one pass over the weights.

    niwaki compress MODEL OUT --method rtn --target 4bit --set group=128
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.methods.cost import Scope, Work
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.rounding import check_group, code_width, grids, groups_of, nearest, uniform_bytes
from niwaki.model.decoder import Block


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of rounding to nearest."""

    group: Annotated[int, "Columns that share a scale; 0 for the whole row."] = 128
    symmetric: Annotated[bool, "Center the levels on zero: no zero codes are stored."] = False
    clip: Annotated[
        bool, "Search for the scale and zero code with the least squared error; false: from min to max."
    ] = True

    def __post_init__(self) -> None:
        if self.group < 0:
            raise ValueError(f"group must not be negative, got {self.group}")


def needs(config: Config) -> Needs:
    """Ask for no data."""
    return Needs()


def stored_bytes(name: str, rows: int, columns: int, target: Target, config: Config) -> int:
    """Return the bytes of the planes, scales and zero codes of one matrix."""
    return uniform_bytes(name, rows, columns, code_width(target), config.group, config.symmetric)


def cost(scope: Scope, config: Config) -> Work:
    """Count one grid per group."""
    return grids(scope, config.clip)


@torch.no_grad()
def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Fit the grid of every group and round."""
    packed = {}
    for name, target in targets.items():
        weight_OI = (calib.start[name].weight_OI if calib.start else block.weight(name)).float()
        columns = weight_OI.shape[1]
        check_group(columns, config.group, name)
        grid = "symmetric" if config.symmetric else "affine"
        groups = groups_of(0, columns, code_width(target), grid, config.group)
        rounded = nearest(weight_OI, groups, config.clip).storable()
        packed[name] = Packed.codes(rounded.parts(torch.arange(columns, device=weight_OI.device)))
    return packed


METHOD = WalkMethod(
    doc=__doc__,
    paper="Frantar et al. 2023, GPTQ (the baseline)",
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
