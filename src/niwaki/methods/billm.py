"""BiLLM: one sign per weight, a second one for the few salient columns, two scales for all others.

Source: Huang et al., "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs" (ICML 2024), Algorithms 1 and 2.
For every block of `block` columns, from left to right:

1. The saliency of a column is Σ_i w_ij² / U_jj², U the upper factor of H⁻¹. The 1 to `salient` most salient columns are
   treated apart; the number that leaves the least error is taken.
2. Salient columns are binarized twice: ŵ = α₁·s₁ + α₂·s₂; the second time binarizes the error of the first.
3. The others fall into a concentrated group |w| ≤ p* and a sparse one |w| > p*. Each has ŵ = α·s with its own scale per
   row; p* is searched.
4. The columns after the block make up for its error (`binary.sweep_blocks`).

Where the released code and the paper differ, this follows the paper:

- Signs are taken around zero. `mean` takes them around the mean of the row's group, as the code does. That costs bits,
  and moves both levels of a sparse group whose signs are not even. One seed of a small model has perplexity 47.3 with
  it and 45.1 without.
- The search for columns and p* measures the error of weights. The code measures that of saliencies.
- The error of a block is divided by the factor U_bb. The code divides by its diagonal alone, which left 11 % more error
  in the outputs of that model's matrices.

The 81 candidates for p* are those of the code.

True bits follow from the shape alone. A weight takes a sign and a second bit: a second sign in salient columns, a group
in others. A column takes a bit; a row of a block takes 4 scales of 16 bits (and 3 means). That is 2.5 bits for wide
matrices (2.88 with means). The paper's count of 1.1 leaves out groups and scales. The target must allow for them. The
file holds decoded weights.

Cost: two forwards, one Gram matrix and factor per group of matrices, about 130 trial binarizations of every weight.

    niwaki compress MODEL OUT --method billm --target 3bit --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.formats.quantized import SCALE_DTYPE, pack_codes, unpack_codes
from niwaki.methods.cost import Scope, Work, gram_factors, sweeps
from niwaki.methods.method import WalkMethod
from niwaki.methods.shared.binary import (
    check_reach,
    choose_salient,
    factors,
    fit_row,
    half,
    signs,
    split_by_size,
    sweep_blocks,
    trials,
    with_true_size,
)
from niwaki.methods.shared.column_sweep import check_damping
from niwaki.model.decoder import Block


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of BiLLM."""

    block: Annotated[int, "Columns that share scales."] = 128
    salient: Annotated[int, "Max salient columns per block."] = 50
    mean: Annotated[bool, "Put the levels around a stored mean instead of zero."] = False
    damping_frac: Annotated[float, "A share of the mean diagonal of XᵀX, added to the diagonal (λ)."] = 0.01

    def __post_init__(self) -> None:
        if self.block < 1 or self.salient < 1:
            raise ValueError("expected block ≥ 1 and salient ≥ 1")
        check_damping(self.damping_frac)


@dataclass(frozen=True)
class CodedBlock:
    """Coded block of columns. `second_OC`: the second sign of salient columns, the group of others (set: sparse).

    `scale_4O`: α₁ and α₂ of the salient columns, α of the concentrated, of the sparse group; `mean_3O`: their μ.
    """

    salient_C: Tensor
    sign_OC: Tensor
    second_OC: Tensor
    scale_4O: Tensor
    mean_3O: Tensor

    def values(self) -> Tensor:
        """Return the weights [O, C]."""
        first_OC, second_OC = signs(self.sign_OC), signs(self.second_OC)
        scales, means = self.scale_4O[:, :, None], self.mean_3O[:, :, None]
        salient_OC = means[0] + scales[0] * first_OC + scales[1] * second_OC
        groups_OC = torch.where(self.second_OC, means[2] + scales[3] * first_OC, means[1] + scales[2] * first_OC)
        return torch.where(self.salient_C, salient_OC, groups_OC)


def needs(config: Config) -> Needs:
    """Ask for Gram matrices of the inputs."""
    return Needs(gram=True)


def stored_bytes(name: str, rows: int, columns: int, target: Target, config: Config) -> None:
    """Return None: the file holds decoded weights. Raise TargetError if the target has no room for the true bits."""
    check_reach(name, rows, columns, _stored_bytes(rows, columns, config), target)


def cost(scope: Scope, config: Config) -> Work:
    """Count a factor per group, a sweep per matrix, and trials for each number of salient columns and each split."""
    return gram_factors(scope) + sweeps(scope, config.block) + trials(scope, config.block, config.salient)


