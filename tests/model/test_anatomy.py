"""What discovery refuses, and that it touches nothing."""

import pytest
import torch
import transformers

from niwaki.errors import ArchitectureError
from niwaki.model.anatomy import discover
from niwaki.model.device import peak_rss_bytes
from niwaki.model.hf import build_skeleton
from support.families import COMMON, families


def test_state_space_blocks_keep_all_but_their_matrices() -> None:
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=6
    )
    block = discover(build_skeleton(config, torch.float32)).blocks[0]
    assert list(block.linears) == ["mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"]
    assert block.kept_dense == {"mixer.conv1d.weight": "convolution", "mixer.A_log": "used element by element"}


def test_encoder_decoder_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="no causal language model for model_type 't5'"):
        build_skeleton(transformers.T5Config(), torch.float32)


def test_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="Linear has no list of blocks"):
        discover(torch.nn.Linear(2, 2))


def test_blocks_of_different_structure_are_told_apart() -> None:
    anatomy = discover(build_skeleton(families()["qwen3_moe"].config, torch.float32))
    assert "mlp.experts.0.gate_up_proj" in anatomy.blocks[0].linears
    assert "mlp.gate_proj" in anatomy.blocks[2].linears  # mlp_only_layers=[2]
    assert anatomy.blocks[0] is anatomy.blocks[1]


def test_conv1d_is_seen_as_transposed() -> None:
    anatomy = discover(build_skeleton(families()["gpt2"].config, torch.float32))
    attention = anatomy.blocks[0].linears["attn.c_attn"]
    assert attention.transposed
    assert (attention.rows, attention.columns) == (96, 32)


def test_experts_are_matrices_of_their_own() -> None:
    anatomy = discover(build_skeleton(families()["mixtral"].config, torch.float32))
    linears = anatomy.blocks[0].linears
    assert (linears["mlp.experts.3.gate_up_proj"].rows, linears["mlp.experts.3.gate_up_proj"].columns) == (96, 32)
    assert linears["mlp.experts.3.down_proj"].group == "mlp.experts.3.down_proj"


def test_discovery_leaves_the_skeleton_on_meta() -> None:
    skeleton = build_skeleton(transformers.LlamaConfig(**{**COMMON, "intermediate_size": 48}), torch.float32)
    discover(skeleton)
    assert all(p.is_meta for p in skeleton.parameters())
    assert all("forward" not in vars(block) for block in skeleton.model.layers)


def test_large_models_cost_no_memory_to_discover() -> None:
    """A 70B shape: its blocks are probed in memory that is never written."""
    before = peak_rss_bytes()
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    anatomy = discover(build_skeleton(config, torch.bfloat16))
    assert anatomy.weights == 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert peak_rss_bytes() - before < 2e8  # one block alone would be 1.7 GB in bf16
