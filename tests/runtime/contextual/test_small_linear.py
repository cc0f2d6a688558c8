"""Layers that read kept rows in the full matrix, against copies; and the detection of gated layers."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from niwaki.model.anatomy import find_blocks
from niwaki.runtime.contextual.small_linear import KeptColumns, KeptRows, find_gate
from support.contextual import layout_of, model_of


@pytest.mark.parametrize(
    ("family", "wanted"),
    [("llama", "silu"), ("qwen2", "silu"), ("gemma2", "gelu_tanh"), ("opt", None)],
)
def test_gates_are_found(family: str, wanted: str | None) -> None:
    model = model_of(family)
    block, unit = find_blocks(model)[1][0], layout_of(model).units["neurons"]
    parts = [block.get_submodule(name) for name in (*unit.producers, unit.consumer)]
    assert all(isinstance(part, nn.Linear) for part in parts)
    layer = block.get_submodule(unit.consumer.rpartition(".")[0])
    found = find_gate(layer, parts[:-1], parts[-1])  # type: ignore[arg-type]
    assert (None if found is None else found[1]) == wanted
    if found is not None:
        assert unit.producers[found[0]].endswith("gate_proj")


def test_a_layer_that_does_something_else_is_no_gate() -> None:
    torch.manual_seed(0)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16, False), nn.Linear(8, 16, False), nn.Linear(16, 8, False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down(torch.tanh(self.gate(x)) * self.up(x))
            return y

    layer = Other()
    assert find_gate(layer, [layer.gate, layer.up], layer.down) is None


@pytest.mark.parametrize("bias", [False, True])
def test_kept_rows_and_columns(bias: bool) -> None:
    torch.manual_seed(0)
    full, units_K, width = nn.Linear(12, 12, bias), torch.tensor([3, 0]), 3
    places_R = torch.tensor([9, 10, 11, 0, 1, 2])
    x_BTI, x_BTR = torch.randn(2, 1, 12), torch.randn(2, 1, 6)
    offset = full.bias[places_R] if bias else None
    torch.testing.assert_close(KeptRows(full, units_K, width)(x_BTI), linear(x_BTI, full.weight[places_R], offset))
    columns = KeptColumns(full, units_K, width)(x_BTR)
    torch.testing.assert_close(columns, linear(x_BTR, full.weight[:, places_R], full.bias if bias else None))
