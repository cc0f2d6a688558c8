"""The quantizing sweep: reference against a plain loop, compiled and Triton kernels against the reference."""

import sys

import pytest
import torch
from torch import Tensor

import niwaki.kernels
from niwaki.kernels.codes import sweep_codes, sweep_codes_reference, sweep_fitted
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.planes import reaches
from niwaki.kernels.types import Fit
from support.kernel_cases import masked_sweep_case, sweep_case
from support.triton_interpreter import interpreted


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_reference_equals_the_definition_in_float64(with_base: bool, masked: bool) -> None:
    wanted, base, feed, grid, keep = masked_sweep_case(5, 12) if masked else (*sweep_case(5, 12), None)
    code, change = sweep_codes_reference(
        wanted.double(), base.double() if with_base else None, feed.double(), grid, keep
    )
    for row in range(5):
        values = wanted[row].double().tolist()
        for k in range(12):
            g = int(grid.group_I[k])
            scale, offset = float(grid.scale_OG[row, g]), float(grid.offset_OG[row, g])
            levels = [c * scale + offset for c in range(int(grid.top_I[k]) + 1)]
            near = values[k] if keep is None or keep[row, k] else 0.0
            best = min(range(len(levels)), key=lambda c: abs(levels[c] - near))
            assert int(code[row, k]) == best
            moved = levels[best] - (float(base[row, k]) if with_base else values[k])
            assert float(change[row, k]) == pytest.approx(moved, abs=1e-6)
            for j in range(k + 1, 12):
                values[j] -= moved * float(feed[k, j])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 130), (64, 257)])
def test_compiled_equals_reference(shape: tuple[int, int], threads: int, with_base: bool, masked: bool) -> None:
    assert cpu_module() is not None, "the package must be built with its CPU kernels where tests run"
    wanted, base, feed, grid, keep = masked_sweep_case(*shape) if masked else (*sweep_case(*shape), None)
    given = base if with_base else None
    expected_code, expected_change = sweep_codes_reference(wanted.clone(), given, feed, grid, keep)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        code, change = sweep_codes(wanted.clone(), given, feed, grid, keep)
    finally:
        torch.set_num_threads(before)
    # Fused multiply-adds may turn a tie; a turned code changes all that follow it in its row.
    same_rows = (code == expected_code).all(1)
    assert same_rows.float().mean() > 0.9
    torch.testing.assert_close(change[same_rows], expected_change[same_rows], rtol=1e-3, atol=1e-3)


def test_without_compiled_kernels_torch_code_runs_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, base, feed, grid = sweep_case(8, 20)
    expected = sweep_codes_reference(wanted.clone(), base, feed, grid)
    monkeypatch.setitem(sys.modules, "niwaki.kernels._cpu", None)
    monkeypatch.delattr(niwaki.kernels, "_cpu", raising=False)
    cpu_module.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without its CPU kernels"):
            found = sweep_codes(wanted.clone(), base, feed, grid)
        assert not reaches(torch.ones(1, 20), 20, 20)
    finally:
        cpu_module.cache_clear()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_triton_panel_equals_reference() -> None:
    interpreted("triton_parity", __name__)


def triton_parity() -> None:
    """Run in the interpreting process: Triton chooses at its import."""
    from niwaki.kernels.triton.codes import sweep_codes_triton

    problems = [(*sweep_case(*shape), None) for shape in [(1, 1), (3, 7), (20, 33)]]
    for wanted, base, feed, grid, keep in [*problems, masked_sweep_case(3, 7)]:
        for given in (None, base):
            code, change = sweep_codes_triton(wanted.clone(), given, feed, grid.columns(0, wanted.shape[1]), keep)
            expected_code, expected_change = sweep_codes_reference(wanted.clone(), given, feed, grid, keep)
            assert torch.equal(code, expected_code)
            torch.testing.assert_close(change, expected_change, rtol=1e-4, atol=1e-4)


FITS = [Fit(15, None, 2.0**-24), Fit(7, 4.0, 2.0**-24), Fit(3, 1.5, 2.0**-24)]


def fitted_problem(rows: int, masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """A panel in the middle of a wider matrix, its feed and mask; a row of zeros, a positive and a tiny one."""
    generator = torch.Generator().manual_seed(rows)
    wanted = torch.randn(rows, 40, generator=generator)
    wanted[0] = 0.0
    wanted[1] = wanted[1].abs() + 1
    wanted[2] *= 1e-9
    feed = torch.randn(40, 40, generator=generator) * 0.1
    keep = torch.rand(rows, 40, generator=generator) < 0.5 if masked else None
    return wanted[:, 7:30], feed[7:30, 7:30], None if keep is None else keep[:, 7:30]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fit", FITS)
def test_levels_reach_over_the_range_and_codes_are_the_nearest(fit: Fit, masked: bool) -> None:
    """Without a feed every column is on its own: codes and levels by their definition, in float64."""
    wanted, feed, keep = fitted_problem(9, masked)
    before = wanted.clone()
    code, scale, offset = torch.full((9, 23), 99, dtype=torch.uint8), torch.full((9,), 99.0), torch.full((9,), 99.0)
    change = sweep_fitted(wanted, torch.zeros_like(feed), fit, keep, code, scale, offset)
    assert torch.equal(wanted, before)
    shown = (wanted if keep is None else wanted * keep).double()
    for row in range(9):
        low, high = min(float(shown[row].min()), 0.0), max(float(shown[row].max()), 0.0)
        if fit.centre is None:
            step = max((high - low) / fit.top, fit.smallest)
            start = -round(-low / step) * step
        else:
            step = max(max(-low, high) / (fit.top - fit.centre), fit.smallest)
            start = -fit.centre * step
        assert float(scale[row]) == pytest.approx(step, rel=1e-6) and float(offset[row]) == pytest.approx(
            start, rel=1e-6
        )
        levels = start + step * torch.arange(fit.top + 1, dtype=torch.float64)
        taken, away = levels[code[row].long()], (levels[None] - shown[row][:, None]).abs()
        torch.testing.assert_close((taken - shown[row]).abs(), away.amin(1), rtol=1e-4, atol=1e-6)  # ties to either
        torch.testing.assert_close(change[row].double(), taken - wanted[row].double(), rtol=1e-4, atol=1e-6)


def test_triton_panel_fits_as_torch_does() -> None:
    interpreted("fitted_parity", __name__)


def fitted_parity() -> None:
    """Levels bit for bit, written with strides; outputs begin poisoned and what lies beside them stays."""
    from niwaki.kernels.triton.codes import sweep_fitted_triton

    real = torch.empty
    torch.empty = lambda *a, **k: real(*a, **k).fill_(77)  # type: ignore[assignment]
    for masked in (False, True):
        for fit in FITS:
            wanted, feed, keep = fitted_problem(19, masked)
            before = wanted.clone()
            outs = [
                (torch.full((19, 50), 99, dtype=torch.uint8), torch.full((19, 3), 99.0), torch.full((19, 3), 99.0))
                for _ in range(2)
            ]
            changes = [
                kernel(wanted, feed, fit, keep, code[:, 5:28], scale[:, 1], offset[:, 1])
                for kernel, (code, scale, offset) in zip((sweep_fitted_triton, sweep_fitted), outs, strict=True)
            ]
            for found, expected in zip(*outs, strict=True):
                assert torch.equal(found, expected)
            torch.testing.assert_close(*changes, rtol=1e-4, atol=1e-5)
            assert torch.equal(wanted, before)
