"""Grids, sweep, coordinate descent and refit against float64 written from the formulas."""

import pytest
import torch
from torch import Tensor

from niwaki.methods.shared.column_sweep import inverse_factor
from niwaki.methods.shared.rounding import (
    CLIPS,
    Group,
    Rounded,
    coordinate_descent,
    damped,
    fit_grid,
    groups_of,
    improve,
    nearest,
    refit_scales,
    round_by_sweep,
)
from support.blocks import quadratic_error
from support.models import correlated_inputs


def problem(rows: int = 6, columns: int = 32) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    x = correlated_inputs(200, columns)
    return weight, x.T @ x


LAYOUTS = {
    "4 bit": groups_of(0, 32, 4, "affine", 0),
    "3 bit groups": groups_of(0, 32, 3, "affine", 8),
    "symmetric": groups_of(0, 32, 4, "symmetric", 16),
    "mixed": groups_of(0, 8, 4, "midrise", 0) + groups_of(8, 32, 1, "free", 0),
    "mixed groups": groups_of(0, 8, 4, "midrise", 0) + groups_of(8, 32, 1, "free", 8),
}
layouts = pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS.keys())


def gptq_reference(weight: Tensor, gram: Tensor, groups: list[Group], damping_frac: float) -> Tensor:
    """Round by GPTQ's Algorithm 1 in float64 as published: Cholesky of the inverse, one column after another."""
    h = gram.double()
    h = h + damping_frac * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, q = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for group in groups:
        scale, offset = (t.double() for t in fit_grid(w[:, group.slice].float(), group, clip=False))
        for j in range(group.start, group.end):
            code = ((w[:, j] - offset[:, 0]) / scale[:, 0]).round().clamp(0, 2**group.bits - 1)
            q[:, j] = code * scale[:, 0] + offset[:, 0]
            w[:, j:] -= torch.outer((w[:, j] - q[:, j]) / upper[j, j], upper[j, j:])
    return q


@layouts
def test_the_sweep_is_gptq_as_published(groups: list[Group]) -> None:
    weight, gram = problem()
    upper, damping = inverse_factor(gram, 0.01)
    found = round_by_sweep(weight, upper, groups, clip=False)
    expected = gptq_reference(weight, gram, groups, damping)
    close = torch.isclose(found.values_OI.double(), expected, atol=1e-4).all(1)
    assert close.float().mean() >= 5 / 6, "at most one row may differ by a tie that float32 settles otherwise"


@layouts
def test_sweep_beats_rounding_and_descent_beats_the_sweep(groups: list[Group]) -> None:
    weight, gram = problem(24)
    upper, _ = inverse_factor(gram, 0.01)
    h = damped(gram, 0.01)
    plain = nearest(weight, groups, clip=False)
    swept = round_by_sweep(weight, upper, groups, clip=False)
    better = improve(swept, weight, h, rounds=4)
    errors = [quadratic_error(r.values_OI, weight, h) for r in (plain, swept, better)]
    assert errors[0] > errors[1] > errors[2]


@layouts
def test_descent_and_refit_never_raise_the_error(groups: list[Group]) -> None:
    weight, gram = problem()
    h = damped(gram, 0.01)
    rounded = nearest(weight, groups, clip=False)
    before = quadratic_error(rounded.values_OI, weight, h)
    for _ in range(4):
        for step in (refit_scales, coordinate_descent):
            rounded = step(rounded, weight, h)
            after = quadratic_error(rounded.values_OI, weight, h)
            assert after <= before * (1 + 1e-4)
            before = after


def test_descent_ends_where_no_single_code_helps() -> None:
    weight, gram = problem(3, 16)
    h = damped(gram, 0.01)
    groups = groups_of(0, 16, 2, "affine", 0)
    rounded = nearest(weight, groups, clip=False)
    for _ in range(30):
        rounded = coordinate_descent(rounded, weight, h)
    least = quadratic_error(rounded.values_OI, weight, h)
    for row in range(3):
        for column in range(16):
            for code in range(4):
                other = rounded.code_OI.clone()
                other[row, column] = code
                changed = Rounded(groups, other, rounded.scale_OG, rounded.offset_OG)
                assert quadratic_error(changed.values_OI, weight, h) >= least * (1 - 1e-5)


