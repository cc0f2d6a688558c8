"""The GPU decoder of bit planes, interpreted by Triton: exactly the decoded matrix, and layers of many tokens."""

import torch

from niwaki.formats.quantized import GRIDS, assemble, stored_tensors
from niwaki.kernels.planes import decode, layer_decoded_op
from niwaki.runtime import linear
from niwaki.runtime.linear import PackedLinear, _Prepared
from support.bit_planes import planes_of, quantized_matrix, relative_error
from support.triton_interpreter import interpreted

DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 1}  # and the warps of a program


def rounded(weight_OI: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round as the interpreter does, which truncates to bfloat16. GPUs round to nearest."""
    if dtype != torch.bfloat16:
        return weight_OI.to(dtype)
    return (weight_OI.contiguous().view(torch.int32) >> 16).short().view(torch.bfloat16)


def test_decoded_matrix_is_exact() -> None:
    interpreted("parity", __name__)


def parity() -> None:
    """Every width with every grid; groups of whole bytes, of no whole bytes, shorter last ones, one for a row.

    Dtypes take turns, so that every width and every shape meets each of them.
    """
    from niwaki.kernels.triton.decode import decode_planes

    shapes = [(33, 200, 64), (5, 7, 7), (64, 264, 12), (31, 301, 301)]
    dtypes = list(DTYPES)
    cases = [
        (rows, columns, bits, GRIDS[number], group, (number + turn) % 2 == 1, dtypes[(turn - number) % 3])
        for turn, bits in enumerate([1, 2, 3, 4, 8])
        for number, (rows, columns, group) in enumerate(shapes[turn % 4 :] + shapes[: turn % 4])
    ]
    for rows, columns, bits, grid, group, mixed, dtype in cases:
        parts = quantized_matrix(rows, columns, bits, grid, group, mixed)
        expected_OI = assemble(parts)[:, torch.cat([part.columns_C for part in parts])]
        out_OI = torch.full((rows, columns), float("nan"), dtype=dtype)
        decode_planes(planes_of(parts), rows, 0, out_OI, DTYPES[dtype])
        exact = torch.equal(out_OI, rounded(expected_OI, dtype))
        assert exact, (rows, columns, bits, grid, group, mixed, dtype)


def test_stripes_and_what_lies_beside_them() -> None:
    interpreted("stripes", __name__)


def stripes() -> None:
    """Some rows at a time, in a buffer whose other elements stay as they are; and the operator for traced graphs."""
    from niwaki.kernels.triton.decode import decode_planes

    parts = quantized_matrix(100, 136, 3, "affine", 32, True)
    expected_OI = assemble(parts)[:, torch.cat([part.columns_C for part in parts])]
    tensors = [t for part in planes_of(parts) for t in part[:5]]
    numbers = [float(number) for part in planes_of(parts) for number in part[5:]]
    for first, last in [(0, 32), (32, 96), (64, 100), (96, 100)]:
        around = torch.full((last - first + 2, 136), float("nan"))
        decode_planes(planes_of(parts), 100, first, around[1:-1])
        assert torch.equal(around[1:-1], expected_OI[first:last])
        assert around[[0, -1]].isnan().all()
        assert torch.equal(decode(planes_of(parts), 100, first, last, torch.float32), expected_OI[first:last])
        found = layer_decoded_op(tensors, numbers, 100, first, last, torch.bfloat16)
        assert torch.equal(found, rounded(expected_OI[first:last], torch.bfloat16))


def test_layer_multiplies_many_tokens() -> None:
    interpreted("layers", __name__)


def layers() -> None:
    """The layer as on a GPU, but for the device: matrices of one and two parts, decoded at once and in stripes."""
    for mixed in (False, True):
        parts = quantized_matrix(100, 136, 4, "symmetric", 64, mixed)
        layer = PackedLinear(100, 136, {"parts": [part.describe() for part in parts]}, bias=True)
        layer.load_state_dict({**stored_tensors(parts, 136), "bias": torch.randn(100)})
        layer._prepared = _Prepared(layer.planes_0, planes_of(parts), [], layer._order())
        x_NI = torch.randn(17, 136, generator=torch.Generator().manual_seed(0))
        expected_NO = torch.nn.functional.linear(x_NI, assemble(parts), layer.bias).double()
        for tiles in (0, 1, 3, 4):
            linear.DECODED_BYTES = tiles * 32 * 136 * 4
            assert relative_error(layer._decoded_product(x_NI), expected_NO) < 1e-6
