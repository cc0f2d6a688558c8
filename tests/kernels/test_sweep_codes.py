"""The quantizing sweep: reference against a plain loop, compiled and Triton kernels against the reference."""

import sys

import pytest
import torch
from interpreting import interpreted
from torch import Tensor

import niwaki.kernels
from niwaki.kernels.codes import Grid, cpu_module, sweep_codes, sweep_codes_reference
from niwaki.kernels.planes import reaches


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """Wanted values, a base, a feed and a grid of two groups (4 bits and 1 bit)."""
    generator = torch.Generator().manual_seed(seed)
    wanted, base = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    feed = torch.randn(columns, columns, generator=generator) * 0.1
    group = (torch.arange(columns) >= columns // 3).to(torch.int32)
    top = torch.where(group == 0, 15.0, 1.0)
    scale = torch.rand(rows, 2, generator=generator) + torch.tensor([0.2, 1.0])
    offset = -scale * torch.tensor([7.5, 0.5])
    return wanted, base, feed, Grid(scale, offset, group, top)


def masked_problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Grid, Tensor]:
    """The same on grids that have a level at zero, with half of the weights kept."""
    wanted, base, feed, grid = problem(rows, columns)
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(7)) < 0.5
    middle = Grid(grid.scale_OG, -grid.scale_OG * torch.tensor([8.0, 1.0]), grid.group_I, grid.top_I)
    return wanted, base, feed, middle, keep


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_reference_equals_the_definition_in_float64(with_base: bool, masked: bool) -> None:
    wanted, base, feed, grid, keep = masked_problem(5, 12) if masked else (*problem(5, 12), None)
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
    wanted, base, feed, grid, keep = masked_problem(*shape) if masked else (*problem(*shape), None)
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
    wanted, base, feed, grid = problem(8, 20)
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
    """Runs where Triton interprets its kernels, which is decided when it is imported."""
    from niwaki.kernels.triton_codes import sweep_codes_triton

    problems = [(*problem(*shape), None) for shape in [(1, 1), (3, 7), (20, 33)]]
    for wanted, base, feed, grid, keep in [*problems, masked_problem(3, 7)]:
        for given in (None, base):
            code, change = sweep_codes_triton(wanted.clone(), given, feed, grid.columns(0, wanted.shape[1]), keep)
            expected_code, expected_change = sweep_codes_reference(wanted.clone(), given, feed, grid, keep)
            assert torch.equal(code, expected_code)
            torch.testing.assert_close(change, expected_change, rtol=1e-4, atol=1e-4)
