"""Squeeze10's choice weight by weight: 4 bits for some, one bit for the others, and a mask of one bit per weight.

"0.8 · 1 + 0.2 · 4 = 1.6 bits" leaves the mask out. With it a weight costs two bits without any salient weight, and 2.6
with every fifth. This exists to compare the claim with a choice of columns. No kernel reads it: the file holds the
decoded weights, and `method_bits` counts the tensors that a file would have to hold.

One sweep from left to right, with all scales fixed before: per row α and μ of the one-bit weights, and a four-bit step.

Legend: O rows, I columns.
"""

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.errors import TargetError
from niwaki.formats.packed import Packed
from niwaki.formats.quantized import SCALE_DTYPE, pack_codes
from niwaki.methods.shared.binary import with_true_size
from niwaki.methods.shared.rounding import CLIPS, ROUNDED_UNREACHED, SMALLEST_SCALE

SALIENT_BITS = 4
SCALES = 3  # per row: one-bit scale and mean, four-bit scale
MIDDLE = 7.5  # of the four-bit codes


def salient_elements(rows: int, columns: int, target: Target, name: str = "") -> int:
    """Return the number of weights with four bits. Raise TargetError if the mask and one bit do not fit."""
    assert isinstance(target, Bits)
    size, min_bits = rows * columns, element_bits(rows, columns, 0)
    left_bytes = target.bytes_in(rows, columns) - round(min_bits * size / 8)
    if left_bytes < 0:
        raise TargetError(
            f"{name}target {target}: a choice by element needs at least {min_bits:.3f} bits for a {rows}×{columns} "
            "matrix: raise the target, or use granularity=column"
        )
    return min(8 * (left_bytes // (SALIENT_BITS - 1)), size)


def element_bits(rows: int, columns: int, count: int) -> float:
    """Return the bits per weight with `count` salient weights: one bit, the mask, the scales, and the higher bits."""
    nbytes = 2 * -(-rows * columns // 8) + 2 * SCALES * rows + (SALIENT_BITS - 1) * -(-count // 8)
    return 8 * nbytes / (rows * columns)


def pack_elements(weight_OI: Tensor, upper_II: Tensor | None, scores_OI: Tensor, count: int) -> Packed:
    """Round with four bits for the `count` highest scores; U as in `inverse_factor`, None without any token."""
    salient_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    salient_OI.view(-1)[scores_OI.flatten().argsort(descending=True, stable=True)[:count]] = True
    scale_O3 = _scales(weight_OI, salient_OI)
    code_OI = torch.empty_like(weight_OI)
    wanted_OI = weight_OI.clone()
    for column in range(weight_OI.shape[1]):
        mean_O, spread_O, step_O = scale_O3.unbind(1)
        wanted_O, is_salient_O = wanted_OI[:, column], salient_OI[:, column]
        wide_O = (wanted_O / step_O + MIDDLE).round().clamp(0, 2**SALIENT_BITS - 1)
        code_O = torch.where(is_salient_O, wide_O, (wanted_O >= mean_O).float())
        code_OI[:, column] = code_O
        if upper_II is not None:
            level_O = torch.where(is_salient_O, (code_O - MIDDLE) * step_O, mean_O + (2 * code_O - 1) * spread_O)
            miss_O = (wanted_O - level_O) / upper_II[column, column]
            wanted_OI[:, column + 1 :] -= miss_O[:, None] * upper_II[column, column + 1 :]
    tensors = _tensors(code_OI.to(torch.uint8), salient_OI, scale_O3)
    decoded_OI = decode_elements(code_OI, salient_OI, scale_O3)
    note = "" if upper_II is not None else ROUNDED_UNREACHED
    return with_true_size(decoded_OI, tensors, note, {"salient_weights": count})


def decode_elements(code_OI: Tensor, salient_OI: Tensor, scale_O3: Tensor) -> Tensor:
    """Decode the weights [O, I] from codes, mask and scales."""
    mean_O1, spread_O1, step_O1 = scale_O3.split(1, dim=1)
    binary_OI = mean_O1 + (2.0 * code_OI - 1) * spread_O1
    return torch.where(salient_OI, (code_OI - MIDDLE) * step_O1, binary_OI)


def _scales(weight_OI: Tensor, salient_OI: Tensor) -> Tensor:
    """Fit μ, α and the four-bit step of every row [O, 3], each over its own weights, as float16 holds them."""
    binary_OI = (~salient_OI).float()
    count_O1 = binary_OI.sum(1, keepdim=True).clamp_min(1)
    mean_O1 = ((weight_OI * binary_OI).sum(1, keepdim=True) / count_O1).to(SCALE_DTYPE).float()
    spread_O1 = ((weight_OI - mean_O1).abs() * binary_OI).sum(1, keepdim=True) / count_O1
    kept_OI = weight_OI * salient_OI
    largest_O1 = kept_OI.abs().amax(1, keepdim=True) / MIDDLE
    errors, steps = [], []
    for share in CLIPS:
        step_O1 = (largest_O1 * share).clamp_min(SMALLEST_SCALE).to(SCALE_DTYPE).float()
        code_OI = (kept_OI / step_O1 + MIDDLE).round().clamp(0, 2**SALIENT_BITS - 1)
        errors.append((((code_OI - MIDDLE) * step_O1 - kept_OI).square() * salient_OI).sum(1))
        steps.append(step_O1[:, 0])
    best_O = torch.stack(errors).argmin(0)
    step_O1 = torch.stack(steps, dim=1).gather(1, best_O[:, None])
    return torch.cat([mean_O1, spread_O1.to(SCALE_DTYPE).float(), step_O1], dim=1)


def _tensors(code_OI: Tensor, salient_OI: Tensor, scale_O3: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a file: the low bit of every code, the mask, high bits of salient codes, the scales."""
    return {
        "low": pack_codes(code_OI & 1, 1),
        "mask": pack_codes(salient_OI, 1),
        "high": pack_codes(code_OI[salient_OI] >> 1, SALIENT_BITS - 1),
        "scales": scale_O3.to(SCALE_DTYPE),
    }
