"""PackedEmbedding: the rows that are looked up are those of the decoded matrix, alone and through transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import niwaki  # noqa: F401  (teaches transformers the packed format)
from niwaki.formats.quantized import QuantizedColumns, assemble, read_parts, stored_tensors
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.model.checkpoint import quantization, quantized_config
from niwaki.model.files import write_shard
from niwaki.runtime import embedding as module
from niwaki.runtime.embedding import PackedEmbedding, pack_embedding
from niwaki.runtime.linear import PackedLinear
from support.families import build, families


def parts_of(weight: torch.Tensor, bits: int, grid: str) -> list[QuantizedColumns]:
    columns = weight.shape[1]
    found = nearest(weight.float(), groups_of(0, columns, bits, grid, 32), clip=False).storable()
    return found.parts(torch.arange(columns))


def embedding(rows: int, bits: int, grid: str) -> tuple[PackedEmbedding, torch.Tensor]:
    parts = parts_of(torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)), bits, grid)
    found: Any = torch.nn.Embedding(rows, 64, device="meta")
    pack_embedding(found, {"parts": [part.describe() for part in parts]})
    found.to_empty(device="cpu").load_state_dict(stored_tensors(parts, 64))
    return found, assemble(parts)


@pytest.mark.parametrize("rows", [1, 40, 96])
@pytest.mark.parametrize(
    ("bits", "grid"), [(4, "affine"), (8, "affine"), (3, "symmetric"), (1, "free"), (2, "midrise")]
)
def test_a_look_up_gives_the_rows_of_the_decoded_matrix(
    bits: int, grid: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DECODED_TOKENS", 5)  # several rounds
    found, weight = embedding(rows, bits, grid)
    assert torch.equal(found.weight_OI(torch.float32), weight)
    ids = torch.randint(0, rows, (3, 7), generator=torch.Generator().manual_seed(1))
    assert torch.equal(found(ids), weight[ids])
    assert found(ids[:0]).shape == (0, 7, 64)
    with pytest.raises(IndexError):
        found(torch.tensor([rows]))


def test_casts_change_what_comes_out_and_not_the_codes() -> None:
    found, weight = embedding(40, 4, "affine")
    found.to(torch.bfloat16)
    ids = torch.arange(40)
    assert torch.equal(found(ids), weight.bfloat16())
    assert torch.equal(found.weight_OI(torch.float32), weight)


def test_an_index_of_the_weight_decodes_the_rows_that_it_asks_for() -> None:
    """A wrapper reads the row of its padding at every step, and must not decode the whole matrix for it."""
    found, _ = embedding(40, 4, "affine")
    decoded = found.weight_OI(torch.float32)
    assert torch.equal(found.weight[3, :], decoded[3]) and torch.equal(found.weight[-1], decoded[-1])
    assert torch.equal(found.weight[2:5], decoded[2:5]) and torch.equal(found.weight[None, :, :], decoded[None])
    found.bfloat16()
    assert found.weight[3].dtype == found.weight[2:5].dtype == torch.bfloat16


def test_a_tied_head_has_the_tensors_of_the_embeddings_and_survives_a_copy() -> None:
    found, weight = embedding(40, 4, "affine")
    pair = torch.nn.ModuleDict({"embeddings": found, "head": found.head(bias=False)})
    assert [name for name, _ in pair["head"].named_buffers()] == ["_like"]
    x = torch.randn(1, 64)
    for modules in (pair, copy.deepcopy(pair)):
        torch.testing.assert_close(modules["head"](x), x @ weight.T, rtol=1e-2, atol=1e-2)
        assert modules["head"].stored()["planes_0"] is modules["embeddings"].planes_0


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_packed_ends_of_every_family(family: str, tied: bool, tmp_path: Path) -> None:
    config = copy.deepcopy(families()[family].config)
    config.tie_word_embeddings = tied
    dense = build(config)
    dense.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    modules: dict[str, Any] = {}
    for end in (dense.get_input_embeddings(), dense.get_output_embeddings()):
        name = next(name for name, found in dense.named_modules() if found is end)
        if tied and modules:
            continue
        parts = parts_of(end.weight.data, 4, "affine")
        modules[name] = {"shape": list(end.weight.shape), "parts": [part.describe() for part in parts]}
        for known in (f"{name}.weight", "embed_out.weight" if name == "lm_head" else ""):
            tensors.pop(known, None)
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored_tensors(parts, end.weight.shape[1]).items()}
        end.weight.data.copy_(assemble(parts))
    write_shard(tmp_path / "model.safetensors", tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(quantized_config(config, quantization(modules, {})))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(packed.get_input_embeddings(), PackedEmbedding)
    assert isinstance(packed.get_output_embeddings(), PackedLinear)
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        one, expected = packed(ids[:1, :3]).logits, dense(ids[:1, :3]).logits  # few tokens: the kernel
    assert (one - expected).norm() < 2e-3 * expected.norm()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert packed.generate(ids, **options).shape == (2, 16)
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids).logits, packed(ids).logits)


def test_rows_are_read_from_several_parts() -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    first, rest = torch.arange(0, 96, 3), torch.tensor([i for i in range(96) if i % 3])
    parts = [
        QuantizedColumns(place, bits, grid, 16, found.code_OC, found.scale_OG, found.offset_OG, found.zero_OG)
        for place, bits, grid in ((first, 4, "affine"), (rest, 1, "free"))
        for found in nearest(weight[:, place], groups_of(0, len(place), bits, grid, 16), clip=False)
        .storable()
        .parts(torch.arange(len(place)))
    ]
    rows = torch.tensor([69, 0, 31, 32, 31])
    described = [part.describe() for part in parts]
    assert torch.equal(assemble(read_parts(stored_tensors(parts, 96), described, 96, rows)), assemble(parts)[rows])
