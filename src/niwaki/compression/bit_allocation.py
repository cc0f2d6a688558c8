"""Allocation of bits: which blocks or matrices get more than others. This is niwaki's own method, from no paper.

**Blocks that stay at four bits** (`keep_blocks`). A budget of B bits a weight is kept exactly. With w the weights of a
block, blocks K at 4 bits leave (B·Σw − 4·Σ_K w) / Σ_rest w bits to the others. The budget includes scales and
metadata, because methods define their target that way.

`auto` measures the error s_b of each dense block b at two bits: the mean over tokens of ‖ŷ − y‖² / ‖y‖². Here y is the
output of the block, and ŷ that with all its matrices rounded to nearest. Two bits are four even levels a row, the best
for normal weights. The mean is over ratios per token, because the norm at the start of the next block
divides each token by its own size. A mean over all tokens would show little more than the few tokens of huge
activations. One bit without any compensation leaves the range where errors are small and similar to those of a method
(the log has the numbers).

Then K minimises Σ_b s_b·4^(2 − bits_b), bits_b ∈ {4, rest}: the squared error falls to a quarter with every bit. The
function is convex, so K is empty for equal sensitivities of equal blocks. Only prefixes of the blocks in the order of
s_b/w_b are tried. For blocks of equal size the best K is among them. For other sizes, K differs from the best one by
at most one block. The blocks outside K never get fewer bits than the method needs for any matrix.

**Bits for every matrix by its sensitivity** (`--allocation sensitivity`). The same measure s_m, with one matrix m
rounded at a time, on the first 4,096 tokens. The sum Σ_m s_m·4^(−bits_m) is minimal for Σ_m w_m·bits_m = B·Σw where
bits_m = c + log₄(s_m / w_m). Bits are held between the minimum that the method can store m with and 4; c comes from
bisection.

Cost: three forwards of the calibration windows for `auto`. For `sensitivity` one, and one of 4,096 tokens per matrix.

    niwaki compress MODEL OUT --method squeeze10 --target-bytes 1.7GB --allocation sensitivity --calibration mine.txt
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from niwaki.compression.allocation import Targets
from niwaki.config.targets import Bits, Target
from niwaki.data.stream import Stream
from niwaki.errors import NumericalError, TargetError
from niwaki.model.anatomy import Anatomy
from niwaki.model.decoder import Block, Decoder

KEPT_BITS = 4
SCAN_TOKENS = 4096  # tokens that the sensitivity of a single matrix is measured on
KEEP_SCAN_FORWARDS = 3.0  # forwards of all blocks that `keep_blocks` auto takes
NORMAL_STEP = 0.9957  # standard deviations between four even levels of minimal squared error (Max 1960)


def bits_within(total_bytes: int, decoder: Decoder, anatomy: Anatomy) -> Bits:
    """Return the average bits with which all matrices of `anatomy` together take at most `total_bytes`.

    Raises TargetError for bytes that are not 1 to 8 bits a weight, or matrices that cannot be stored as codes.
    """
    for index, block in enumerate(anatomy.blocks):
        if dense := sorted(set(block.linears) - decoder.packable(index)):
            raise TargetError(
                f"target_bytes: {anatomy.prefix(index)}{dense[0]} can only be stored dense in this model, so its bytes "
                "would stay: give --target in bits instead"
            )
    bits = 8 * total_bytes / anatomy.weights
    if not 1 <= bits <= 8:
        raise TargetError(
            f"target_bytes {total_bytes:,}: that is {bits:.3f} bits for each of {anatomy.weights:,} weights, expected "
            f"1 to 8: give {anatomy.weights // 8:,} to {anatomy.weights:,} bytes"
        )
    return Bits(bits)


def kept_targets(anatomy: Anatomy, target: Target, kept: Collection[int]) -> Targets:
    """Return 4 bits for the blocks `kept`, and for all others the bits that meet `target` on average.

    Raises TargetError for a target that is not bits below 4, for blocks that do not exist, and if too little is left.
    """
    if not isinstance(target, Bits):
        raise TargetError(f"keep_blocks keeps blocks at {KEPT_BITS} bits: it needs bits such as 1.75bit, got {target}")
    if target.bits >= KEPT_BITS:
        raise TargetError(f"keep_blocks: target {target} gives every block {KEPT_BITS} bits or more, drop keep_blocks")
    last = len(anatomy.blocks) - 1
    if missing := [index for index in kept if not 0 <= index <= last]:
        raise TargetError(f"keep_blocks {missing[0]}: the model has blocks 0 to {last}")
    if missing := [index for index in kept if not anatomy.blocks[index].linears]:
        raise TargetError(f"keep_blocks {missing[0]}: blocks leaves this one as it is, so it cannot become codes")
    rest = rest_bits(anatomy, target, kept)
    if rest < 1:
        raise TargetError(
            f"keep_blocks {','.join(map(str, sorted(kept)))}: at {KEPT_BITS} bits they leave {max(rest, 0):.2f} bits "
            f"of target {target} to the others, which need at least 1: keep fewer blocks, or raise the target"
        )
    targets: Targets = []
    for index, block in enumerate(anatomy.blocks):
        targets.append(dict.fromkeys(block.linears, Bits(KEPT_BITS if index in kept else rest)))
    return targets


def rest_bits(anatomy: Anatomy, target: Bits, kept: Collection[int]) -> float:
    """Return the bits a weight that `kept` blocks leave to the others: below zero for too many, 0 for all."""
    kept_weights = sum(anatomy.blocks[index].weights for index in kept)
    others = anatomy.weights - kept_weights
    return (target.bits * anatomy.weights - KEPT_BITS * kept_weights) / others if others else 0.0


def spread_bits(
    anatomy: Anatomy,
    target: Target,
    sensitivities: Sequence[Mapping[str, float]],
    min_bits: Callable[[int, int], float],
) -> Targets:
    """Return bits for every matrix by its sensitivity (see above), `target` on average; all equal if nothing can move.

    `min_bits(rows, columns)`: the minimum of the method for a matrix.
    """
    assert isinstance(target, Bits), "fractional methods meet nothing else"
    matrices = {
        (index, name): linear for index, block in enumerate(anatomy.blocks) for name, linear in block.linears.items()
    }
    weights = {key: linear.rows * linear.columns for key, linear in matrices.items()}
    minimum = {key: min_bits(linear.rows, linear.columns) for key, linear in matrices.items()}
    floor_bits = sum(minimum[key] * weights[key] for key in matrices) / anatomy.weights
    if not floor_bits < target.bits < KEPT_BITS:  # too little for more than the minimum, or enough for four
        return [dict.fromkeys(block.linears, target) for block in anatomy.blocks]
    needs = {key: math.log(max(sensitivities[key[0]][key[1]], 1e-30) / weights[key], 4) for key in matrices}

    def bits(shift: float) -> dict[tuple[int, str], float]:
        return {key: max(min(needs[key] + shift, KEPT_BITS), minimum[key]) for key in matrices}

    low, high = KEPT_BITS * -1.0 - max(needs.values()), KEPT_BITS - min(needs.values())
    for _ in range(100):
        middle = (low + high) / 2
        spent = sum(given * weights[key] for key, given in bits(middle).items())
        low, high = (low, middle) if spent > target.bits * anatomy.weights else (middle, high)
    spread = bits(low)
    return [{name: Bits(spread[index, name]) for name in block.linears} for index, block in enumerate(anatomy.blocks)]


def choose_kept(
    anatomy: Anatomy, target: Bits, sensitivities: Sequence[float], min_bits: Callable[[int, int], float]
) -> list[int]:
    """Return the blocks to keep at 4 bits, ascending (see above); none if that predicts the smallest error."""
    weights = {index: block.weights for index, block in enumerate(anatomy.blocks) if block.linears}
    order = sorted(weights, key=lambda index: -sensitivities[index] / weights[index])
    floor = max(min_bits(m.rows, m.columns) for block in anatomy.blocks for m in block.linears.values())
    best: list[int] = []
    min_error = _predicted(sensitivities, best, target.bits)
    for count in range(1, len(order)):
        rest = rest_bits(anatomy, target, order[:count])
        if rest < floor:
            break
        error = _predicted(sensitivities, order[:count], rest)
        if error < min_error * (1 - 1e-9):  # rounding of equal sums decides nothing
            best, min_error = order[:count], error
    return sorted(best)


def _predicted(sensitivities: Sequence[float], kept: Collection[int], rest: float) -> float:
    """Return the predicted error if the `kept` blocks have 4 bits and the others `rest`."""
    bits = (KEPT_BITS if index in kept else rest for index in range(len(sensitivities)))
    return sum(s * 4.0 ** (2 - b) for s, b in zip(sensitivities, bits, strict=True))


def sensitivity(block: Block, stream: Stream) -> float:
    """Return s_b of a dense block at the inputs of `stream`, which does not advance; the block does not change.

    Raises NumericalError if outputs of the block at two bits are not finite.
    """
    return _errors(block, stream, [list(block.linears)], len(stream) * stream.ids_ST.shape[1])[0]


def sensitivities(block: Block, stream: Stream) -> dict[str, float]:
    """Return s_m of every matrix of the block, as `sensitivity` does for the block."""
    errors = _errors(block, stream, [[name] for name in block.linears], SCAN_TOKENS)
    return dict(zip(block.linears, errors, strict=True))


@torch.no_grad()
def _errors(block: Block, stream: Stream, sets: Sequence[Sequence[str]], max_tokens: int) -> list[float]:
    """Return the mean relative error of the output over the first tokens, with each set of matrices at two bits."""
    dense = {name: block.weight(name).clone() for name in block.linears}
    coarse = {name: _two_bits(weight_OI) for name, weight_OI in dense.items()}
    totals, tokens = [0.0] * len(sets), 0
    for rows in stream.slices():
        if tokens >= max_tokens:
            break
        x_BTD = stream.hidden.read(rows)
        call = stream.call(rows, block.index)
        y_BTD = block.run(call, x_BTD).float()
        size_BT = y_BTD.square().sum(-1).clamp_min(1e-30)
        tokens += size_BT.numel()
        for number, names in enumerate(sets):
            _fill(block, coarse, names)
            error_BT = (block.run(call, x_BTD).float() - y_BTD).square().sum(-1)
            _fill(block, dense, names)
            totals[number] += float((error_BT / size_BT).sum(dtype=torch.float64))
    if not all(map(math.isfinite, totals)):
        raise NumericalError(
            f"block {block.index} puts out NaN or infinite values with its matrices at two bits: "
            "name the blocks for --keep-blocks, or use a wider dtype"
        )
    return [total / tokens for total in totals]


def _two_bits(weight_OI: Tensor) -> Tensor:
    """Return every weight at the nearest of four levels a row, mean ± ½ and ± 1½ steps."""
    wide_OI = weight_OI.float()
    middle_O1 = wide_OI.mean(1, keepdim=True)
    step_O1 = (NORMAL_STEP * wide_OI.std(1, correction=0, keepdim=True)).clamp_min(1e-30)
    level_OI = ((wide_OI - middle_O1) / step_O1).floor().clamp(-2, 1) + 0.5
    return (middle_O1 + level_OI * step_O1).to(weight_OI.dtype)


def _fill(block: Block, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for name in names:
        block.weight(name).copy_(weights[name])
