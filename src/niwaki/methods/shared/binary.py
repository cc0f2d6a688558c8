"""Binary weights: scales for signs, the choice of salient columns, the split of a row in two, and the size of it all.

Shared by the baselines that keep one sign per weight (`billm`, `arb`, `ptq161`). Their papers give no file format. So
every method here builds the tensors that a file would have to hold (packed bits, float16 scales), and decodes its
weights from exactly these. It reports their size as `method_bytes` and `method_bits`. The file holds the decoded
weights.

Legend: O rows, I columns, C columns of one block.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from niwaki.config.targets import Bits, Target
from niwaki.data.statistics import Statistics
from niwaki.errors import TargetError
from niwaki.formats.packed import Packed
from niwaki.formats.quantized import SCALE_DTYPE
from niwaki.methods.cost import Scope, Work
from niwaki.methods.shared.column_sweep import inverse_factor
from niwaki.model.decoder import Block

BINARIZED_UNREACHED = "no calibration token reached this matrix: binarised by its weights alone"
MAX_BITS = 8.0  # of a target
PASSES = 30  # over the weights per trial: masks, two means, signs, differences, squares summed in float64
SPLIT_FRACS = torch.linspace(0.1, 0.9, 81, dtype=torch.float64)  # of the weights in order of their magnitude

Coded = TypeVar("Coded")


def half(values: Tensor) -> Tensor:
    """Round to numbers that float16 holds exactly, as float32."""
    return values.to(SCALE_DTYPE).float()


def signs(bits: Tensor) -> Tensor:
    """Return +1 for a set bit, −1 otherwise."""
    return bits.to(torch.float32) * 2 - 1


def fit_row(weight_OC: Tensor, keep_OC: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Fit mean μ (0 unless `mean`) and scale α [O], as stored, so that w ≈ μ + α·sign(w − μ) for kept weights.

    α = mean |w − μ| is the least squares choice for these signs. A row that keeps nothing gets zeros.
    """
    count_O = keep_OC.sum(1).clamp_min(1)
    mean_O = half((weight_OC * keep_OC).sum(1) / count_O) if mean else weight_OC.new_zeros(len(weight_OC))
    scale_O = half(((weight_OC - mean_O[:, None]).abs() * keep_OC).sum(1) / count_O)
    return mean_O, scale_O


def binarization_error(weight_OC: Tensor, keep_OC: Tensor, mean: bool, orders: int = 1) -> Tensor:
    """Return the squared error of the kept weights after `orders` binarizations, each of the error before it."""
    for _ in range(orders):
        mean_O, scale_O = fit_row(weight_OC, keep_OC, mean)
        centred_OC = weight_OC - mean_O[:, None]
        weight_OC = centred_OC - signs(centred_OC >= 0) * scale_O[:, None]
    return (weight_OC.square() * keep_OC).sum(dtype=torch.float64)


def choose_salient(weight_OC: Tensor, score_C: Tensor, max_count: int, mean: bool) -> Tensor:
    """Return the mask [C] of the salient columns: the 1 to `max_count` highest scores that leave the least error.

    The error is that of one binarization for the salient columns and one for the others (BiLLM, Algorithm 2).
    """
    order_C = score_C.argsort(descending=True, stable=True)
    ordered_OC = weight_OC[:, order_C]
    keep_OC = torch.ones_like(ordered_OC, dtype=torch.bool)
    errors = [
        binarization_error(ordered_OC[:, :count], keep_OC[:, :count], mean)
        + binarization_error(ordered_OC[:, count:], keep_OC[:, count:], mean)
        for count in range(1, min(max_count, len(order_C)) + 1)
    ]
    salient_C = torch.zeros_like(score_C, dtype=torch.bool)
    if errors:
        salient_C[order_C[: int(torch.stack(errors).argmin()) + 1]] = True
    return salient_C


