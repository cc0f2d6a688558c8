"""Packed layers in graphs of torch.compile on the CPU: what runs without a graph, prepared and checked once."""

import copy
import gc
from typing import Any

import pytest
import torch

from niwaki.runtime import linear, sparse_linear
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear
from niwaki.runtime.stored import stored_product_op
from support.packed_records import example

KINDS = ["codes", "codes-small-groups", "mixed", "bitmap-bfloat16", "two_four-int4", "tiles"]


def layer_of(kind: str) -> Any:
    record = example(kind)
    rows, columns = record.description["shape"]
    made = SparseLinear if "sparse" in record.description else PackedLinear
    layer = made(rows, columns, record.description, bias=True)
    generator = torch.Generator().manual_seed(0)
    layer.load_state_dict({**record.tensors, "bias": torch.randn(rows, generator=generator)})
    return layer.bfloat16()


def graph_of(layer: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_graph_gives_what_the_layer_gives(kind: str) -> None:
    layer = layer_of(kind)
    graph = graph_of(layer)  # before the layer is prepared
    for tokens in (1, 70):
        x = torch.randn(2, tokens, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        found = graph(x)
        assert found.dtype == torch.bfloat16 and torch.equal(found, layer(x))


@pytest.mark.parametrize("kind", ["mixed", "bitmap-bfloat16", "tiles"])
def test_a_graph_prepares_once_and_again_after_a_load(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for module, name in ((linear, "prepared_layer"), (sparse_linear, "prepared_layer"),
                         (sparse_linear, "prepared_tiles")):  # fmt: skip
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=original: (made.append("layer"), f(*args))[1])
    layer = layer_of(kind)
    graph = graph_of(layer)
    x = torch.randn(1, layer.in_features).bfloat16()
    for _ in range(3):
        graph(x)
    assert made == ["layer"]
    scale = next(name for name in layer.stored() if name.startswith(("scale", "values")))
    changed = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    changed[scale].zero_()
    layer.load_state_dict(changed)
    assert torch.equal(graph(x), layer(x)) and made == ["layer"] * 2


def test_a_copy_has_its_own_numbers_and_a_lost_model_is_named() -> None:
    layer = layer_of("mixed")
    other = copy.deepcopy(layer)
    other.load_state_dict({**other.state_dict(), "scale_0": torch.zeros_like(other.get_buffer("scale_0"))})
    x = torch.randn(1, layer.in_features).bfloat16()
    found, copied = graph_of(layer)(x), graph_of(other)(x)
    assert torch.equal(found, layer(x)) and torch.equal(copied, other(x)) and not torch.equal(found, copied)
    ticket = other._ticket
    assert int(ticket) != int(layer._ticket)
    torch._dynamo.reset()
    del other
    gc.collect()
    with pytest.raises(RuntimeError, match="the model of this compiled graph is gone"):
        stored_product_op(x, ticket, 45)
