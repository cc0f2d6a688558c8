"""What multiplied is seen, not assumed."""

from typing import Any

import pytest
import torch
from torch import nn

from niwaki.kernels.cpu_module import cpu_module
from niwaki.measure.bench.kernels import DECODED, DENSE, detect_kernels
from niwaki.measure.bench.variants import four_bits, two_four, two_four_codes
from niwaki.runtime import sparse_linear
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear


class Model(nn.Module):
    """What is asked of a model: its layers, dtype and device."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dtype, self.device = torch.bfloat16, torch.device("cpu")


def layer(encode: Any, kind: Any) -> Any:
    stored = encode(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16())
    found = kind(64, 128, stored.description, bias=False)
    found.load_state_dict(dict(stored.tensors))
    return found


def expected(*paths: tuple[int, str]) -> str:
    compiled = cpu_module()
    assert compiled is not None
    return next((name for number, name in paths if compiled.supported(number)), "portable")


def test_few_tokens_run_the_compiled_kernels() -> None:
    codes, nonzeros = layer(four_bits, PackedLinear), layer(two_four, SparseLinear)
    assert detect_kernels(Model(codes), 1).kernel == expected((3, "AVX-512"), (2, "AVX2"))
    assert detect_kernels(Model(nonzeros), 1).kernel == expected((4, "AVX-512 BF16"), (2, "AVX2"))
    coded = Model(layer(two_four_codes, SparseLinear))
    assert detect_kernels(coded, 16).kernel == expected((3, "AVX-512"), (2, "AVX2"))


def test_many_tokens_are_seen_to_decode() -> None:
    codes = layer(four_bits, PackedLinear)
    assert detect_kernels(Model(codes), 64).kernel == DECODED


def test_without_kernels_nonzeros_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_linear, "reaches", lambda *_: False)
    assert detect_kernels(Model(layer(two_four, SparseLinear)), 1).kernel == DECODED


def test_a_model_without_packed_layers_is_torch_and_two_kinds_are_both_told() -> None:
    assert detect_kernels(Model(nn.Linear(8, 8)), 1).kernel == DENSE
    both = Model(layer(four_bits, PackedLinear), layer(two_four_codes, SparseLinear))
    assert detect_kernels(both, 64).kernel == f"{DECODED} + {expected((3, 'AVX-512'), (2, 'AVX2'))}"
