"""Units, sizes and configs of smaller decoders, on tiny models of several families."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from torch import Tensor

from niwaki.config.targets import Kind
from niwaki.errors import ArchitectureError, InputError
from niwaki.model import block_trial
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton
from niwaki.model.prunable import PrunedShape, ShapeSpace, new_name, unit_axes, units_of
from niwaki.model.pruned_config import group_indices
from support.families import COMMON, GQA, build, families
from support.odd_families import odd_config

COVERED = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt")


def sizes_of(config: Any) -> ShapeSpace:
    skeleton = build_skeleton(config, torch.float32)
    return ShapeSpace(discover(skeleton), skeleton, json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize("family", COVERED)
def test_units_are_attention_and_dense_layer(family: str) -> None:
    config = families()[family].config
    units = sizes_of(config).units
    opt = family == "opt"
    assert units["heads"].consumer == ("self_attn.out_proj" if opt else "self_attn.o_proj")
    assert set(units["heads"].producers) == {f"self_attn.{name}_proj" for name in "qkv"}
    assert units["heads"].count == (4 if opt else 2)
    assert units["neurons"].consumer == ("fc2" if opt else "mlp.down_proj")
    assert set(units["neurons"].producers) == ({"fc1"} if opt else {"mlp.gate_proj", "mlp.up_proj"})
    assert units["neurons"].count == 48


@pytest.mark.parametrize("family", sorted(set(families()) - set(COVERED)))
def test_blocks_of_another_kind_are_refused_by_name(family: str) -> None:
    with pytest.raises(ArchitectureError, match="structured pruning needs blocks of one"):
        sizes_of(families()[family].config)


def test_a_dense_layer_as_wide_as_the_stream_is_not_taken_for_attention() -> None:
    config = transformers.LlamaConfig(**{**GQA, "intermediate_size": 32, "num_key_value_heads": 4})
    units = units_of(discover(build_skeleton(config, torch.float32)).blocks[0], 4)
    assert units["neurons"].consumer == "mlp.down_proj" and units["heads"].consumer == "self_attn.o_proj"


@pytest.mark.parametrize("family", COVERED)
@pytest.mark.parametrize("dropped", [(), (1,)])
def test_removed_share_is_that_of_the_smaller_model(family: str, dropped: tuple[int, ...]) -> None:
    sizes = sizes_of(families()[family].config)
    shape = sizes.shape(16, sizes.heads, dropped)
    config = dict(sizes.config_for(shape))
    smaller = build_skeleton(transformers.AutoConfig.for_model(config.pop("model_type"), **config), torch.float32)

    def count(model: Any) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if f"{sizes.anatomy.path}." in name)

    whole = build_skeleton(families()[family].config, torch.float32)
    assert sizes.removed_frac(shape) == pytest.approx(1 - count(smaller) / count(whole), abs=1e-12)


def test_heads_that_do_not_divide_the_width_make_a_llama_a_mistral() -> None:
    config = transformers.LlamaConfig(**{**COMMON, "num_key_value_heads": 4, "intermediate_size": 48, "head_dim": 8})
    sizes = sizes_of(config)
    assert sizes.legal_heads() == [4, 3, 2, 1]
    half = sizes.config_for(sizes.shape(48, 2))
    assert half["model_type"] == "llama" and (half["num_attention_heads"], half["num_key_value_heads"]) == (2, 2)
    three = sizes.config_for(sizes.shape(48, 3))
    assert three["model_type"] == "mistral" and three["architectures"] == ["MistralForCausalLM"]
    assert (three["num_attention_heads"], three["head_dim"], three["sliding_window"]) == (3, 8, None)


def test_what_a_config_cannot_say_is_named() -> None:
    sizes = sizes_of(families()["opt"].config)
    assert sizes.legal_heads() == [4]
    with pytest.raises(
        InputError,
        match=r"heads and ffn_dim in a config of type opt cannot express 48 neurons",
    ):
        sizes.config_for(sizes.shape(48, 2))
    silent = ShapeSpace(sizes.anatomy, build_skeleton(families()["opt"].config, torch.float32), {"model_type": "opt"})
    with pytest.raises(InputError, match="says 48 neurons in none of intermediate_size, ffn_dim"):
        silent.config_for(sizes.shape(16, 4))


def test_lists_of_layers_lose_those_that_are_gone() -> None:
    config = transformers.Gemma3TextConfig(
        **GQA, sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    )
    sizes = sizes_of(config)
    assert sizes.config_for(sizes.shape(48, 2, (0,)))["layer_types"] == ["full_attention", "sliding_attention"]


def test_fitting_takes_the_widest_that_removes_enough() -> None:
    sizes = sizes_of(families()["llama"].config)
    shape = sizes.fitting(0.2, 2, (), 8)
    assert shape is not None and sizes.removed_frac(shape) >= 0.2
    wider = sizes.shape(max(shape.neurons) + 8, 2)
    assert sizes.removed_frac(wider) < 0.2
    assert sizes.fitting(1 / 3, 2, (1,), 8) == sizes.shape(48, 2, (1,))  # a block alone is enough
    assert sizes.fitting(0.95, 2, (), 8) is None


def test_shapes_tell_what_is_gone_and_whether_a_config_can_say_it() -> None:
    assert PrunedShape((8, 0, 8), (2, 0, 2)).dropped == (1,) and PrunedShape((8, 0, 8), (2, 0, 2)).even
    assert not PrunedShape((8, 4), (2, 2)).even and not PrunedShape((8, 8), (0, 0)).even


def test_places_and_names() -> None:
    unit = sizes_of(families()["llama"].config).units["heads"]
    assert group_indices(unit, [1], 32).tolist() == list(range(16, 32))
    assert group_indices(unit, [1], 16).tolist() == list(range(8, 16))
    assert (
        new_name("model.layers.5.mlp.up_proj.weight", "model.layers", 5, (1, 3)) == "model.layers.3.mlp.up_proj.weight"
    )
    assert new_name("decoder.layers.5.fc1.bias", "model.decoder.layers", 5, ()) == "decoder.layers.5.fc1.bias"


def test_folder_names_do_not_matter(tmp_path: Path) -> None:
    assert new_name("h.2.mlp.c_fc.weight", "transformer.h", 2, (0,)) == "h.1.mlp.c_fc.weight"


def _cut_and_masked(sizes: ShapeSpace, config: Any, kind: Kind, kept: list[int]) -> tuple[Tensor, Tensor]:
    """Return logits of the smaller model of a config, and of the full one with zeros, without help of the trial."""
    torch.manual_seed(0)
    full = build(config)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    counts = {"neurons": sizes.neurons, "heads": sizes.heads, kind: len(kept)}
    smaller = dict(sizes.config_for(sizes.shape(counts["neurons"], counts["heads"])))
    small = build(transformers.AutoConfig.for_model(smaller.pop("model_type"), **smaller))
    unit, block = sizes.units[kind], sizes.anatomy.blocks[0]
    axes = unit_axes(unit, block, kept, sizes.followers(kind))
    state = dict(full.state_dict())
    for name, tensor in full.named_parameters():
        inside = name.removeprefix(sizes.anatomy.path + ".").partition(".")[2] if sizes.anatomy.path in name else ""
        if inside not in axes:
            continue
        along, places, size = axes[inside]
        state[name] = tensor.detach().index_select(along, places)
        if inside in {block.linears[matrix].parameter for matrix in (*unit.producers, unit.consumer)}:
            gone = [place for place in range(size) if place not in set(places.tolist())]
            with torch.no_grad():
                tensor.index_fill_(along, torch.tensor(gone), 0)
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    ids = torch.arange(12)[None] * 7 % 90
    with torch.no_grad():
        return small(ids, use_cache=False).logits, full(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "kind", "kept"),
    [
        *(
            (family, "neurons", list(range(8, 24)))
            for family in ("gpt_neo", "xglm", "ctrl", "olmo2", "stablelm", "bert")
        ),
        *((family, "heads", [1]) for family in ("granite_swa", "llama", "qwen3", "apertus")),
    ],
)
def test_a_cut_model_equals_the_full_one_with_zeros(family: str, kind: Kind, kept: list[int]) -> None:
    config = families()[family].config if family in families() else odd_config(family)
    small, masked = _cut_and_masked(sizes_of(config), config, kind, kept)
    torch.testing.assert_close(small, masked, rtol=1e-4, atol=1e-4)


REFUSED: list[tuple[str, Kind, str]] = [
    ("bitnet", "neurons", "mlp.ffn_sub_norm.weight takes all neurons together"),
    ("bitnet", "heads", "self_attn.attn_sub_norm.weight takes all heads together"),
    ("olmo2", "heads", "self_attn.q_norm.weight takes all heads together"),
    ("stablelm", "heads", "self_attn.q_proj would have 32 of 32 heads"),
    ("gpt_neo", "heads", "num_heads and intermediate_size in a config of type gpt_neo cannot express"),
]


@pytest.mark.parametrize(("family", "kind", "reason"), REFUSED)
def test_a_cut_that_changes_the_function_names_the_tensor(family: str, kind: Kind, reason: str) -> None:
    assert reason in sizes_of(odd_config(family)).even_problem(kind)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bitnet", "attn_sub_norm.weight"),
        ("olmo2", "q_norm.weight"),
        ("stablelm", "q_layernorm.norms.0.weight"),
        ("granite_swa", "self_attn.sinks"),
    ],
)
def test_heads_of_single_blocks_stay_where_another_tensor_counts_them(family: str, reason: str) -> None:
    sizes = sizes_of(odd_config(family))
    assert reason in sizes.configs.uneven_problem("heads") and "heads" not in sizes.movable_kinds


def test_blocks_stay_where_what_they_compute_depends_on_their_place() -> None:
    assert "lambda_init would change" in sizes_of(odd_config("diffllama")).drop_problem
    assert "more than add its attention" in sizes_of(odd_config("bert")).drop_problem
    sizes = sizes_of(odd_config("gpt_neo"))
    assert sizes.drop_problem == ""
    assert sizes.config_for(sizes.shape(sizes.neurons, sizes.heads, (0,)))["attention_types"] == [
        [["local"], 1],
        [["global"], 1],
        [["local"], 1],
    ]


def test_a_config_that_counts_no_heads_and_blocks_of_other_matrices_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="structured pruning needs blocks of one attention"):
        sizes_of(odd_config("xlstm"))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"attention_bias", "mlp_bias"}),
        ("ernie4_5", {"use_bias"}),
        ("seed_oss", {"attention_out_bias", "mlp_bias"}),
        ("opt", set()),
    ],
)
def test_biases_go_where_the_config_can_hold_them(family: str, fields: set[str]) -> None:
    config = families()[family].config if family in families() else odd_config(family, attention_bias=True)
    found, _, problem = sizes_of(config).configs.biases
    assert set(found) == fields and problem == ""


def test_a_config_without_place_for_biases_says_which_matrix_lacks_it() -> None:
    fields, _, problem = sizes_of(families()["qwen2"].config).configs.biases
    assert fields == {} and problem == "no field of a config of type qwen2 gives mlp.down_proj a bias"


def test_a_block_of_seventy_billion_is_tried_in_little_time_and_memory() -> None:
    """Products of trial blocks never make the matrices, which would take 3.4 GB here."""
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    sizes = sizes_of(transformers.LlamaConfig(**{**COMMON, **large}))
    before = psutil.Process().memory_info().rss
    assert sizes.legal_heads() == [8, 7, 6, 5, 4, 3, 2, 1] and sizes.drop_problem == ""
    assert sizes.movable_kinds == ("neurons", "heads")
    assert psutil.Process().memory_info().rss - before < 3e8


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_products_with_random_matrices_are_those_of_the_matrices(shape: tuple[int, int]) -> None:
    weight = block_trial._random("name", torch.Size(shape))
    x, bias = torch.randn(2, 3, shape[1]), torch.randn(shape[0])
    wanted = torch.nn.functional.linear(x, weight.clone(), bias)
    masked = torch.nn.functional.linear(torch.cat([x[..., :4] * 0, x[..., 4:]], -1), weight.clone())
    with block_trial._HankelProducts({}):
        torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), wanted)
        torch.testing.assert_close(torch.addmm(bias, x[0], weight.T), wanted[0])
    with block_trial._HankelProducts({weight.data_ptr(): (True, 4)}):
        torch.testing.assert_close(x @ weight.T, masked)
    with block_trial._HankelProducts({weight.data_ptr(): (False, 4)}):
        assert not (x @ weight.T)[..., :4].any()
