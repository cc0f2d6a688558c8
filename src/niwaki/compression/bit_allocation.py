"""Which blocks or matrices get more bits than others. This is niwaki's own, no paper's.

**Blocks that stay at four bits** (`keep_blocks`). A budget of B bits a weight is kept exactly: blocks K at 4 bits leave
(B·Σw − 4·Σ_K w) / Σ_rest w bits to the rest, w being the weights of a block. Everything stored counts, because methods
read their target so.

`auto` measures on the dense model what two bits do to each block b: s_b, the mean over tokens of ‖ŷ − y‖² / ‖y‖²,
y the block's output and ŷ that with all its matrices rounded to nearest at two bits (four even levels a row, the best
ones for normal weights). Token by token, because the norm at the start of the next block divides each by its own size:
a mean over all would see little else than the few tokens of huge activations. Two bits, because one without any
compensation leaves the range where errors are small and alike to those of a method (docs/log).

Then K minimises Σ_b s_b·4^(2 − bits_b), the squared error falling to a quarter with every bit, bits_b ∈ {4, rest}. The
function is convex, so with equal sensitivities of equal blocks K is empty. Only prefixes of the blocks in order of
s_b/w_b are tried: that is exact for equal blocks, and as near as one block for others. The rest never gets less than
the method needs for any matrix.

**Every matrix what it needs** (`--allocation sensitivity`). The same measure, one matrix m rounded at a time, on the
first 4,096 tokens: s_m. Least Σ_m s_m·4^(−bits_m) for Σ_m w_m·bits_m = B·Σw is reached where bits_m = c +
log₄(s_m / w_m), held between the least that the method can store m with and 4, c found by bisection.

Cost: of `auto` three forwards of the calibration windows; of `sensitivity` one, and one of 4,096 tokens a matrix.

    niwaki compress MODEL OUT --method squeeze10 --target-bytes 1.7GB --allocation sensitivity --calibration mine.txt
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from niwaki.compression.allocation import Targets
from niwaki.config.recipe import Bits, Target
from niwaki.data.stream import Stream
from niwaki.errors import NumericalError, TargetError
from niwaki.model.anatomy import Anatomy
from niwaki.model.decoder import Block, Decoder

KEPT_BITS = 4
SCAN_TOKENS = 4096  # tokens that the sensitivity of a single matrix is measured on
KEEP_SCAN_FORWARDS = 3.0  # forwards of all blocks that `keep_blocks` auto takes
NORMAL_STEP = 0.9957  # standard deviations between four even levels with the least squared error (Max 1960)


def bits_within(total_bytes: int, decoder: Decoder) -> Bits:
    """The average bits with which all matrices of `decoder` together take at most `total_bytes`.

    Raises TargetError for bytes that are no 1 to 8 bits a weight, or matrices that are not stored as codes.
    """
    anatomy = decoder.anatomy
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
    """4 bits for the blocks `kept`, and for all others what meets `target` on average.

    Raises TargetError for a target that is no bits below 4, for blocks that do not exist, and if too little is left.
    """
    if not isinstance(target, Bits):
        raise TargetError(f"keep_blocks keeps blocks at {KEPT_BITS} bits: it needs bits such as 1.75bit, got {target}")
    if target.bits >= KEPT_BITS:
        raise TargetError(f"keep_blocks: target {target} gives every block {KEPT_BITS} bits or more, drop keep_blocks")
    last = len(anatomy.blocks) - 1
    if missing := [index for index in kept if not 0 <= index <= last]:
        raise TargetError(f"keep_blocks {missing[0]}: the model has blocks 0 to {last}")
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
    """Bits a weight that `kept` blocks leave to the others: below zero if too many are kept, 0 if all are."""
    kept_weights = sum(anatomy.blocks[index].weights for index in kept)
    others = anatomy.weights - kept_weights
    return (target.bits * anatomy.weights - KEPT_BITS * kept_weights) / others if others else 0.0


def spread_bits(
    anatomy: Anatomy,
    target: Target,
    sensitivities: Sequence[Mapping[str, float]],
    min_bits: Callable[[int, int], float],
) -> Targets:
    """Bits for every matrix by its sensitivity (see above), `target` on average; all alike where nothing can move.

    `min_bits(rows, columns)`: what the method needs at least.
    """
    assert isinstance(target, Bits), "fractional methods meet nothing else"
    matrices = {
        (index, name): linear for index, block in enumerate(anatomy.blocks) for name, linear in block.linears.items()
    }
    weights = {key: linear.rows * linear.columns for key, linear in matrices.items()}
    least = {key: min_bits(linear.rows, linear.columns) for key, linear in matrices.items()}
    floor_bits = sum(least[key] * weights[key] for key in matrices) / anatomy.weights
    if not floor_bits < target.bits < KEPT_BITS:  # too little for anything but one bit, or enough for four
        return [dict.fromkeys(block.linears, target) for block in anatomy.blocks]
    needs = {key: math.log(max(sensitivities[key[0]][key[1]], 1e-30) / weights[key], 4) for key in matrices}

    def bits(shift: float) -> dict[tuple[int, str], float]:
        return {key: min(max(needs[key] + shift, least[key]), KEPT_BITS) for key in matrices}

    low, high = KEPT_BITS * -1.0 - max(needs.values()), KEPT_BITS - min(needs.values())
    for _ in range(100):
        middle = (low + high) / 2
        spent = sum(given * weights[key] for key, given in bits(middle).items())
        low, high = (low, middle) if spent > target.bits * anatomy.weights else (middle, high)
    found = bits(low)
    return [{name: Bits(found[index, name]) for name in block.linears} for index, block in enumerate(anatomy.blocks)]


def choose_kept(
    anatomy: Anatomy, target: Bits, sensitivities: Sequence[float], min_bits: Callable[[int, int], float]
) -> list[int]:
    """The blocks to keep at 4 bits, ascending (see above); none if that predicts the least error."""
    order = sorted(range(len(sensitivities)), key=lambda index: -sensitivities[index] / anatomy.blocks[index].weights)
    floor = max(min_bits(m.rows, m.columns) for block in anatomy.blocks for m in block.linears.values())
    best: list[int] = []
    min_error = _predicted(sensitivities, best, target.bits)
    for count in range(1, len(order)):
        rest = rest_bits(anatomy, target, order[:count])
        if rest < floor:
            break
        error = _predicted(sensitivities, order[:count], rest)
        if error < min_error * (1 - 1e-9):  # no choice by the rounding of equal sums
            best, min_error = order[:count], error
    return sorted(best)


def _predicted(sensitivities: Sequence[float], kept: Collection[int], rest: float) -> float:
    """Σ s_b·4^(2 − bits_b)."""
    bits = (KEPT_BITS if index in kept else rest for index in range(len(sensitivities)))
    return sum(s * 4.0 ** (2 - b) for s, b in zip(sensitivities, bits, strict=True))


def sensitivity(block: Block, stream: Stream) -> float:
    """s_b of a dense block at the inputs of `stream`, which does not move on; the block is left as it was.

    Raises NumericalError if the block at two bits leaves the finite numbers.
    """
    return _errors(block, stream, [list(block.linears)], len(stream) * stream.ids_ST.shape[1])[0]


def sensitivities(block: Block, stream: Stream) -> dict[str, float]:
    """s_m of every matrix of the block, as `sensitivity`."""
    errors = _errors(block, stream, [[name] for name in block.linears], SCAN_TOKENS)
    return dict(zip(block.linears, errors, strict=True))


@torch.no_grad()
def _errors(block: Block, stream: Stream, sets: Sequence[Sequence[str]], max_tokens: int) -> list[float]:
    """Mean relative error of the block's output over its first tokens, with each set of matrices at two bits."""
    dense = {name: block.weight(name).clone() for name in block.linears}
    coarse = {name: _two_bits(weight_OI) for name, weight_OI in dense.items()}
    totals, tokens = [0.0] * len(sets), 0
    for rows in stream.slices():
        if tokens >= max_tokens:
            break
        x_BTD = stream.hidden.read(rows)
        call = stream.call(len(x_BTD), block.index)
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
    """Every weight at the nearest of four levels a row, mean ± ½ and ± 1½ steps."""
    wide_OI = weight_OI.float()
    middle_O1 = wide_OI.mean(1, keepdim=True)
    step_O1 = (NORMAL_STEP * wide_OI.std(1, correction=0, keepdim=True)).clamp_min(1e-30)
    level_OI = ((wide_OI - middle_O1) / step_O1).floor().clamp(-2, 1) + 0.5
    return (middle_O1 + level_OI * step_O1).to(weight_OI.dtype)


def _fill(block: Block, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for name in names:
        block.weight(name).copy_(weights[name])
