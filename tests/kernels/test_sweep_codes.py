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


@pytest.mark.parametrize("with_base", [False, True])
def test_reference_equals_the_definition_in_float64(with_base: bool) -> None:
    wanted, base, feed, grid = problem(5, 12)
    code, change = sweep_codes_reference(wanted.double(), base.double() if with_base else None, feed.double(), grid)
    for row in range(5):
        values = wanted[row].double().tolist()
        for k in range(12):
            g = int(grid.group_I[k])
            scale, offset = float(grid.scale_OG[row, g]), float(grid.offset_OG[row, g])
            levels = [c * scale + offset for c in range(int(grid.top_I[k]) + 1)]
            best = min(range(len(levels)), key=lambda c: abs(levels[c] - values[k]))
            assert int(code[row, k]) == best
            moved = levels[best] - (float(base[row, k]) if with_base else values[k])
            assert float(change[row, k]) == pytest.approx(moved, abs=1e-6)
            for j in range(k + 1, 12):
                values[j] -= moved * float(feed[k, j])


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 130), (64, 257)])
def test_compiled_equals_reference(shape: tuple[int, int], threads: int, with_base: bool) -> None:
    assert cpu_module() is not None, "the package must be built with its CPU kernels where tests run"
    wanted, base, feed, grid = problem(*shape)
    given = base if with_base else None
    expected_code, expected_change = sweep_codes_reference(wanted.clone(), given, feed, grid)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        code, change = sweep_codes(wanted.clone(), given, feed, grid)
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

    for shape in [(1, 1), (3, 7), (20, 33)]:
        wanted, base, feed, grid = problem(*shape)
        for given in (None, base):
            code, change = sweep_codes_triton(wanted.clone(), given, feed, grid.columns(0, shape[1]))
            expected_code, expected_change = sweep_codes_reference(wanted.clone(), given, feed, grid)
            assert torch.equal(code, expected_code)
            torch.testing.assert_close(change, expected_change, rtol=1e-4, atol=1e-4)
