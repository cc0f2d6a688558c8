"""Counts of the work of a method on one block: the terms in which a method states its cost.

A method may state `cost(scope, config) -> Work`: the work of its `compress` on one block, without the work of the walk
for its `needs`. The default is a few passes over the weights. A method that stores codes also states `stored_bytes`
(see `methods.method`). `niwaki.compression.plan.planner` turns counts into seconds and bytes.

    Work(selected=scope.weights) + gram_factors(scope) + sweeps(scope)
"""

from dataclasses import dataclass, fields

FLOAT_BYTES = 4
HELD = ("held_bytes", "held_values")  # a sum of works has the larger one of the two


@dataclass(frozen=True)
class Scope:
    """Sizes of one block: [rows, columns] of the matrices, grouped by input.

    The method sees `windows` windows of `tokens` tokens each; `reach` is the share of the tokens that reach a matrix.
    """

    groups: tuple[tuple[tuple[int, int], ...], ...]
    windows: int
    tokens: int
    reach: float = 1.0

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Return [rows, columns] of all matrices."""
        return [matrix for group in self.groups for matrix in group]

    @property
    def weights(self) -> int:
        """Return the number of weights in all matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def inputs(self) -> list[int]:
        """Return the widths of the inputs, one per group."""
        return [group[0][1] for group in self.groups]


@dataclass(frozen=True)
class Work:
    """Counts of work, one field per kind of time, and the peak of memory.

    - `forward_tokens` pass the block, `learned_tokens` pass it forwards and backwards.
    - `gram_flops` are products of inputs in their own dtype, `product_flops` float32 products of matrices.
    - `solve_flops` are factors and triangular solves, `sweep_flops` columns in sequence.
    - `selected` weights are ranked; `passed` ones are read or written one by one as float32.
    - `logit_tokens` get their logits from both models, where a block's error reaches the last block.
    - `started` counts small operations in sequence.
    - `held_bytes`, and `held_values` in the compute dtype, are memory beyond the block, its statistics, and its new
      weights in float32.
    """

    forward_tokens: float = 0
    learned_tokens: float = 0
    logit_tokens: float = 0
    gram_flops: float = 0
    product_flops: float = 0
    solve_flops: float = 0
    sweep_flops: float = 0
    selected: float = 0
    passed: float = 0
    started: float = 0
    held_bytes: float = 0
    held_values: float = 0

    def __add__(self, other: "Work") -> "Work":
        sums = {entry.name: getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)}
        return Work(**sums | {name: max(getattr(self, name), getattr(other, name)) for name in HELD})

    def __mul__(self, times: float) -> "Work":
        scaled = {entry.name: getattr(self, entry.name) * times for entry in fields(self)}
        return Work(**scaled | {name: getattr(self, name) for name in HELD})


def masks(scope: Scope) -> Work:
    """Count scores, their ranking, and the masks of all matrices, one matrix at a time."""
    largest = max((rows * columns for rows, columns in scope.matrices), default=0)
    return Work(
        selected=scope.weights, passed=6 * scope.weights, started=20 * len(scope.matrices), held_bytes=20 * largest
    )


def gram_factors(scope: Scope) -> Work:
    """Count one Cholesky and one triangular inverse of the Gram matrix of every group."""
    widest = max(scope.inputs, default=0)
    cubes = sum(width**3 for width in scope.inputs)
    return Work(solve_flops=4 / 3 * cubes, held_bytes=2.5 * widest**2 * FLOAT_BYTES)


def sweeps(scope: Scope, panel: int = 128) -> Work:
    """Count one pass of every matrix from left to right: inside panels in sequence, between them as products."""
    flops = sum(rows * columns**2 for rows, columns in scope.matrices)
    inside = sum(rows * columns * min(panel, columns) for rows, columns in scope.matrices)
    panels = sum(-(-columns // panel) for _, columns in scope.matrices)
    largest = max((rows * columns for rows, columns in scope.matrices), default=0)
    return Work(
        product_flops=flops,
        sweep_flops=inside,
        passed=4 * scope.weights,
        started=12 * panels,
        held_bytes=4 * largest * FLOAT_BYTES,
    )


def products(scope: Scope, times: float) -> Work:
    """Count `times` products of every matrix with the Gram matrix of its input, with elementwise work on each."""
    flops = sum(2 * rows * columns**2 for rows, columns in scope.matrices)
    largest = max((rows * columns for rows, columns in scope.matrices), default=0)
    return Work(
        product_flops=times * flops,
        passed=8 * times * scope.weights,
        started=12 * times * len(scope.matrices),
        held_bytes=7 * largest * FLOAT_BYTES,
    )


def learning(scope: Scope, steps: int, batch: int, *, checks: int, copies: float, passes: float = 14) -> Work:
    """Count `steps` of `batch` windows with gradients, and `checks` measurements of the eighth that is held out.

    `copies`: float32 copies of the block in memory; `passes` over its weights per step.
    """
    held = scope.windows // 8 or scope.windows
    batch = min(batch, max(1, scope.windows - scope.windows // 8))
    return Work(
        learned_tokens=steps * batch * scope.tokens,
        forward_tokens=(checks + 1) * held * scope.tokens,
        passed=(steps * passes + checks * 6) * scope.weights,
        started=steps * (120 + 16 * len(scope.matrices)) + (checks + 1) * held * 60,
        held_bytes=copies * scope.weights * FLOAT_BYTES,
        held_values=graph(scope, batch),
    )


def graph(scope: Scope, batch: int) -> float:
    """Return the number of values that autograd keeps for `batch` windows: twice the inputs and outputs of matrices."""
    widths = sum(scope.inputs) + sum(rows for rows, _ in scope.matrices)
    return 2 * batch * scope.tokens * widths * min(1.0, scope.reach * 2)