@pytest.mark.parametrize("name", ["mixed", "mixed groups", "symmetric"])
def test_refit_solves_the_least_squares_of_every_row(name: str) -> None:
    """Compare with float64 normal equations on the design matrix written out."""
    groups = LAYOUTS[name]
    weight, gram = problem()
    h = damped(gram, 0.01)
    rounded = nearest(weight, groups, clip=False)
    found = refit_scales(rounded, weight, h)
    root = torch.linalg.cholesky(h.double())  # ‖(w − q)X‖ = ‖(w − q)L‖
    for row in range(len(weight)):
        design = []
        for number, group in enumerate(groups):
            column = torch.zeros(32, dtype=torch.float64)
            column[group.slice] = rounded.code_OI[row, group.slice].double()
            if group.grid == "free":
                ones = torch.zeros(32, dtype=torch.float64)
                ones[group.slice] = 1
                design += [column, ones]
            else:
                column[group.slice] += float(rounded.offset_OG[row, number] / rounded.scale_OG[row, number])
                design.append(column)
        a = torch.stack(design, 1)
        solution = torch.linalg.lstsq(root.T @ a, (root.T @ weight[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found.values_OI[row].double(), a @ solution, rtol=1e-3, atol=1e-3)


def test_stored_scales_are_float16_and_zero_codes_whole() -> None:
    weight, gram = problem()
    rounded = improve(nearest(weight, LAYOUTS["3 bit groups"], clip=False), weight, damped(gram, 0.01), rounds=2)
    (part,) = rounded.parts(torch.arange(32))
    assert torch.equal(part.scale_OG.float(), rounded.scale_OG)
    torch.testing.assert_close(part.decode(), rounded.values_OI)


def searched_reference(weight: Tensor, group: Group, importance: Tensor) -> float:
    """Return the least Σ h·(w − q)² of one row, in float64, over all ranges and zero codes that the search may try."""
    row, h, top = weight.double().tolist(), importance.double().tolist(), 2**group.bits - 1
    least = float("inf")
    for share in CLIPS:
        if group.grid == "affine":
            low, high = min(0.0, *row) * share, max(0.0, *row) * share
            scale = (high - low) / top
            zeros = [
                min(max(round(-low / scale) + shift, 0), top) for shift in ((-1, 0, 1) if group.bits < 4 else (0,))
            ]
        else:
            middle = 2.0 ** (group.bits - 1) if group.grid == "symmetric" else top / 2
            scale, zeros = max(map(abs, row)) * share / (top - middle), [middle]
        for zero in zeros:
            codes = [min(max(round(w / scale + zero), 0), top) for w in row]
            least = min(least, sum(k * (w - (c - zero) * scale) ** 2 for w, c, k in zip(row, codes, h, strict=True)))
    return least


@pytest.mark.parametrize("grid", ["affine", "symmetric", "midrise"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_the_scale_and_zero_code_of_least_weighted_error(grid: str, bits: int) -> None:
    weight, _ = problem(12, 32)
    weight[::2] += 0.7  # rows that are not centered on zero
    importance = torch.logspace(-1, 1, 32)
    groups = groups_of(0, 32, bits, grid, 16)
    found = nearest(weight, groups, clip=True, importance_I=importance)
    for number, group in enumerate(groups):
        part = weight[:, group.slice]
        fitted = fit_grid(part, group, True, importance[group.slice])
        torch.testing.assert_close(found.scale_OG[:, number], fitted[0][:, 0])
        error = (importance * (found.values_OI - weight).square())[:, group.slice].sum(1)
        expected = [searched_reference(row, group, importance[group.slice]) for row in part]
        torch.testing.assert_close(error.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)
        plain = nearest(weight, groups, clip=True)
        assert error.sum() < (importance * (plain.values_OI - weight).square())[:, group.slice].sum()


def test_clip_lowers_the_error_of_the_weights() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    groups = groups_of(0, 64, 2, "affine", 0)
    plain, clipped = (nearest(weight, groups, clip) for clip in (False, True))
    assert (clipped.values_OI - weight).norm() < 0.9 * (plain.values_OI - weight).norm()
