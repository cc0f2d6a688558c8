"""Compilation of every Triton kernel for an H100, with the arguments of its launches and without a GPU.

Interpreted kernels have no types, so the interpreter runs code that Triton refuses to compile. Here a launch ends after
the machine code of an H100 is made.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from niwaki.config.targets import NM
from niwaki.formats.sparse import KINDS, LAYOUTS
from niwaki.kernels import sparse_gpu
from niwaki.kernels.inputs import InputCodes
from niwaki.kernels.sparse_gpu import cores_reach
from niwaki.kernels.types import Fit, PanelParts
from niwaki.runtime.sparse_linear import for_gpu
from support.bit_planes import planes_of, quantized_matrix
from support.kernel_cases import cuts_of, latent_case, masked_sweep_case, rank_case
from support.sparse_records import record_of, tiled
from support.trellis_records import kernel_parts, trellis_matrix

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Absent:
    """A driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Compile kernels instead of launching them, and return the list of their names."""
    names: list[str] = []

    def launch(kernel: Any, grid: Any) -> Callable[..., Any]:
        def compile_only(*args: Any, **options: Any) -> Any:
            names.append(kernel.__name__)
            found = kernel.run(*args, grid=grid, warmup=True, **options)
            assert found.asm["cubin"]
            return found

        return compile_only

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    monkeypatch.setattr(driver, "_active", Absent())
    return names


def inputs(tokens: int, columns: int, dtype: torch.dtype, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(tokens, columns, dtype=dtype), torch.zeros(tokens, rows, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_kernels(compiled: list[str], layout: str, kind: str) -> None:
    """Compile every kind of value in every layout, with a few tokens, some, and decoded."""
    from niwaki.kernels.triton.sparse import fma_product
    from niwaki.kernels.triton.sparse_dot import core_product, decode

    for columns, group, dtype, tokens in [(7, 8, FP32, 1), (256, 128, BF16, 2)]:
        record = for_gpu(record_of(5, columns, kind, layout, group))
        x_NI, out_NO = inputs(tokens, columns, dtype, 5)
        fma_product(x_NI, record, None, out_NO)
        decode(record, 0, torch.zeros(5, columns, dtype=dtype))
        if cores_reach(x_NI, record):
            core_product(x_NI, record, torch.zeros(5), out_NO)
    assert compiled.count("_fma") == compiled.count("_decode") == 2
    assert compiled.count("_cores") == (layout == "two_four")


def test_kernels_of_tiles(compiled: list[str]) -> None:
    from niwaki.kernels.triton import (
        sparse_dot as triton_sparse_dot,
    )
    from niwaki.kernels.triton import (
        sparse_tiles as triton_sparse_tiles,
    )
    from niwaki.kernels.triton import (
        sparse_tiles_dot as triton_sparse_tiles_dot,
    )

    record = for_gpu(tiled(33, 256, 128))
    for dtype, tokens in [(BF16, 1), (FP16, 17)]:
        x_NI, out_NO = inputs(tokens, 256, dtype, 33)
        triton_sparse_tiles.fma_product(x_NI, record, None, out_NO)
        triton_sparse_tiles_dot.core_product(x_NI, record, torch.zeros(33), out_NO)
    triton_sparse_dot.decode(record, 0, torch.zeros(33, 256, dtype=BF16))
    assert compiled == ["_fma", "_cores"] * 2 + ["_decode"]


@pytest.mark.parametrize(("bits", "grid", "mixed"), [(1, "free", False), (2, "affine", False), (3, "symmetric", False),
                                                     (4, "midrise", True), (8, "affine", True)])  # fmt: skip
def test_kernels_of_bit_planes(compiled: list[str], bits: int, grid: str, mixed: bool) -> None:
    from niwaki.kernels.triton import decode as triton_decode
    from niwaki.kernels.triton import dot as triton_dot
    from niwaki.kernels.triton import planes as triton_planes

    parts = planes_of(quantized_matrix(33, 384, bits, grid, 128, mixed))
    x_NI, out_NO = inputs(2, 384, BF16, 33)
    triton_planes.fma_product(x_NI, parts, None, out_NO)
    triton_dot.core_product(x_NI, parts, torch.zeros(33), out_NO)
    triton_decode.decode_planes(parts, 33, 0, torch.zeros(33, 384, dtype=BF16))
    assert compiled == ["_fma", "_spread", "_cores", "_decode"]


def test_kernels_of_kept_rows(compiled: list[str]) -> None:
    from niwaki.kernels.triton.rows import columns_dot, rows_dot, rows_gate

    units_K, weight_OI = torch.arange(3), torch.zeros(8, 300, dtype=BF16)
    for tokens in (1, 4):
        x_BI = torch.zeros(tokens, 300, dtype=BF16)
        rows_dot(x_BI, weight_OI, units_K, width=2)
        rows_gate(x_BI, weight_OI, weight_OI, units_K.int(), "gelu_tanh")
        columns_dot(torch.zeros(tokens, 6, dtype=BF16), weight_OI, units_K, 2, torch.zeros(8, dtype=BF16))
    assert len(compiled) == 6


def test_kernels_of_compressing(compiled: list[str]) -> None:
    """Compile sweeps, choices, ranks, latent weights."""
    from niwaki.kernels.triton.codes import sweep_codes_triton, sweep_fitted_triton
    from niwaki.kernels.triton.latent import gradients_of_triton, weights_of_triton
    from niwaki.kernels.triton.ranks import drop_lowest_triton, sums_below_triton
    from niwaki.kernels.triton.select import keep_in_panel_triton
    from niwaki.kernels.triton.sweep import sweep_panel_triton

    wanted_OP, base_OP, feed_PP, grid, keep_OP = masked_sweep_case(33, 64)
    sweep_codes_triton(wanted_OP, base_OP, feed_PP, grid, keep_OP)
    sweep_codes_triton(wanted_OP, None, feed_PP, grid)
    for fit in (Fit(15, 8.0, 1e-6), Fit(15, None, 1e-6)):
        code_OP = torch.zeros(33, 64, dtype=torch.uint8)
        sweep_fitted_triton(wanted_OP, feed_PP, fit, keep_OP, code_OP, torch.zeros(33), torch.zeros(33))
    keep_in_panel_triton(wanted_OP, PanelParts.of([20, 13], [5, 3], wanted_OP.device), 64, 0)
    sweep_panel_triton(wanted_OP, feed_PP, keep_OP, None)
    sweep_panel_triton(wanted_OP, feed_PP, None, NM(2, 4))
    gradient_OI, values_OI, order_OI, rank_OI, zeros_O = rank_case(5, 130)
    drop_lowest_triton(values_OI.bfloat16(), rank_OI.to(torch.int16), zeros_O.float())
    sums_below_triton(gradient_OI.bfloat16(), values_OI.bfloat16(), order_OI.to(torch.int16), cuts_of(130))
    latent_OI, levels, gradient_OI = latent_case(3, (0, 40, 200), [15.0, 1.0])
    weights_of_triton(latent_OI, levels, BF16)
    gradients_of_triton(latent_OI, levels, gradient_OI.bfloat16())
    assert len(compiled) == 15


def test_the_trellis_compiles(compiled: list[str]) -> None:
    from niwaki.kernels.triton.trellis import encode_triton
    from niwaki.kernels.triton.trellis_product import decode_triton, product_triton

    for rows, columns, bits, others, dtype, tokens in (
        (50, 37, 2, None, FP16, 1), (64, 130, 2, 3, BF16, 3), (33, 70, 1, None, FP32, 3), (40, 90, 3, 4, BF16, 1)
    ):  # fmt: skip
        own = kernel_parts(trellis_matrix(rows, columns, bits, others))
        encode_triton(torch.zeros(rows, 3), torch.ones(rows), torch.zeros(256), bits)
        x_NI, out_NO = inputs(tokens, columns, dtype, rows)
        product_triton(x_NI, own, None, out_NO)
        decode_triton(own, rows, 32, torch.empty(rows - 32, columns, dtype=BF16))
    assert {name.strip("_") for name in compiled} == {"encode", "fma", "spread", "cores", "decode"}


def test_products_with_kept_inputs(compiled: list[str]) -> None:
    """Take the threshold from the device and from the call, one split and several, every kind of level."""
    from niwaki.kernels.triton.inputs import InputsLaunch, Levels, codes_dot_triton, inputs_dot_triton

    count, threshold = torch.zeros(1, dtype=torch.int64), torch.tensor([0.5])
    weight_IO = torch.zeros(4096, 256, dtype=BF16)
    inputs_dot_triton(torch.zeros(1, 4096, dtype=BF16), weight_IO, threshold, weight_IO[0], count)
    inputs_dot_triton(torch.zeros(5, 4096, dtype=FP16), weight_IO, 0.5, None, None, InputsLaunch(64, 32, 4, 1))
    for grid, given, bias_O, counted in (("affine", threshold, torch.zeros(300), count), ("free", 0.5, None, None)):
        codes = InputCodes.pack(quantized_matrix(300, 384, 4, grid, 128, mixed=False))
        levels = Levels(*codes.levels_by_nibble, codes.centre)
        x_BI = torch.zeros(2, 384, dtype=BF16)
        codes_dot_triton(x_BI, codes.codes_IB, levels, codes.group, given, bias_O, counted, 300)
    assert compiled == ["_dot", "_sum", "_dot"] + ["_codes", "_sum"] * 2


def test_every_kernel_is_here() -> None:
    """Look for every file of kernels in the tests above."""
    here, folder = Path(__file__).read_text(), Path(sparse_gpu.__file__).parent
    files = [path.stem for path in (folder / "triton").glob("[a-z]*.py")]
    assert len(files) > 10 and [name for name in files if name not in here] == []
