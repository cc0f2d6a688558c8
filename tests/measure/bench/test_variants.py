"""Forms of a dense model: what they store, counted by hand, what they share, and why one cannot be made."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from niwaki.errors import ArchitectureError, NiwakiError, TargetError
from niwaki.formats.sparse import SLACK_BYTES
from niwaki.measure.bench.models import copy_sharing_tensors, read_bytes, tensors_of, weight_bytes
from niwaki.measure.bench.variants import VARIANTS, VariantModel
from niwaki.model.anatomy import Anatomy, discover
from niwaki.model.hf import build_skeleton
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear
from support.families import build, families

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
}
MATRICES = [(64, 64)] * 4 + [(128, 64)] * 2 + [(64, 128)]  # of one of the two blocks
ENDS = 2 * 96 * 64 * 2 + 5 * 64 * 2  # embeddings, head, norms, in bfloat16
ROTARY = 2 * 4 * 4  # frequencies, and those before scaling


@pytest.fixture(scope="module")
def dense() -> Any:
    return build(transformers.LlamaConfig(**SIZES), torch.bfloat16).requires_grad_(False)


@pytest.fixture(scope="module")
def anatomy(dense: Any) -> Anatomy:
    return anatomy_of(dense)


def anatomy_of(model: Any) -> Anatomy:
    return discover(build_skeleton(model.config, model.dtype))


def stored_bytes(name: str, rows: int, columns: int) -> int:
    """By the definitions of the formats."""
    if name == "bitmap":
        return rows * columns // 8 + rows * columns // 2 * 2 + 4 * rows + SLACK_BYTES
    if name == "2:4":
        return rows * columns // 8 + rows * columns // 2 * 2 + SLACK_BYTES
    groups = columns // (128 if columns % 128 == 0 else 64)
    if name == "2:4+4bit":
        return rows * columns // 8 + rows * columns // 2 // 2 + 2 * rows * groups
    if name == "4bit":
        return rows * columns // 2 + 2 * rows * groups + rows * groups // 2
    wide = round(0.2 * columns / 8)  # bytes of columns
    return rows * wide * 4 + rows * (columns // 8 - wide) + 2 * rows + 2 * 2 * rows + columns // 8


@pytest.mark.parametrize("name", ["bitmap", "2:4", "2:4+4bit", "4bit", "1.6bit"])
def test_a_packed_form_takes_the_bytes_of_its_format_and_shares_the_ends(
    name: str, dense: Any, anatomy: Anatomy
) -> None:
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    made = VARIANTS[name].make(dense, anatomy).model
    expected = 2 * sum(stored_bytes(name, *shape) for shape in MATRICES)
    assert weight_bytes(made) == expected + ENDS + ROTARY
    assert read_bytes(made) == weight_bytes(made) - 96 * 64 * 2
    assert made.lm_head.weight is dense.lm_head.weight
    layers = [part for part in made.modules() if isinstance(part, PackedLinear | SparseLinear)]
    assert len(layers) == 2 * len(MATRICES)
    addresses = [tensor.data_ptr() for layer in layers for tensor in layer.stored().values()]
    assert len(set(addresses)) == len(addresses), "every layer has memory of its own"
    assert all(torch.equal(before[key], tensor) for key, tensor in dense.state_dict().items())


@pytest.mark.parametrize(("name", "most"), [("bitmap", 0.5), ("2:4", 0.5), ("2:4+4bit", 0.5)])
def test_masks_keep_the_largest_half(name: str, most: float, dense: Any, anatomy: Anatomy) -> None:
    made = VARIANTS[name].make(dense, anatomy).model
    weight_OI = dense.model.layers[0].mlp.up_proj.weight.float()
    found_OI = made.model.layers[0].mlp.gate_proj.weight_OI(torch.float32)  # the first of this shape
    first_OI = dense.model.layers[0].mlp.gate_proj.weight.float()
    assert found_OI.shape == weight_OI.shape
    assert float((found_OI != 0).float().mean()) <= most
    kept_OI = found_OI != 0
    if "4bit" not in name:
        assert torch.equal(found_OI[kept_OI], first_OI[kept_OI])
    if name != "bitmap":
        assert int(kept_OI.view(128, -1, 4).sum(2).max()) == 2
    else:
        for row_I, keep_I in zip(first_OI.abs(), kept_OI, strict=True):
            assert float(row_I[keep_I].min()) >= float(row_I[~keep_I].max())


def test_a_packed_form_multiplies_what_it_stores(dense: Any, anatomy: Anatomy) -> None:
    made = VARIANTS["bitmap"].make(dense, anatomy).model
    x_NI = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = made.model.layers[1].self_attn.o_proj
    expected_NO = x_NI.double() @ layer.weight_OI(torch.float64).T
    assert float((layer(x_NI).double() - expected_NO).norm() / expected_NO.norm()) < 1e-2


def test_biases_stay() -> None:
    model = build(families()["opt"].config)
    made = VARIANTS["2:4"].make(model, anatomy_of(model)).model
    layer = made.model.decoder.layers[0].fc1
    assert isinstance(layer, SparseLinear)
    assert layer.bias is model.model.decoder.layers[0].fc1.bias


def test_structured_has_a_quarter_less_in_its_blocks(dense: Any, anatomy: Anatomy) -> None:
    made = VARIANTS["structured"].make(dense, anatomy)
    small, full = made.model.model.layers[0], dense.model.layers[0]
    count = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in full.parameters())
    assert 0.65 < count <= 0.75
    assert small.self_attn.q_proj.weight.shape == (48, 64)
    rows = small.mlp.up_proj.out_features
    assert torch.equal(small.mlp.up_proj.weight, full.mlp.up_proj.weight[:rows])
    assert made.model.lm_head.weight is dense.lm_head.weight
    assert "of the blocks removed" in made.detail
    assert torch.isfinite(_logits(made)).all()


def test_contextual_skips_half_by_the_runtime_path(dense: Any, anatomy: Anatomy) -> None:
    made = VARIANTS["contextual"].make(dense, anatomy)
    ids_BT = torch.arange(1, 18)[None]
    made.model.generate(ids_BT, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    record = made.model.contextual.records[-1]
    assert record.sparse_tokens == 2 and abs(record.skipped_frac[-1] - 0.5) < 0.05
    assert sum(tensor.numel() for tensor in made.extra_tensors) == made.model.contextual.shadow.predictor.parameters
    assert not hasattr(dense, "contextual")


def test_a_twin_shares_every_tensor_and_no_module(dense: Any) -> None:
    other = copy_sharing_tensors(dense)
    assert tensors_of(other).keys() == tensors_of(dense).keys()
    assert not set(map(id, other.modules())) & set(map(id, dense.modules()))


def test_a_head_that_is_tied_is_read_and_counted_once() -> None:
    model = build(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), torch.bfloat16)
    assert read_bytes(model) == weight_bytes(model)
    assert weight_bytes(model) == 2 * 2 * sum(r * c for r, c in MATRICES) + ENDS - 96 * 64 * 2 + ROTARY


REASONS = [
    ("gpt2", "bitmap", ArchitectureError, "none of the matrices of GPT2LMHeadModel is the weight of an nn.Linear"),
    ("phi3", "contextual", ArchitectureError, "q, k and v apart"),
    ("phi3", "structured", ArchitectureError, "q, k and v apart"),
    ("llama", "4bit", TargetError, "got 48 columns"),
]


@pytest.mark.parametrize(("family", "form", "kind", "message"), REASONS)
def test_what_cannot_be_made_says_why(family: str, form: str, kind: type[NiwakiError], message: str) -> None:
    model = build(families()[family].config)
    with pytest.raises(kind, match=message):
        VARIANTS[form].make(model, anatomy_of(model))


def test_fused_experts_stay_dense_and_are_told() -> None:
    model = build(families()["mixtral"].config)
    made = VARIANTS["2:4"].make(model, anatomy_of(model))
    experts = sum(linear.expert is not None for linear in anatomy_of(model).blocks[0].linears.values())
    assert made.detail == f"{3 * experts} matrices outside nn.Linear stay dense"


def _logits(made: VariantModel) -> Tensor:
    logits: Tensor = made.model(torch.arange(1, 5)[None]).logits
    return logits
