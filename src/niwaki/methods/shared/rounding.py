"""Rounding of a matrix to codes so that its outputs survive: grids, the sweep of GPTQ, and coordinate descent.

Everything minimizes ‖(W − Q)X‖² + λ‖W − Q‖² row by row, with H = XᵀX + λI:

- `round_by_sweep` is GPTQ's pass (Frantar et al. 2023). It rounds column k, and the error moves to the columns after it
  along U, H⁻¹ = UᵀU. A group's grid is fitted when the pass reaches it, to the present weights.
- `coordinate_descent` rounds again with all codes in place. Column k takes the level nearest to its minimizer given all
  others, q_k + (R_k / H_kk) with R = (W − Q)H. The error never rises. Few codes change, so that a pass costs less than
  the sweep.
- `refit_scales` solves for all scales and free offsets of a row at once, for fixed codes. The error never rises.

With a mask (`keep_OI`) a pruned weight has the code of zero and no other. On a symmetric grid it stays exactly zero.

Legend: O rows, I columns, C columns of a group, G groups, K unknowns of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from niwaki.config.targets import CODE_WIDTHS, Bits, Target
from niwaki.errors import TargetError
from niwaki.formats.quantized import SCALE_DTYPE, TILE, QuantizedColumns, centre
from niwaki.kernels.codes import span, sweep_codes, sweep_fitted
from niwaki.kernels.types import Fit, Grid
from niwaki.methods.cost import FLOAT_BYTES, Scope, Work, products

ROUNDED_UNREACHED = "no calibration token reached this matrix: rounded to nearest"
SMALLEST_SCALE = 2.0**-24  # of float16: no stored scale may become zero
CLIPS = torch.linspace(0.4, 1.0, 25).tolist()
ZERO_SHIFTS = (0, -1, 1)  # of the zero code that a range has by itself
FITTED_ON_CPU, FITTED_ON_GPU = 2**17, 2**26  # weights whose grids are fitted at a time
CHANGED_FRAC = 0.1  # of the codes, in a round: a code that does not change has no error to pass on


@dataclass(frozen=True)
class Group:
    """Columns `start` to `end` with one scale per row: codes of `bits` bits on a `grid` (`formats.quantized.GRIDS`)."""

    start: int
    end: int
    bits: int
    grid: str

    @property
    def slice(self) -> slice:
        """Return the index of the columns."""
        return slice(self.start, self.end)


def groups_of(start: int, end: int, bits: int, grid: str, width: int) -> list[Group]:
    """Cut columns `start` to `end` into groups of `width` columns (0: one group); the last one may be shorter."""
    width = width or max(end - start, 1)
    return [Group(first, min(first + width, end), bits, grid) for first in range(start, end, width)]


def check_group(columns: int, width: int, name: str) -> None:
    """Raise TargetError unless groups of `width` columns divide the matrix."""
    if width and columns % width:
        fitting = [g for g in (256, 128, 64, 32, 16, 8) if columns % g == 0]
        hint = f"for example {fitting[0]}, or 0 for one scale a row" if fitting else "use 0 for one scale a row"
        raise TargetError(f"{name}: groups of {width} do not divide its {columns} columns: {hint}")


def code_width(target: Target) -> int:
    """Return the bits of a target as one width for all codes. Raise TargetError for widths other than 2, 3, 4 and 8."""
    assert isinstance(target, Bits)
    if target.bits not in CODE_WIDTHS:
        raise TargetError(f"target {target}: this method rounds to 2, 3, 4 or 8 bits (squeeze10 mixes widths)")
    return int(target.bits)


def uniform_bytes(name: str, rows: int, columns: int, bits: int, group: int, symmetric: bool) -> int:
    """Return the bytes of a matrix with codes of one width. Raise TargetError for groups that do not divide it."""
    check_group(columns, group, name)
    count = -(-columns // (group or columns))
    planes = -(-rows // TILE) * TILE * bits * -(-columns // 8)
    return planes + 2 * rows * count + (0 if symmetric else bits * -(-rows * count // 8))


def grids(scope: Scope, clip: bool) -> Work:
    """Count the fit of a grid to every group, the rounding and the packing.

    With `clip`, the ranges and zero codes of `fit_grid` as of a grid of at most three bits.
    """
    largest = max((rows * columns for rows, columns in scope.matrices), default=0)
    passed = (10 + 7 * (len(CLIPS) * len(ZERO_SHIFTS) if clip else 1)) * scope.weights
    return Work(passed=passed, started=60 * len(scope.matrices), held_bytes=6 * largest * FLOAT_BYTES)


def rounds_of(scope: Scope, rounds: int) -> Work:
    """Count the work of `improve`: products for scales and codes, and a sweep over all columns, `rounds` + 1 times."""
    sweep_flops = sum(CHANGED_FRAC * 2 * rows * columns**2 for rows, columns in scope.matrices)
    largest = max((rows * columns for rows, columns in scope.matrices), default=0)
    once = products(scope, 3) + Work(sweep_flops=sweep_flops, held_bytes=16 * largest * FLOAT_BYTES)
    return once * (rounds + 1) if rounds else Work()


@dataclass(frozen=True)
class Rounded:
    """Codes of a matrix with their scales, columns in the order of the sweep."""

    groups: Sequence[Group]
    code_OI: Tensor
    scale_OG: Tensor
    offset_OG: Tensor

    @property
    def grid(self) -> Grid:
        """Return the levels of every column, as the kernels take them."""
        device = self.scale_OG.device
        sizes = torch.tensor([group.end - group.start for group in self.groups])
        group_I = torch.arange(len(self.groups)).repeat_interleave(sizes).to(torch.int32)
        tops = torch.tensor([2.0**group.bits - 1 for group in self.groups])
        return Grid(self.scale_OG, self.offset_OG, group_I.to(device), tops.repeat_interleave(sizes).to(device))

    @property
    def values_OI(self) -> Tensor:
        """Return the weights [O, I] that the codes stand for."""
        group_I = self.grid.group_I.long()
        return self.code_OI * self.scale_OG[:, group_I] + self.offset_OG[:, group_I]

    def parts(self, order_I: Tensor) -> list[QuantizedColumns]:
        """Return the stored form: one part per run of equal groups. Column j is column `order_I[j]` of the original.

        The columns of a part must ascend. Scales must be exact in float16 (see `storable`).
        """
        parts = []
        for numbers in _runs(self.groups):
            first = self.groups[numbers[0]]
            columns = slice(first.start, self.groups[numbers[-1]].end)
            picked = slice(numbers[0], numbers[-1] + 1)
            scale_OG, offset_OG = self.scale_OG[:, picked], self.offset_OG[:, picked]
            parts.append(
                QuantizedColumns(
                    columns_C=order_I[columns],
                    bits=first.bits,
                    grid=first.grid,
                    group=first.end - first.start,
                    code_OC=self.code_OI[:, columns],
                    scale_OG=scale_OG.to(SCALE_DTYPE),
                    offset_OG=offset_OG.to(SCALE_DTYPE) if first.grid == "free" else None,
                    zero_OG=(-offset_OG / scale_OG).round().to(torch.uint8) if first.grid == "affine" else None,
                )
            )
        return parts

    def split(self, rows: Sequence[int]) -> list["Rounded"]:
        """Split into matrices with these numbers of rows, from top to bottom."""
        tensors = (self.code_OI.split(rows), self.scale_OG.split(rows), self.offset_OG.split(rows))
        return [Rounded(self.groups, *own) for own in zip(*tensors, strict=True)]

    def storable(self) -> "Rounded":
        """Return the codes with scales and offsets rounded as they are stored."""
        scale_OG = self.scale_OG.to(SCALE_DTYPE).float().clamp_min(SMALLEST_SCALE)
        free_G = torch.tensor([group.grid == "free" for group in self.groups], device=scale_OG.device)
        zero_OG = self.offset_OG / self.scale_OG
        offset_OG = torch.where(free_G, self.offset_OG.to(SCALE_DTYPE).float(), zero_OG * scale_OG)
        return replace(self, scale_OG=scale_OG, offset_OG=offset_OG)


def fit_grid(weight_OC: Tensor, group: Group, clip: bool, importance_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fit scale and offset [O, 1] for the columns of one group, or [O, G, 1] for [O, G, C] of equal groups.

    The range is min to max. With `clip` it is one of 25 shrunk ranges (0.4 to 1): that of the least error Σ h·(w − q)².
    Without `importance_C`, h is one. An affine grid of at most three bits tries every range with its own zero code and
    with both neighbors. One bit has its levels at mean ± mean deviation, the least
    squares choice for the signs.
    """
    if group.bits == 1:
        middle_O1 = weight_OC.mean(-1, keepdim=True) if group.grid == "free" else torch.zeros_like(weight_OC[..., :1])
        spread_O1 = (weight_OC - middle_O1).abs().mean(-1, keepdim=True).clamp_min(SMALLEST_SCALE)
        return 2 * spread_O1, middle_O1 - spread_O1
    fit = _levels_fit(group)
    best = span(weight_OC, fit)
    if not clip:
        return best
    min_O1 = torch.full_like(best[0], torch.inf)
    for share in CLIPS:
        scale_O1, own_O1 = span(weight_OC, fit, share)
        for shift in ZERO_SHIFTS if group.grid == "affine" and group.bits <= 3 else (0,):
            zero_O1 = (shift - own_O1 / scale_O1).round_().clamp_(0, fit.top)
            offset_O1 = -zero_O1 * scale_O1 if shift else own_O1
            miss_OC = ((weight_OC - offset_O1) / scale_O1).round_().clamp_(0, fit.top).mul_(scale_O1).add_(offset_O1)
            miss_OC.sub_(weight_OC).square_()
            if importance_C is not None:
                miss_OC.mul_(importance_C)
            error_O1 = miss_OC.sum(-1, keepdim=True)
            better_O1 = error_O1 < min_O1
            min_O1 = torch.where(better_O1, error_O1, min_O1)
            best = torch.where(better_O1, scale_O1, best[0]), torch.where(better_O1, offset_O1, best[1])
    return best


