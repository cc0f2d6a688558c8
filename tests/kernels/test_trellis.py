"""The search of the best path against all paths and its own torch form; products against a float64 reference."""

from itertools import product

import pytest
import torch

from niwaki.formats.trellis import RING, assemble_trellis
from niwaki.kernels.cpu_module import AVX2, BEST, PORTABLE, VBMI, cpu_module
from niwaki.kernels.trellis import cpu_product, encode, encode_reference, prepared_layer
from niwaki.runtime.chunked_matmul import decode_rows
from support.trellis_records import kernel_parts, trellis_matrix

PATHS = {"best": BEST, "portable": PORTABLE, "avx2": AVX2, "vbmi": VBMI}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def missed(state: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    rows = len(wanted)
    return ((level[state[:rows].int()] - wanted).square() * weight[:, None]).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_paths_are_rings_and_the_compiled_search_is_the_reference(bits: int) -> None:
    wanted, weight, level = normal(50, 7), normal(50, seed=1).abs() + 0.1, normal(256, seed=2)
    state = encode(wanted, weight, level, bits)
    assert state.shape == (64, 7) and state.dtype == torch.uint8
    row = torch.arange(64)
    following = state[row // RING * RING + (row + 1) % RING]
    assert torch.equal(state >> bits, following & (255 >> bits))
    exact = encode_reference(wanted.double(), weight.double(), level.double(), bits)
    assert torch.equal(encode_reference(wanted, weight, level, bits), state)
    # Sums in float32 may choose another path of the same cost.
    found, best = missed(state, wanted, weight, level), missed(exact, wanted, weight, level)
    assert abs(float(found - best)) <= 1e-5 * float(best)


@pytest.mark.parametrize("bits", [1, 2])
def test_no_path_is_better_than_the_one_found(bits: int) -> None:
    """Give a weight to four rows of a ring alone: all paths through them are few."""
    length = 4 * bits + 8 - bits
    weight = torch.zeros(RING)
    weight[:4] = 1.0
    level, wanted = normal(256), normal(RING, 3, seed=1)
    state = encode(wanted, weight, level, bits)
    for column in range(3):
        best = float("inf")
        for word in range(2**length):
            states = torch.tensor([word >> bits * row & 255 for row in range(4)])
            best = min(best, float((level[states] - wanted[:4, column]).square().sum()))
        assert float(missed(state[:, column, None], wanted[:, column, None], weight, level)) <= best * (1 + 1e-5)


def test_the_loss_of_normal_weights_is_that_of_a_trellis() -> None:
    """Compare with grids of as many levels, which lose 36, 12 and 3.5 %."""
    from niwaki.methods.shared.trellis_codes import normal_levels

    wanted = normal(256, 32)
    for bits, limit in ((1, 0.335), (2, 0.09), (3, 0.026)):
        level = normal_levels(bits)
        lost = missed(encode(wanted, torch.ones(256), level, bits), wanted, torch.ones(256), level)
        assert float(lost) / wanted.numel() < limit


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("rows", "columns", "bits", "others"), [(45, 37, 2, None), (64, 600, 1, 2), (33, 129, 3, 4), (100, 64, 4, None)]
)
def test_products_and_decoded_rows(rows: int, columns: int, bits: int, others: int | None, path: str) -> None:
    compiled = cpu_module()
    assert compiled is not None
    if not compiled.supported(PATHS[path]):
        pytest.skip(f"this processor has no {path}")
    parts = trellis_matrix(rows, columns, bits, others)
    weight, layer = assemble_trellis(parts), prepared_layer(kernel_parts(parts), rows, columns)
    for tokens, dtype in product((1, 2, 3, 7), (torch.float32, torch.bfloat16)):
        x = normal(tokens, columns).to(dtype)
        found = cpu_product(layer, x, rows, PATHS[path])
        alone = torch.cat([cpu_product(layer, one[None], rows, PATHS[path]) for one in x])
        assert torch.equal(found, alone), "tokens together are what they are alone"
        exact = x.double() @ weight.double().T
        assert found.dtype == dtype
        limit = 1e-4 if dtype == torch.float32 else 4e-3
        assert float((found - exact).norm()) <= limit * float(exact.norm())
    decoded = torch.empty(rows - 32, columns)
    assert torch.equal(decode_rows(layer, 32, decoded, PATHS[path]), weight[32:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_fit(bits: int, sign: int, path: str) -> None:
    """Multiply levels at both ends with inputs of one size: nothing cancels in the sums of 32 bits."""
    compiled = cpu_module()
    assert compiled is not None
    if not compiled.supported(PATHS[path]):
        pytest.skip(f"this processor has no {path}")
    (part,) = trellis_matrix(32, 515, bits)
    part.level_S[:] = torch.where(torch.arange(256) < 128, -127, 127)
    part.level_S[3] = -128
    weight, layer = assemble_trellis([part]), prepared_layer(kernel_parts([part]), 32, 515)
    x = sign * weight[7].sign()[None] * 3.0  # every product of row 7 has this sign
    found = cpu_product(layer, x, 32, PATHS[path])
    exact = x.double() @ weight.double().T
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 15, 16, 17, 30])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_few_columns_are_read_and_none_after_them(columns: int, bits: int, path: str) -> None:
    """Decode and multiply with every rest of four or sixteen columns, beside a second tile."""
    compiled = cpu_module()
    assert compiled is not None
    if not compiled.supported(PATHS[path]):
        pytest.skip(f"this processor has no {path}")
    parts = trellis_matrix(64, columns, bits, 5 - bits if columns > 2 else None)
    weight, layer = assemble_trellis(parts), prepared_layer(kernel_parts(parts), 64, columns)
    decoded = torch.full((64, columns), 7.0)
    assert torch.equal(decode_rows(layer, 0, decoded, PATHS[path]), weight)
    x = normal(2, columns)
    exact = x.double() @ weight.double().T
    assert float((cpu_product(layer, x, 64, PATHS[path]) - exact).norm()) <= 1e-4 * float(exact.norm())


def test_values_that_are_not_finite_reach_the_output() -> None:
    parts = trellis_matrix(32, 40, 2)
    layer = prepared_layer(kernel_parts(parts), 32, 40)
    for wrong in (float("nan"), float("inf")):
        x = torch.ones(1, 40)
        x[0, 7] = wrong
        assert not cpu_product(layer, x, 32).isfinite().any()
        assert cpu_product(layer, torch.zeros(1, 40), 32).eq(0).all()


def test_the_compiled_layer_refuses_what_would_touch_memory() -> None:
    compiled = cpu_module()
    assert compiled is not None
    (part,) = kernel_parts(trellis_matrix(45, 37, 2))
    rings, levels, scale = part.rings_TCB.numpy(), part.levels_S.numpy(), part.scale_O[None].numpy()
    for wrong in (
        (rings[:1], levels, scale, None),
        (rings[:, :36], levels, scale, None),
        (rings[:, :, :7], levels, scale, None),
        (rings, levels[:255], scale, None),
        (rings, levels, scale[:, :44], None),
        (rings, levels, scale, torch.zeros(37, dtype=torch.int32).numpy()),
        (rings, levels, scale, torch.arange(1, 38, dtype=torch.int32).numpy()),
    ):
        with pytest.raises(ValueError, match="niwaki kernels"):
            compiled.TrellisLayer(45, 37).add(*(None if a is None else a.copy() for a in wrong))
    layer = compiled.TrellisLayer(45, 38)
    layer.add(rings, levels, scale, torch.arange(37, dtype=torch.int32).numpy())
    x, out = torch.zeros(1, 38), torch.zeros(1, 45)
    with pytest.raises(ValueError, match="do not make a matrix"):
        layer.multiply(x.data_ptr(), out.data_ptr(), 1, False, 1, 0)
    with pytest.raises(ValueError, match="bits"):
        compiled.trellis_encode(normal(32, 1), torch.ones(32), normal(256), 5, torch.zeros(32, 1, dtype=torch.uint8), 1)
