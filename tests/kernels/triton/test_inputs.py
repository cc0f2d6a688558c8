"""Products with kept inputs by the Triton kernels, interpreted, against masked products in float64."""

from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor

from niwaki.kernels import inputs
from niwaki.kernels.inputs import InputCodes, codes_inputs_dot, inputs_dot
from support.bit_planes import OnGpu, quantized_matrix, relative_error
from support.triton_interpreter import interpreted

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # the interpreter cuts bfloat16 off
# Tokens, inputs, outputs: one of everything, nothing whole, more tokens than a power of two, splits.
CASES = [(1, 1, 1), (3, 70, 33), (8, 40, 70)]

STRANGE = [((2, 40, 20), (torch.float32, 1e-5), -1.0), ((2, 40, 20), (torch.float32, 1e-5), 9.0)]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def expected(x_BI: Tensor, weight_IO: Tensor, threshold: float) -> Tensor:
    x_BI = x_BI.double()
    return (x_BI * (x_BI.abs() > threshold)) @ weight_IO.double()


def test_products_with_weights() -> None:
    interpreted("weights", __name__)


def weights() -> None:
    """Try every dtype and threshold, from the device and from the call; equal calls give equal bits."""
    from niwaki.kernels.triton.inputs import InputsLaunch, inputs_dot_triton

    threes = [(case, item, 0.6) for case, item in product(CASES, LIMITS.items())]
    for (tokens, columns, outputs), (dtype, limit), threshold in [*threes, *STRANGE]:
        x_BI, wide_IO = normal(tokens, columns).to(dtype), normal(columns, outputs + 5).to(dtype)
        weight_IO, count = wide_IO[:, 2:-3], torch.tensor([4])
        bias_O = None if threshold < 0 else normal(outputs).to(dtype)
        given = threshold if threshold < 0 else torch.tensor([threshold])
        launch = InputsLaunch(64, 16, 1, 3, chunk=16 * (tokens % 2)) if dtype == torch.float32 else None
        found = inputs_dot_triton(x_BI, weight_IO, given, bias_O, count, launch)
        wanted = expected(x_BI, weight_IO, threshold) + (0 if bias_O is None else bias_O)
        assert found.dtype == dtype
        assert relative_error(found, wanted) < limit if wanted.norm() else found.eq(0).all()
        assert int(count) == 4 + int((x_BI.float().abs() > threshold).sum())
        if tokens == 3:
            assert torch.equal(found, inputs_dot_triton(x_BI, weight_IO, given, bias_O, None, launch))


def test_products_with_codes() -> None:
    interpreted("codes", __name__)


# Grid, tokens, inputs, outputs, group; then words, rows, warps and splits. Groups are short, odd or of several runs.
CODES = [
    ("affine", 1, 40, 33, 16, (16, 8, 1, 2)),
    ("symmetric", 2, 40, 20, 40, (16, 8, 1, 1)),
    ("midrise", 1, 20, 130, 7, (16, 8, 1, 3)),
    ("free", 1, 64, 130, 64, None),
]


def codes() -> None:
    """Try every grid, in several blocks of words and in one."""
    from niwaki.kernels.triton import inputs as kernels

    kernels.RUN = 32
    for grid, tokens, columns, outputs, group, sizes in CODES:
        packed = InputCodes.pack(quantized_matrix(outputs, columns, 4, grid, group, mixed=False))
        levels = kernels.Levels(*packed.levels_by_nibble, packed.centre)
        x_BI, bias_O, weight_IO = normal(tokens, columns), normal(outputs), packed.decode()
        launch = None if sizes is None else kernels.InputsLaunch(*sizes)
        for threshold in (-1.0, 0.6, 9.0):
            count = torch.zeros(1, dtype=torch.int64)
            call = x_BI, packed.codes_IB, levels, packed.group, torch.tensor([threshold]), bias_O
            found = kernels.codes_dot_triton(*call, count, outputs, launch)
            assert relative_error(found, expected(x_BI, weight_IO, threshold) + bias_O) < 1e-5
            assert int(count) == int((x_BI.abs() > threshold).sum())
        assert torch.equal(found, kernels.codes_dot_triton(*call, None, outputs, launch))


def test_what_is_not_kept_is_not_read_and_not_a_number_is_kept() -> None:
    interpreted("strange_values", __name__)


def strange_values() -> None:
    """Set the rows of skipped inputs to NaN, then one input, whose output alone is NaN."""
    from niwaki.kernels.triton.inputs import inputs_dot_triton

    x_BI, weight_IO = normal(1, 70), normal(70, 40)
    skipped = x_BI[0].abs() <= 0.6
    poisoned_IO = torch.where(skipped[:, None], float("nan"), weight_IO)
    found = inputs_dot_triton(x_BI, poisoned_IO, 0.6, None, None)
    assert relative_error(found, expected(x_BI, weight_IO, 0.6)) < 1e-5
    codes = InputCodes.pack(quantized_matrix(40, 70, 4, "midrise", 16, mixed=False))
    x_BI = torch.ones(2, 70)
    x_BI[0, 7] = float("nan")
    for found in (inputs_dot_triton(x_BI, weight_IO, 0.6, None, None), on_gpu(x_BI, codes)):
        assert found[0].isnan().all() and found[1].isfinite().all()


def on_gpu(x_BI: Tensor, codes: InputCodes) -> Tensor:
    return codes_inputs_dot(x_BI.as_subclass(OnGpu), codes, 0.6).as_subclass(Tensor)


def test_tensors_on_a_gpu_go_to_the_kernels() -> None:
    """Check that up to eight tokens reach the kernel, and more multiply the masked inputs."""
    for tokens, calls in ((8, 1), (9, 0)):
        x_BI, weight_IO = normal(tokens, 20).as_subclass(OnGpu), normal(20, 10)
        codes = InputCodes.pack(quantized_matrix(10, 20, 4, "affine", 8, mixed=False))
        with (
            patch("niwaki.kernels.triton.inputs.inputs_dot_triton", return_value="dot") as dot,
            patch("niwaki.kernels.triton.inputs.codes_dot_triton", return_value="codes") as coded,
        ):
            found = inputs_dot(x_BI, weight_IO, torch.tensor([0.5])), codes_inputs_dot(x_BI, codes, 0.5)
            assert dot.call_count == coded.call_count == calls
            assert not calls or found == ("dot", "codes")
            for wrong in (torch.tensor([0.5, 0.6]), torch.tensor([0.5], device="meta")):
                try:
                    inputs._own(wrong, x_BI)
                except ValueError as error:
                    assert "expected one threshold on cpu" in str(error)
                else:
                    raise AssertionError(wrong)
