"""Products with kept inputs against masked products in float64, on every instruction set."""

from itertools import product

import pytest
import torch
from torch import Tensor

from niwaki.formats.quantized import QuantizedColumns
from niwaki.kernels import inputs
from niwaki.kernels.cpu_module import AVX2, AVX512, BEST, PORTABLE, VBMI, cpu_module
from niwaki.kernels.inputs import InputCodes, codes_inputs_dot, inputs_dot, kept_inputs
from support.bit_planes import quantized_matrix, relative_error

PATHS = {"best": BEST, "portable": PORTABLE, "avx2": AVX2, "avx512": AVX512, "vbmi": VBMI}
# Tokens, inputs, outputs: one of everything, nothing whole, several chunks of inputs and tiles of outputs, whole lines.
SHAPES = [(1, 1, 1), (3, 17, 5), (8, 1030, 333), (2, 70, 4500), (1, 512, 256)]
THRESHOLDS = (-1.0, 0.0, 0.7, 9.0)
GRIDS = ("affine", "symmetric", "midrise", "free")
DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ROUNDED = 5e-5  # by the 16 bits of the inputs of codes


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> int:
    compiled = cpu_module()
    assert compiled is not None
    if not compiled.supported(PATHS[request.param]):
        pytest.skip(f"this processor has no {request.param}")
    return PATHS[request.param]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def with_zeros(tokens: int, columns: int) -> Tensor:
    """Return inputs of which the first of every token is zero, and the second lies on a threshold."""
    x_BI = normal(tokens, columns)
    x_BI[:, 0] = 0.0
    x_BI[:, 1:2] = 0.7
    return x_BI


def expected(x_BI: Tensor, weight_IO: Tensor, threshold: float, bias_O: Tensor | None = None) -> Tensor:
    x_BI = x_BI.double()
    y_BO = (x_BI * (x_BI.abs() > threshold)) @ weight_IO.double()
    return y_BO if bias_O is None else y_BO + bias_O.double()


