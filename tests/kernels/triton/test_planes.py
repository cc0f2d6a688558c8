"""The GPU product with bit planes against the decoded matrix, interpreted by Triton: widths, parts, odd shapes."""

import pytest
import torch

from niwaki.formats.quantized import assemble, stored_tensors
from niwaki.kernels import planes
from niwaki.kernels.planes import multiply, reaches
from niwaki.kernels.types import TileLaunch
from niwaki.runtime.linear import PackedLinear
from support.bit_planes import OnGpu, planes_of, quantized_matrix, relative_error
from support.triton_interpreter import interpreted


def test_product_equals_the_decoded_matrix() -> None:
    interpreted("parity", __name__)


def parity() -> None:
    """Every case without and with a bias, in two dtypes: these take turns."""
    from niwaki.kernels.triton.planes import fma_product

    cases = [
        (1, 1, 1, "free", 1, False, 1, TileLaunch(1, 1)),
        (5, 7, 4, "midrise", 7, False, 2, TileLaunch(1, 2)),
        (33, 40, 2, "affine", 32, False, 3, TileLaunch(1, 1)),
        (64, 200, 3, "symmetric", 64, False, 4, TileLaunch(2, 2)),
        (34, 328, 4, "affine", 128, False, 1, TileLaunch(1, 4)),
        (40, 264, 4, "midrise", 88, True, 5, TileLaunch(1, 2)),
        (31, 130, 8, "affine", 8, True, 1, TileLaunch(1, 2)),
        (32, 96, 8, "affine", 96, False, 16, TileLaunch(2, 1)),
        (70, 700, 1, "midrise", 700, False, 1, TileLaunch(1, 2)),
        (36, 90, 4, "free", 24, False, 2, TileLaunch(1, 2)),
    ]
    limits = [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)]
    for number, (rows, columns, bits, grid, group, mixed, tokens, launch) in enumerate(cases):
        parts = quantized_matrix(rows, columns, bits, grid, group, mixed)
        weight_OI = assemble(parts).double()
        for turn in (0, 1):
            dtype, limit = limits[(number + turn) % 3]
            x_NI = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
            bias_O = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(dtype)
            bias = bias_O if turn else None
            out_NO = torch.full((tokens, rows), float("nan"), dtype=dtype)
            fma_product(x_NI, planes_of(parts), bias, out_NO, launch)
            expected = x_NI.double() @ weight_OI.T + (0 if bias is None else bias.double())
            assert relative_error(out_NO, expected) < limit, (rows, columns, bits, grid, group, mixed, tokens, dtype)


def test_inputs_of_very_different_sizes() -> None:
    interpreted("sizes", __name__)


def sizes() -> None:
    from niwaki.kernels.triton.planes import fma_product

    parts = quantized_matrix(32, 64, 1, "free", 64, False)
    for size in (0.0, 1e-9, 1e9):
        x_NI, out_NO = torch.full((1, 64), size), torch.full((1, 32), float("nan"))
        fma_product(x_NI, planes_of(parts), None, out_NO)
        torch.testing.assert_close(out_NO, x_NI @ assemble(parts).T, rtol=1e-4, atol=0.0)


def test_operator_and_layer_hand_over_every_part() -> None:
    interpreted("layers", __name__)


def layers() -> None:
    """The layer as on a GPU, but for the device."""
    parts = quantized_matrix(40, 264, 4, "affine", 32, True)
    layer = PackedLinear(40, 264, {"parts": [part.describe() for part in parts]}, bias=True)
    layer.load_state_dict({**stored_tensors(parts, 264), "bias": torch.randn(40)})
    x_NI = torch.randn(3, 264, generator=torch.Generator().manual_seed(0))
    prepared = [part.for_gpu() for part in layer._prepare().parts]
    expected = torch.nn.functional.linear(x_NI, assemble(parts), layer.bias).double()
    assert relative_error(multiply(x_NI, prepared, layer.bias, 40), expected) < 1e-5
    tensors = [t for part in prepared for t in part[:5]]
    numbers = [float(number) for part in prepared for number in part[5:]]
    found = planes.layer_product_op(x_NI, tensors, numbers, layer.bias, 40)
    assert relative_error(found, expected) < 1e-5


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("tokens", "group", "columns", "dtype", "there"), [
    (1, 128, 4096, FULL, True), (8, 8, 4096, FULL, True), (9, 128, 4096, FULL, False), (1, 12, 4096, FULL, False),
    (1, 100, 100, FULL, True), (64, 128, 4096, HALF, True), (65, 128, 4096, HALF, False), (9, 64, 4096, HALF, False),
    (64, 100, 100, HALF, True), (8, 64, 4096, HALF, True),
])  # fmt: skip
def test_reach_of_the_gpu_kernels(tokens: int, group: int, columns: int, dtype: torch.dtype, there: bool) -> None:
    assert reaches(torch.zeros(tokens, columns, dtype=dtype).as_subclass(OnGpu), group, columns) == there
