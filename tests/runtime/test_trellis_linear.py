"""TrellisLinear: few tokens by the kernel, many by decoded rows, with and without compiled kernels."""

import pytest
import torch

from niwaki.formats.packed import PackedTensors
from niwaki.formats.trellis import assemble_trellis
from niwaki.runtime import chunked_matmul, trellis_linear
from niwaki.runtime.trellis_linear import TrellisLinear
from support.trellis_records import trellis_matrix


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize("others", [None, 3])
def test_forward_is_the_linear_layer_of_the_decoded_matrix(
    tokens: int, others: int | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_matmul, "CHUNK_BYTES", 1)  # several tiles
    if not compiled:
        monkeypatch.setattr(trellis_linear, "cpu_module", lambda: None)
    parts = trellis_matrix(100, 70, 2, others)
    record = PackedTensors.of_trellis(parts, (100, 70))
    layer = TrellisLinear(100, 70, record.description, True)
    bias = torch.randn(100, generator=torch.Generator().manual_seed(2))
    layer.load_state_dict({**record.tensors, "bias": bias})
    weight = assemble_trellis(parts)
    assert torch.equal(layer.weight_OI(torch.float32), weight) and torch.equal(layer.weight, weight)
    x = torch.randn(1, tokens, 70, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    found = layer(x)
    assert found.shape == (1, tokens, 100)
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
    assert "trellis of" in layer.extra_repr()