def close(found: Tensor, wanted: Tensor, limit: float) -> bool:
    return relative_error(found, wanted) <= limit if wanted.norm() > 0 else bool(found.eq(0).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_only_kept_inputs_count(shape: tuple[int, int, int], path: int) -> None:
    tokens, columns, outputs = shape
    for (dtype, limit), threshold in product(DTYPES.items(), THRESHOLDS):
        x_BI, weight_IO = with_zeros(tokens, columns).to(dtype), normal(columns, outputs).to(dtype)
        bias_O = normal(outputs, seed=1).to(dtype) if threshold else None
        count = torch.full((1,), 5)
        found = inputs_dot(x_BI, weight_IO, threshold, bias_O, count=count, path=path)
        assert found.dtype == dtype
        assert close(found, expected(x_BI, weight_IO, threshold, bias_O), limit), (dtype, threshold)
        kept = kept_inputs(x_BI, threshold)
        assert int(count) - 5 == int(kept.count_B.sum()) == int((x_BI.float().abs() > threshold).sum())
        reference = inputs._masked(x_BI, weight_IO, threshold, bias_O, None)
        assert close(found, reference.double(), 2 * limit)


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_multiply_like_their_weights(grid: str, path: int) -> None:
    for tokens, columns, outputs, group in ((1, 300, 96, 128), (5, 130, 333, 16), (2, 700, 4500, 700), (1, 1, 1, 1)):
        (part,) = quantized_matrix(outputs, columns, 4, grid, group, mixed=False)
        codes, weight_IO = InputCodes.pack([part]), part.decode().T
        assert torch.equal(codes.decode(), weight_IO)
        x_BI, bias_O, count = with_zeros(tokens, columns), normal(outputs), torch.zeros(1, dtype=torch.int64)
        for threshold in (-1.0, 0.7, 9.0):
            found = codes_inputs_dot(x_BI, codes, threshold, count=count, path=path)
            wanted = expected(x_BI, weight_IO, threshold)
            assert close(found, wanted, ROUNDED), (columns, outputs, group, threshold)
            assert close(codes_inputs_dot(x_BI, codes, threshold, bias_O, path=path), wanted + bias_O, ROUNDED)
        assert int(count) == tokens * columns + int((x_BI.abs() > 0.7).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_is_the_same_alone_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    x_BI, weight_IO = normal(7, 600).to(dtype), normal(600, 700).to(dtype)
    codes = InputCodes.pack(quantized_matrix(700, 600, 4, "affine", 128, mixed=False))
    for work in (lambda x: inputs_dot(x, weight_IO, 0.5), lambda x: codes_inputs_dot(x, codes, 0.5)):
        together = work(x_BI)
        assert torch.equal(together, torch.cat([work(one[None]) for one in x_BI]))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(together, work(x_BI))
        finally:
            torch.set_num_threads(threads)


def test_rows_far_apart_inputs_in_any_order_and_many_tokens() -> None:
    wide_IO, x_IB = normal(90, 300).bfloat16(), normal(90, 12).bfloat16()
    wanted = expected(x_IB.T, wide_IO[:, 17:217], 0.6)
    assert relative_error(inputs_dot(x_IB[:, :5].T, wide_IO[:, 17:217], torch.tensor([0.6])), wanted[:5]) < 4e-3
    assert relative_error(inputs_dot(x_IB.T, wide_IO[:, 17:217], 0.6), wanted) < 8e-3
    row_O = normal(1, 40).expand(90, 40)
    assert relative_error(inputs_dot(x_IB.T[:2], row_O, 0.6), expected(x_IB.T[:2], row_O, 0.6)) < 4e-3
    codes = InputCodes.pack(quantized_matrix(40, 90, 4, "symmetric", 90, mixed=False))
    wanted = expected(x_IB.T, codes.decode(), 0.6)
    assert relative_error(codes_inputs_dot(x_IB[:, :5].T, codes, torch.tensor([0.6])), wanted[:5]) < 4e-3
    assert relative_error(codes_inputs_dot(x_IB.T, codes, 0.6), wanted) < 4e-3


def test_values_that_are_not_finite_reach_the_output(path: int) -> None:
    weight_IO = normal(40, 70)
    codes = InputCodes.pack(quantized_matrix(70, 40, 4, "midrise", 16, mixed=False))
    for wrong in (float("nan"), float("inf"), float("-inf")):
        x_BI = torch.ones(2, 40)
        x_BI[0, 7] = wrong
        for found in (inputs_dot(x_BI, weight_IO, 0.5, path=path), codes_inputs_dot(x_BI, codes, 0.5, path=path)):
            assert not found[0].isfinite().any() and found[1].isfinite().all()
        assert kept_inputs(x_BI, 0.5).mask_BI.all()
    # Weights of an input that is not kept are not read.
    weight_IO[3] = float("nan")
    x_BI = torch.ones(1, 40)
    x_BI[0, 3] = 0.1
    assert inputs_dot(x_BI, weight_IO, 0.5, path=path).isfinite().all()


def test_matrices_that_share_inputs_lie_side_by_side() -> None:
    parts = [quantized_matrix(rows, 256, 4, "affine", group, mixed=False)[0] for rows, group in ((96, 128), (33, 64))]
    single = quantized_matrix(50, 256, 3, "affine", 256, mixed=False)[0]
    codes = InputCodes.pack([*parts, single])
    assert (codes.group, codes.outputs, codes.inputs) == (64, 179, 256)
    wanted = torch.cat([part.decode() for part in (*parts, single)]).T
    assert torch.equal(codes.decode(), wanted)
    assert relative_error(codes_inputs_dot(normal(1, 256), codes, 0.4), expected(normal(1, 256), wanted, 0.4)) < ROUNDED
    assert torch.equal(codes.to("cpu").decode(), wanted) and codes.nbytes == 256 * 128 + 4 * 256 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8, "code_OC": torch.zeros(4, 32, dtype=torch.uint8)}, "at most 4 bits, got 8"),
        ({"columns_C": torch.arange(32).flip(0)}, "all columns in order"),
        ({"code_OC": torch.zeros(4, 31, dtype=torch.uint8)}, "expected 32 inputs, got 31"),
        ({"grid": "midrise"}, "expected the grid symmetric of 4 bits, got midrise"),
        ({"group": 24, "scale_OG": torch.ones(4, 2).half()}, "whole 16 inputs, got 24"),
    ],
)
def test_codes_of_another_form_are_refused(change: dict[str, object], message: str) -> None:
    given = {"columns_C": torch.arange(32), "bits": 4, "grid": "symmetric", "group": 16}
    given |= {"code_OC": torch.zeros(4, 32, dtype=torch.uint8), "scale_OG": torch.ones(4, 2).half()}
    with pytest.raises(ValueError, match=message):
        InputCodes.pack([QuantizedColumns(**given), QuantizedColumns(**(given | change))])  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_are_refused() -> None:
    x_BI, weight_IO = normal(2, 30), normal(30, 20)
    codes = InputCodes.pack(quantized_matrix(20, 30, 4, "free", 16, mixed=False))
    for wrong, message in (
        ((x_BI[0], weight_IO), "1 and 2 axes"),
        ((x_BI[:, :29], weight_IO), "expected 30 inputs, got 29"),
        ((x_BI.double(), weight_IO), "inputs in bfloat16, float16 or float32, got torch.float64"),
        ((x_BI, weight_IO.double()), "weights in bfloat16"),
        ((x_BI, normal(20, 30).T), "as neighbours"),
        ((x_BI.to("meta"), weight_IO), "expected inputs on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs_dot(*wrong, 0.5)
    for bias_O in (normal(19), normal(1, 20)):
        with pytest.raises(ValueError, match="a bias of 20 outputs"):
            inputs_dot(x_BI, weight_IO, 0.5, bias_O)
        with pytest.raises(ValueError, match="a bias of 20 outputs"):
            codes_inputs_dot(x_BI, codes, 0.5, bias_O)
    with pytest.raises(ValueError, match="expected 30 inputs"):
        codes_inputs_dot(normal(1, 31), codes, 0.5)


def test_the_compiled_kernels_refuse_what_would_touch_memory() -> None:
    compiled = cpu_module()
    assert compiled is not None
    codes = InputCodes.pack(quantized_matrix(20, 30, 4, "affine", 16, mixed=False))
    given = {"codes": codes.codes_IB, "scale": codes.scale_GP, "offset": None, "zero": codes.zero_GP}
    for name, tensor in (*given.items(), ("offset", codes.scale_GP)):
        if tensor is not None:
            shorter = given | {name: tensor[:1]}
            with pytest.raises(ValueError, match="do not fit"):
                compiled.InputCodesLayer(20, 16, *(None if t is None else t.numpy() for t in shorter.values()), 0.0)
    arrays = [None if t is None else t.numpy() for t in given.values()]
    for outputs, group in ((129, 16), (0, 16), (20, 0), (20, 14)):
        with pytest.raises(ValueError, match="niwaki kernels"):
            compiled.InputCodesLayer(outputs, group, *arrays, 0.0)
    x_BI, weight_IO, out_BO = normal(1, 30), normal(30, 20), normal(1, 20)
    for kind, stride in ((3, 20), (2, 19)):
        with pytest.raises(ValueError, match="niwaki kernels"):
            compiled.inputs_product(
                weight_IO.data_ptr(), kind, 30, 20, stride, x_BI.data_ptr(), 0, out_BO.data_ptr(), 1, False, 0.0, 1, 0
            )  # fmt: skip
