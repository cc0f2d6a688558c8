"""The product on tensor cores against the decoded matrix, interpreted by Triton: widths, grids, parts, odd shapes.

In float16 only: Triton's interpreter multiplies the bits of bfloat16 as integers. How codes become bfloat16 is tested
here without it; the whole is checked on a GPU by `benchmarks/kernels/packed_linear.py --device cuda --check`.
"""

import torch

from niwaki.formats.quantized import assemble
from niwaki.kernels import planes
from support.bit_planes import planes_of, quantized_matrix, relative_error
from support.triton_interpreter import interpreted

CASES = [
    (32, 128, 1, "free", 128, False, 3), (5, 7, 4, "midrise", 7, False, 2), (33, 400, 2, "affine", 128, False, 17),
    (70, 1000, 3, "symmetric", 128, False, 4), (45, 700, 8, "affine", 128, False, 5),
    (64, 1500, 4, "midrise", 500, True, 16), (40, 1400, 8, "free", 128, True, 33),
    (8, 264, 4, "affine", 264, False, 65),
]  # fmt: skip


def test_product_equals_the_decoded_matrix() -> None:
    interpreted("parity", __name__)


def parity() -> None:
    from niwaki.kernels.triton.dot import PlaneDotLaunch, core_product

    launches = [
        None,
        PlaneDotLaunch(warps=1, stages=1),
        PlaneDotLaunch(warps=2, stages=2),
    ]  # two for every case, in turns
    for number, (rows, columns, bits, grid, group, mixed, tokens) in enumerate(CASES):
        parts = quantized_matrix(rows, columns, bits, grid, group, mixed)
        generator = torch.Generator().manual_seed(tokens)
        x_NI = torch.randn(tokens, columns, generator=generator).half()
        bias_O = torch.randn(rows, generator=generator)
        expected_NO = x_NI.double() @ assemble(parts).double().T + bias_O.double()
        for launch in (launches[number % 3], launches[(number + 1) % 3]):
            out_NO = torch.full((tokens, rows), float("nan"), dtype=torch.float16)
            core_product(x_NI, planes_of(parts), bias_O, out_NO, launch)
            assert relative_error(out_NO, expected_NO) < 1e-3, (rows, columns, launch)


def test_bits_of_codes_make_floats_with_steps_of_one_and_sixteen() -> None:
    from niwaki.kernels.triton.dot import BASES

    code = torch.arange(16, dtype=torch.int16)
    for dtype, (one, sixteen, power) in BASES.items():
        assert torch.equal((code | one).view(dtype).float(), 2**power + code.float())
        assert torch.equal((code | sixteen).view(dtype).float(), 16 * (2**power + code.float()))


def test_which_kernel_multiplies_how_many_tokens() -> None:
    interpreted("choice", __name__)


def choice() -> None:
    from niwaki.kernels.triton import dot as triton_dot
    from niwaki.kernels.triton import planes as triton_planes

    called = []
    triton_planes.fma_product = lambda *given: called.append("few")
    triton_dot.core_product = lambda *given: called.append("some")
    fine, coarse = (planes_of(quantized_matrix(32, 256, 4, "affine", group, False)) for group in (64, 128))
    for parts, tokens, dtype, rows in [
        (coarse, 4, torch.float16, 32), (coarse, 5, torch.float16, 32), (coarse, 5, torch.float32, 32),
        (fine, 5, torch.float16, 32), (coarse, 3, torch.bfloat16, 2**18), (coarse, 2, torch.bfloat16, 2**18),
    ]:  # fmt: skip
        x_NI = torch.zeros(tokens, 256, dtype=dtype)
        planes.gpu_product(x_NI, parts, None, torch.empty(tokens, rows, dtype=dtype))
    assert called == ["few", "some", "few", "few", "some", "few"], called