@torch.no_grad()
def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Code one block of columns after another, matrix by matrix."""
    for name, target in targets.items():
        rows, columns = block.weight(name).shape
        check_reach(name, rows, columns, _stored_bytes(rows, columns, config), target)
    packed = {}
    for name, upper_II, note in factors(block, calib.statistics, list(targets), config.damping_frac):
        weight_OI = block.weight(name).float()
        coded = sweep_blocks(weight_OI, upper_II, config.block, lambda w_OC, d_C: _encode(w_OC, d_C, config))
        tensors = stored(coded, config)
        detail = {"salient_columns": sum(int(columns.salient_C.sum()) for columns in coded)}
        packed[name] = with_true_size(
            decode(tensors, len(weight_OI), weight_OI.shape[1], config), tensors, note, detail
        )
    return packed


def _encode(weight_OC: Tensor, upper_C: Tensor, config: Config) -> tuple[CodedBlock, Tensor]:
    """Return the codes of one block and the weights they stand for."""
    mean = config.mean
    salient_C = choose_salient(weight_OC, weight_OC.square().sum(0) / upper_C.square(), config.salient, mean)
    salient_OC = salient_C.expand_as(weight_OC)
    sparse_OC = split_by_size(weight_OC, ~salient_OC, mean)
    mean_O, scale_O = fit_row(weight_OC, salient_OC, mean)
    centred_OC = weight_OC - mean_O[:, None]
    left_OC = centred_OC - signs(centred_OC >= 0) * scale_O[:, None]
    left_mean_O, left_scale_O = fit_row(left_OC, salient_OC, mean)
    concentrated = fit_row(weight_OC, ~salient_OC & ~sparse_OC, mean)
    sparse = fit_row(weight_OC, sparse_OC, mean)
    group_mean_OC = torch.where(sparse_OC, sparse[0][:, None], concentrated[0][:, None])
    coded = CodedBlock(
        salient_C,
        torch.where(salient_C, centred_OC >= 0, weight_OC >= group_mean_OC),
        torch.where(salient_C, left_OC >= left_mean_O[:, None], sparse_OC),
        torch.stack([scale_O, left_scale_O, concentrated[1], sparse[1]]),
        torch.stack([half(mean_O + left_mean_O), concentrated[0], sparse[0]]),
    )
    return coded, coded.values()


def stored(coded: Sequence[CodedBlock], config: Config) -> dict[str, Tensor]:
    """Return the tensors of a file: bits of weights and columns, scales [4, B, O] and means [3, B, O] of B blocks."""
    tensors = {
        "sign": pack_codes(torch.cat([columns.sign_OC for columns in coded], 1), 1),
        "second": pack_codes(torch.cat([columns.second_OC for columns in coded], 1), 1),
        "salient": pack_codes(torch.cat([columns.salient_C for columns in coded]), 1),
        "scale": torch.stack([columns.scale_4O for columns in coded], 1).to(SCALE_DTYPE),
    }
    if config.mean:
        tensors["mean"] = torch.stack([columns.mean_3O for columns in coded], 1).to(SCALE_DTYPE)
    return tensors


def decode(tensors: Mapping[str, Tensor], rows: int, columns: int, config: Config) -> Tensor:
    """Decode the matrix [rows, columns] from the tensors of `stored`."""
    sign_OI = unpack_codes(tensors["sign"], rows * columns).view(rows, columns).bool()
    second_OI = unpack_codes(tensors["second"], rows * columns).view(rows, columns).bool()
    salient_I = unpack_codes(tensors["salient"], columns).bool()
    scale_4BO = tensors["scale"].float()
    mean_3BO = tensors["mean"].float() if config.mean else torch.zeros_like(scale_4BO[:3])
    blocks = zip(sign_OI.split(config.block, 1), second_OI.split(config.block, 1), strict=True)
    coded = [
        CodedBlock(salient_C, sign_OC, second_OC, scale_4BO[:, number], mean_3BO[:, number])
        for number, (salient_C, (sign_OC, second_OC)) in enumerate(
            zip(salient_I.split(config.block), blocks, strict=True)
        )
    ]
    return torch.cat([columns.values() for columns in coded], 1)


def _stored_bytes(rows: int, columns: int, config: Config) -> int:
    """Return the bytes of `stored` for a matrix of this shape."""
    values = 7 if config.mean else 4
    planes = 2 * -(-rows * columns // 8) + -(-columns // 8)
    return planes + 2 * values * rows * -(-columns // config.block)


METHOD = WalkMethod(
    doc=__doc__,
    paper="Huang et al. 2024, BiLLM",
    accepts=(Bits,),
    config=Config,
    needs=needs,
    compress=compress,
    cost=cost,
    stored_bytes=stored_bytes,
)