def _levels_fit(group: Group) -> Fit:
    """Return the rule that makes the levels of a group of several bits from its weights."""
    grid = "midrise" if group.grid == "free" else group.grid
    return Fit(2**group.bits - 1, None if grid == "affine" else centre(group.bits, grid), SMALLEST_SCALE)


def nearest(weight_OI: Tensor, groups: Sequence[Group], clip: bool, importance_I: Tensor | None = None) -> Rounded:
    """Round every weight to its nearest level, on grids of `fit_grid`.

    Equal groups are fitted together, as many rows at a time as a cache holds, or as a GPU needs to be busy.
    """
    rounded = _empty(weight_OI, groups)
    step = max(1, (FITTED_ON_GPU if weight_OI.is_cuda else FITTED_ON_CPU) // max(1, weight_OI.shape[1]))
    for numbers in _equal_runs(groups):
        first, width = groups[numbers[0]], groups[numbers[0]].end - groups[numbers[0]].start
        columns, own = slice(first.start, groups[numbers[-1]].end), slice(numbers[0], numbers[-1] + 1)
        importance_GC = None if importance_I is None else importance_I[columns].reshape(len(numbers), width)
        for start in range(0, len(weight_OI), step):
            rows = slice(start, start + step)
            weight_OGC = weight_OI[rows, columns].unflatten(1, (len(numbers), width))
            scale_OG1, offset_OG1 = fit_grid(weight_OGC, first, clip, importance_GC)
            code_OGC = ((weight_OGC - offset_OG1) / scale_OG1).round_().clamp_(0, 2**first.bits - 1)
            rounded.code_OI[rows, columns] = code_OGC.flatten(1).to(torch.uint8)
            rounded.scale_OG[rows, own], rounded.offset_OG[rows, own] = scale_OG1[..., 0], offset_OG1[..., 0]
    return rounded


def error_propagation(upper_II: Tensor) -> Tensor:
    """Return the share of the rounding error of column k that moves to column j [k, j]: −U_kj / U_kk."""
    return upper_II / -upper_II.diagonal()[:, None]


def round_by_sweep(
    weight_OI: Tensor,
    upper_II: Tensor,
    groups: Sequence[Group],
    clip: bool,
    keep_OI: Tensor | None = None,
    importance_I: Tensor | None = None,
) -> Rounded:
    """Round in one pass from left to right; a group's grid is fitted when the pass reaches it.

    U as in `inverse_factor`. With a mask, the grid is fitted to kept weights. The value that a pruned weight has by
    then counts as its error.
    """
    propagation_II = error_propagation(upper_II)
    wanted_OI = weight_OI.clone()
    rounded = _empty(weight_OI, groups)
    for number, group in enumerate(groups):
        wanted_OC, propagation_CC = wanted_OI[:, group.slice], propagation_II[group.slice, group.slice]
        keep_OC = None if keep_OI is None else keep_OI[:, group.slice]
        if clip or group.bits == 1:
            wanted_OC = wanted_OC.contiguous()
            importance_C = None if importance_I is None else importance_I[group.slice]
            kept_OC = wanted_OC if keep_OC is None else wanted_OC * keep_OC
            scale_O1, offset_O1 = fit_grid(kept_OC, group, clip, importance_C)
            same_C = torch.zeros(group.end - group.start, dtype=torch.int32, device=weight_OI.device)
            grid = Grid(scale_O1, offset_O1, same_C, torch.full_like(same_C, 2**group.bits - 1, dtype=torch.float32))
            code_OC, change_OC = sweep_codes(wanted_OC, None, propagation_CC, grid, keep_OC)
            _put(rounded, number, code_OC, scale_O1, offset_O1)
        else:
            scale_O, offset_O = rounded.scale_OG[:, number], rounded.offset_OG[:, number]
            code_OC = rounded.code_OI[:, group.slice]
            change_OC = sweep_fitted(wanted_OC, propagation_CC, _levels_fit(group), keep_OC, code_OC, scale_O, offset_O)
        wanted_OI[:, group.end :].addmm_(change_OC, propagation_II[group.slice, group.end :], alpha=-1)
    return rounded


def coordinate_descent(rounded: Rounded, weight_OI: Tensor, gram_II: Tensor, keep_OI: Tensor | None = None) -> Rounded:
    """Do one pass of coordinate descent on the codes; H = `gram_II`, damping included."""
    values_OI = rounded.values_OI
    diagonal_I = gram_II.diagonal()
    wanted_OI = values_OI + ((weight_OI - values_OI) @ gram_II) / diagonal_I
    code_OI, _ = sweep_codes(wanted_OI, values_OI, (gram_II / diagonal_I).contiguous(), rounded.grid, keep_OI)
    return replace(rounded, code_OI=code_OI)


def refit_scales(rounded: Rounded, weight_OI: Tensor, gram_II: Tensor) -> Rounded:
    """Fit the scales, and the offsets of free grids, so that the error of every row is least for its codes.

    A row has K unknowns: its normal equations [K, K] cost O·I² operations to form and K³ to solve. A row keeps its
    scales if the solution has a scale that is not positive.
    """
    pull_OI = weight_OI @ gram_II
    columns: list[tuple[int, Tensor]] = []  # per unknown: first column, column of the design [O or 1, C]
    for number, group in enumerate(rounded.groups):
        code_OC = rounded.code_OI[:, group.slice].float()
        if group.grid == "free":
            columns += [(group.start, code_OC), (group.start, torch.ones_like(code_OC[:1]))]
        else:
            fixed_O1 = rounded.offset_OG[:, number, None] / rounded.scale_OG[:, number, None]
            columns.append((group.start, code_OC + fixed_O1))
    right_OK = torch.stack([(pull_OI[:, at : at + d.shape[1]] * d).sum(1) for at, d in columns], dim=1)
    normal_OKK = right_OK.new_empty(len(weight_OI), len(columns), len(columns))
    for j, (at_j, design_j) in enumerate(columns):
        spread_OI = design_j @ gram_II[at_j : at_j + design_j.shape[1]]
        for k, (at_k, design_k) in enumerate(columns[: j + 1]):
            normal_OKK[:, j, k] = (spread_OI[:, at_k : at_k + design_k.shape[1]] * design_k).sum(1)
            normal_OKK[:, k, j] = normal_OKK[:, j, k]
    ridge_O1 = normal_OKK.diagonal(dim1=1, dim2=2).mean(1)[:, None] * 1e-6 + 1e-30
    solution_OK, _ = torch.linalg.solve_ex(normal_OKK + torch.diag_embed(ridge_O1.expand_as(right_OK)), right_OK)
    scale_OG, offset_OG = rounded.scale_OG.clone(), rounded.offset_OG.clone()
    unknown = 0
    for number, group in enumerate(rounded.groups):
        scale_OG[:, number] = solution_OK[:, unknown]
        if group.grid == "free":
            offset_OG[:, number] = solution_OK[:, unknown + 1]
        else:
            offset_OG[:, number] *= solution_OK[:, unknown] / rounded.scale_OG[:, number]
        unknown += 2 if group.grid == "free" else 1
    fits_O1 = (torch.isfinite(solution_OK).all(1) & (scale_OG > SMALLEST_SCALE).all(1))[:, None]
    return replace(
        rounded,
        scale_OG=torch.where(fits_O1, scale_OG, rounded.scale_OG),
        offset_OG=torch.where(fits_O1, offset_OG, rounded.offset_OG),
    )


def improve(
    rounded: Rounded, weight_OI: Tensor, gram_II: Tensor, rounds: int, keep_OI: Tensor | None = None
) -> Rounded:
    """Do `rounds` of refits and coordinate descent, then round the scales as stored and fit the codes once more.

    Without rounds, only the scales are rounded.
    """
    if not rounds:
        return rounded.storable()
    for _ in range(rounds):
        rounded = coordinate_descent(refit_scales(rounded, weight_OI, gram_II), weight_OI, gram_II, keep_OI)
    return coordinate_descent(refit_scales(rounded, weight_OI, gram_II).storable(), weight_OI, gram_II, keep_OI)


def damped(gram_II: Tensor, damping_frac: float) -> Tensor:
    """Return XᵀX + λI, λ as in `column_sweep.inverse_factor`."""
    damped_II = gram_II.clone()
    damped_II.diagonal().add_(damping_frac * (float(gram_II.diagonal().mean()) or 1.0))
    return damped_II


def _empty(weight_OI: Tensor, groups: Sequence[Group]) -> Rounded:
    """Return zero codes with unit scales, to be filled group by group."""
    scale_OG = weight_OI.new_ones(len(weight_OI), len(groups))
    return Rounded(groups, torch.zeros_like(weight_OI, dtype=torch.uint8), scale_OG, torch.zeros_like(scale_OG))


def _put(rounded: Rounded, number: int, code_OC: Tensor, scale_O1: Tensor, offset_O1: Tensor) -> None:
    """Write codes, scale and offset of one group in place."""
    rounded.code_OI[:, rounded.groups[number].slice] = code_OC.to(torch.uint8)
    rounded.scale_OG[:, number], rounded.offset_OG[:, number] = scale_O1[:, 0], offset_O1[:, 0]


def _runs(groups: Sequence[Group]) -> list[list[int]]:
    """Return the numbers of neighboring groups with the same bits and grid, run by run."""
    return _alike(groups, lambda group: (group.bits, group.grid))


def _equal_runs(groups: Sequence[Group]) -> list[list[int]]:
    """Return the numbers of neighboring groups with the same bits, grid and width, run by run."""
    return _alike(groups, lambda group: (group.bits, group.grid, group.end - group.start))


def _alike(groups: Sequence[Group], key: Callable[[Group], Any]) -> list[list[int]]:
    return [list(numbers) for _, numbers in groupby(range(len(groups)), key=lambda number: key(groups[number]))]
