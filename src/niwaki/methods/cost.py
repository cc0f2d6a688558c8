"""What a method does to one block, counted: the words in which a method states its cost, next to its code.

A method module may offer `cost(scope, config) -> Work`, what its `compress` does to one block beyond what the walk does
for its `needs`; and, if it stores codes, `stored_bytes(name, rows, columns, target, config)`, what a file holds of one
matrix (TargetError if the target cannot be met). Who offers neither is taken to pass over the weights a few times and
to leave the file as large as it was. `niwaki.compression.plan.planner` turns counts into seconds and bytes.

    Work(selected=scope.weights) + gram_factors(scope) + sweeps(scope)
"""

from dataclasses import dataclass, fields

FLOAT_BYTES = 4
HELD = ("held_bytes", "held_values")  # of two works the larger counts, not the sum


@dataclass(frozen=True)
class Scope:
    """One block as far as costs depend on it: [rows, columns] of the matrices, those with the same input together.

    `windows` of `tokens` each are what the method sees; `reach` is the share of the tokens that a matrix meets.
    """

    groups: tuple[tuple[tuple[int, int], ...], ...]
    windows: int
    tokens: int
    reach: float = 1.0

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """All of them."""
        return [matrix for group in self.groups for matrix in group]

    @property
    def weights(self) -> int:
        """In all matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def inputs(self) -> list[int]:
        """The widths of the inputs, one a group."""
        return [group[0][1] for group in self.groups]


@dataclass(frozen=True)
class Work:
    """Counts that take time in different ways, and memory that is held at the worst moment.

    `forward_tokens` pass the block, `learned_tokens` pass it forwards and backwards. `gram_flops` are products of
    inputs in their own dtype, `product_flops` float32 products of matrices, `solve_flops` factors and triangular
    solves, `sweep_flops` column after column. `selected` weights are ranked, `passed` ones read or written one by
    one as float32. `started` counts small operations one after another. `held_bytes`, and `held_values` in the compute
    dtype: beyond the block, its statistics, and its new weights in float32.
    """

    forward_tokens: float = 0
    learned_tokens: float = 0
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
        found = {entry.name: getattr(self, entry.name) * times for entry in fields(self)}
        return Work(**found | {name: getattr(self, name) for name in HELD})


def masks(scope: Scope) -> Work:
    """Scores, their ranking, and the masks of all matrices, one matrix at a time."""
    largest = max((rows * columns for rows, columns in scope.matrices), default=0)
    return Work(
        selected=scope.weights, passed=6 * scope.weights, started=20 * len(scope.matrices), held_bytes=20 * largest
    )


def gram_factors(scope: Scope) -> Work:
    """One Cholesky and one triangular inverse of the Gram matrix of every group."""
    widest = max(scope.inputs, default=0)
    cubes = sum(width**3 for width in scope.inputs)
    return Work(solve_flops=4 / 3 * cubes, held_bytes=2.5 * widest**2 * FLOAT_BYTES)


def sweeps(scope: Scope, panel: int = 128) -> Work:
    """One pass of every matrix from left to right: inside panels in sequence, between them as products."""
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
    """`times` products of every matrix with the Gram matrix of its input, and what is done with each elementwise."""
    flops = sum(2 * rows * columns**2 for rows, columns in scope.matrices)
    largest = max((rows * columns for rows, columns in scope.matrices), default=0)
    return Work(
        product_flops=times * flops,
        passed=8 * times * scope.weights,
        started=12 * times * len(scope.matrices),
        held_bytes=7 * largest * FLOAT_BYTES,
    )


def learning(scope: Scope, steps: int, batch: int, *, checks: int, copies: float, passes: float = 14) -> Work:
    """`steps` of `batch` windows with gradients, and `checks` looks at the eighth that is held out.

    `copies`: float32 copies of the block that are held meanwhile; `passes` over its weights a step.
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
    """Numbers that autograd keeps of a block for `batch` windows: inputs and outputs of all matrices, twice."""
    widths = sum(scope.inputs) + sum(rows for rows, _ in scope.matrices)
    return 2 * batch * scope.tokens * widths * min(1.0, scope.reach * 2)