def split_by_size(weight_OC: Tensor, keep_OC: Tensor, mean: bool, orders: int = 1) -> Tensor:
    """Return the mask [O, C] of the kept weights above the magnitude p* that splits them best into two groups.

    p* is one of 81 thresholds from the 10th to the 90th percentile of the kept magnitudes. It leaves the least error
    with a scale (and mean) per row for each group.
    """
    size_OC = weight_OC.abs()
    size_N = size_OC[keep_OC].sort().values
    if not len(size_N):
        return torch.zeros_like(keep_OC)
    positions = (SPLIT_FRACS * (len(size_N) - 1)).round().long().to(size_N.device)
    splits = size_N[positions].unique()
    errors = [
        binarization_error(weight_OC, keep_OC & (size_OC <= split), mean, orders)
        + binarization_error(weight_OC, keep_OC & (size_OC > split), mean, orders)
        for split in splits
    ]
    large_OC: Tensor = size_OC > splits[torch.stack(errors).argmin()]
    return keep_OC & large_OC


def sweep_blocks(
    weight_OI: Tensor,
    upper_II: Tensor,
    width: int,
    encode: Callable[[Tensor, Tensor], tuple[Coded, Tensor]],
) -> list[Coded]:
    """Code blocks of `width` columns from left to right; the columns after a block make up for its error.

    `encode` takes the present weights [O, C] and the diagonal of U [C]. It returns codes, and the weights they stand
    for. With H⁻¹ = UᵀU, the error E of block b changes the columns r after it by −E·U_bb⁻¹·U_br. That is the exact
    minimizer of ‖(W − Ŵ)X‖² over them.
    """
    wanted_OI = weight_OI.clone()
    codes = []
    for start in range(0, weight_OI.shape[1], width):
        end = min(start + width, weight_OI.shape[1])
        wanted_OC = wanted_OI[:, start:end].contiguous()
        coded, values_OC = encode(wanted_OC, upper_II.diagonal()[start:end])
        codes.append(coded)
        step_OC = torch.linalg.solve_triangular(
            upper_II[start:end, start:end], wanted_OC - values_OC, upper=True, left=False
        )
        wanted_OI[:, end:].addmm_(step_OC, upper_II[start:end, end:], alpha=-1)
    return codes


def factors(
    block: Block, statistics: Mapping[str, Statistics], names: Sequence[str], damping_frac: float
) -> Iterator[tuple[str, Tensor, str]]:
    """Yield name, U [I, I] (see `column_sweep`) and note of every matrix; one factor for all with the same input.

    U is the identity if no token came: nothing is compensated, and columns are ranked by their weights alone.
    """
    for sharing in block.anatomy.sharing(names):
        group, note = statistics[sharing[0]], ""
        if group.tokens:
            upper_II, _ = inverse_factor(group.gram_II, damping_frac)
        else:
            weight_OI = block.weight(sharing[0])
            upper_II, note = torch.eye(weight_OI.shape[1], device=weight_OI.device), BINARIZED_UNREACHED
        for name in sharing:
            yield name, upper_II, note


def trials(scope: Scope, width: int, salient: int) -> Work:
    """Count the trials of `choose_salient` and `split_by_size` on blocks of `width`, up to `salient` columns each."""
    blocks = sum(-(-columns // width) for _, columns in scope.matrices)
    return Work(passed=PASSES * (salient + 200) * scope.weights, started=blocks * (salient + 200) * 12)


def check_reach(name: str, rows: int, columns: int, stored_bytes: int, target: Target) -> None:
    """Raise TargetError, with the bits that a matrix needs, if the target allows fewer."""
    assert isinstance(target, Bits)
    if stored_bytes > target.bytes_in(rows, columns):
        needed = math.ceil(8000 * stored_bytes / (rows * columns)) / 1000
        hint = f"ask for {needed:.3f}bit or more" if needed <= MAX_BITS else "it is too small for this method"
        raise TargetError(
            f"target {target}: {name}, {rows}×{columns}, needs {needed:.3f} bits with this method: {hint}"
        )


def with_true_size(weight_OI: Tensor, tensors: Mapping[str, Tensor], note: str, detail: Mapping[str, Any]) -> Packed:
    """Return the record of decoded weights, with the size of the `tensors` that they come from."""
    method_bytes = sum(tensor.nbytes for tensor in tensors.values())
    size = {"method_bytes": method_bytes, "method_bits": 8 * method_bytes / weight_OI.numel()}
    return Packed("dense", weight_OI, note, {**size, **detail})
