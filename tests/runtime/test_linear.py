"""PackedLinear: few tokens through the kernel, many through decoded tiles, both the same layer."""

import copy

import pytest
import torch

from niwaki.formats.quantized import QuantizedColumns, assemble, stored_tensors
from niwaki.kernels.planes import plane_product
from niwaki.runtime import chunked_matmul
from niwaki.runtime.linear import PackedLinear


def layer(rows: int, columns: int, bias: bool, affine: bool = False) -> tuple[PackedLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(columns, generator=generator)
    first, rest = order[: columns // 4].sort().values, order[columns // 4 :].sort().values

    def part(columns_C: torch.Tensor, bits: int, grid: str) -> QuantizedColumns:
        width = len(columns_C)
        code = torch.randint(0, 2**bits, (rows, width), generator=generator, dtype=torch.uint8)
        groups = -(-width // 32)
        scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
        offset = torch.randn(rows, groups, generator=generator).half() if grid == "free" else None
        zero = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
        return QuantizedColumns(columns_C, bits, grid, 32, code, scale, offset, zero if grid == "affine" else None)

    parts = [part(first, 4, "midrise"), part(rest, 1, "free")]
    if affine:
        parts = [part(torch.arange(columns), 3, "affine")]
    found = PackedLinear(rows, columns, {"parts": [p.describe() for p in parts]}, bias)
    found.load_state_dict({**stored_tensors(parts, columns), **({"bias": torch.randn(rows)} if bias else {})})
    return found, assemble(parts)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_linear_layer_of_the_decoded_matrix(
    tokens: int, bias: bool, dtype: torch.dtype, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_matmul, "CHUNK_BYTES", 1)  # several tiles
    found, weight = layer(100, 256, bias, affine)
    found.to(dtype)
    assert torch.equal(found.weight_OI(torch.float32), weight)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.nn.functional.linear(x.float(), weight, None if found.bias is None else found.bias.float())
    y = found(x.view(1, tokens, 256))
    assert y.dtype == dtype and y.shape == (1, tokens, 100)
    limit = 1e-3 if dtype == torch.float32 else 1e-2
    assert float((y[0].float() - expected).norm() / expected.norm()) < limit


def test_prefill_never_holds_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_matmul, "CHUNK_BYTES", 1)
    found, _ = layer(100, 256, False)
    seen = []
    real = chunked_matmul.decode_rows
    monkeypatch.setattr(chunked_matmul, "decode_rows", lambda a, b, out: seen.append(len(out)) or real(a, b, out))
    found(torch.randn(40, 256))
    assert seen == [32, 32, 32, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_one_call_gives_what_the_parts_add_up_to(tokens: int, dtype: torch.dtype) -> None:
    found, _ = layer(100, 4096, False)  # enough columns for tables filled by several threads
    x = torch.randn(tokens, 4096, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = torch.zeros(tokens, 100)
    for part in found._prepare().parts:
        plane_product(x.float(), *part, out)
    assert torch.equal(found(x), out.to(dtype))
    x[0, 7] = torch.nan
    assert found(x)[0].isnan().all() and found(x)[1:].isfinite().all()


@pytest.mark.parametrize("affine", [False, True])
def test_a_used_layer_follows_what_is_loaded_into_it(affine: bool) -> None:
    """Column lists and zero codes are made from the tensors once; other ones must not meet those."""
    found, _ = layer(64, 256, False, affine)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(2))
    found(x)
    other = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    name = "zero_0" if affine else "columns"
    other[name] = other[name].flip(0) if affine else other[name].flip(-1)
    found.load_state_dict(other)
    expected = x @ found.weight_OI(torch.float32).T
    assert float((found(x) - expected).norm() / expected.norm()) < 1e-3


def test_kernels_follow_copies_and_new_buffers() -> None:
    found, weight = layer(64, 256, False)
    other, other_weight = layer(64, 256, False, affine=True)
    x = torch.eye(256)[:3]
    found(x), other(x)
    again = copy.deepcopy(found)
    assert torch.equal(again(x), found(x)) and again._prepare().planes_TKBR is again.get_buffer("planes_0")
    fresh = PackedLinear(64, 256, {"parts": other.described}, False)
    fresh.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in other.state_dict().items()})
    assert not fresh(x).any()
    fresh.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(fresh(x), other_weight.T[:3], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found(x), weight.T[:3], rtol=1e-2, atol=1e-2)
