"""Table of all causal model types of transformers: which work, which do without shape pruning, which are refused.

    python -m benchmarks.quality.model_types MODEL DATA --out benchmarks/results/quality/model-types.json

Every type is built from a tiny config: its own defaults with the sizes below, for all fields that it has.
`classify` finds the blocks on the meta device, as `niwaki plan` does, so that one type takes a fraction of a second.
The script also proves what works. It saves random weights with the tokenizer of MODEL and walks the dense blocks, which
must end at the logits of transformers. Then it prunes with wanda on DATA/calibration.jsonl. The result must load in
niwaki and in transformers with the same logits. What fails is refused with the reason that a user reads.
"""

import argparse
import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import niwaki
from benchmarks.common.provenance import provenance
from niwaki.compression.walk import forward
from niwaki.data.stream import Stream
from niwaki.errors import InputError, NiwakiError
from niwaki.model.anatomy import discover
from niwaki.model.decoder import open_decoder
from niwaki.model.hf import build_skeleton
from niwaki.model.prunable import ShapeSpace

WORKS, NO_SHAPE, REFUSED = "works", "works without shape pruning", "refused"
CPU = torch.device("cpu")

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    "emb_dim": 32, "adapter_in_dim": 32, "adapter_input_size": 32, "adapter_out_dim": 32,
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "encoder_layers"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "d_ff", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "intermediate_size_mlp", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    "vocab_size": 96, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "sliding_window": 8,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "num_expert_group"), 1),
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # state space and linear attention
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "chunk_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_headdim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    "linear_head_dim": 8, "linear_num_heads": 8,
    "mamba_expand": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    # Gemma 3n and 4
    "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
    "global_head_dim": 16,
}  # fmt: skip
ALL_SHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
MAX_WEIGHTS = 100_000_000  # of a model that is tried
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MIXED = ["linear_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {  # more that a few types need
    "bamba": {"attn_layer_indices": [1, 3], "attn_rotary_emb": 4},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dots3_note": {"vision_config": {"num_hidden_layers": 42}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
                                         "num_kv_shared_layers": 30}},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"head_dim": 8, "num_heads": 8},
    "moshi": {"audio_vocab_size": 96},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "use_mem_eff_path": False},
    "bailing_hybrid": {"layer_types": MIXED},
    "kimi_linear": {"layer_types": MIXED},
    "minimax": {"layer_types": MIXED},
    "olmo_hybrid": {"layer_types": MIXED},
    "qwen3_5_moe_text": {"layer_types": MIXED},
    "qwen3_5_text": {"layer_types": MIXED},
    "qwen3_next": {"layer_types": MIXED},
    "qwen4_exp_text": {"layer_types": MIXED, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 8, "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 32,
                       "ngram_vocab_size_base": 97, "make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 4,
                       "heads_per_ngram": 2, "hc_lowrank": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """Return a tiny config of a model type."""
    return CONFIG_MAPPING[model_type](**_values(CONFIG_MAPPING[model_type]))


def _values(kind: Any) -> dict[str, Any]:
    """Return the arguments of a config class that make it tiny, with those of the configs inside it."""
    own = OWN.get(kind.model_type, {})
    default = kind(**own if kind.model_type == "gemma4_assistant" else {})  # its defaults contradict each other
    fields = default.to_dict()
    found: dict[str, Any] = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = 4
    if (fields.get("pad_token_id") or 0) >= SIZES["vocab_size"]:
        found["pad_token_id"] = 1
    for name in kind.sub_configs:
        part = type(getattr(default, name, None))
        if issubclass(part, transformers.PreTrainedConfig):
            found[name] = {"model_type": part.model_type, **_values(part)}
    if kind.model_type.endswith("_assistant"):
        own = {"text_config": {"num_kv_shared_layers": SIZES["num_hidden_layers"], **ALL_SHARED}}
    for name, value in own.items():
        found[name] = found[name] | value if isinstance(value, dict) and name in found else value
    return found


@dataclass(frozen=True)
class Found:
    """Class of a model type: the reason for less than all of it, and the weights of its blocks that stay dense."""

    status: str
    reason: str = ""
    kept_dense: Mapping[str, str] = field(default_factory=dict)


def classify(model_type: str) -> Found:
    """Return the class of a model type, from the shapes of a tiny model alone."""
    config = tiny_config(model_type)
    try:
        skeleton = build_skeleton(config, torch.float32)
        anatomy = discover(skeleton)
    except InputError as error:
        return Found(REFUSED, str(error))
    kept = {name: reason for block in anatomy.blocks for name, reason in block.kept_dense.items()}
    try:
        space = ShapeSpace(anatomy, skeleton, config.to_dict())
        able = bool(space.movable_kinds) or not space.drop_problem
        return Found(WORKS, "", kept) if able else Found(NO_SHAPE, space.drop_problem, kept)
    except InputError as error:
        return Found(NO_SHAPE, str(error), kept)


def prove(model_type: str, tokenizer: Path, text: Path, work: Path) -> str:
    """Compress random weights of a model type as a user would. Return why that cannot be done, empty if it can."""
    config = _with_vocabulary(tiny_config(model_type), 4096)
    torch.manual_seed(0)
    skeleton = build_skeleton(config, torch.float32)
    assert sum(p.numel() for p in skeleton.parameters()) < MAX_WEIGHTS, f"{model_type} is not tiny: add sizes to OWN"
    model: Any = niwaki.model.hf.auto_class(config).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    folder, out = work / "model", work / "out"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    ids_BT = torch.randint(2, 4096, (2, 16), generator=generator)
    try:
        if problem := _differs("the dense blocks end", _walked(folder, ids_BT), _logits(folder, ids_BT)):
            return problem
        calibration = {"files": (str(text),), "samples": 4, "seq_len": 24}
        niwaki.compress(folder, out, method="wanda", target=0.5, calibration=calibration, device="cpu")
        with torch.no_grad():
            loaded = niwaki.load(out, device="cpu")(input_ids=ids_BT, use_cache=False).logits
        return _differs("the loaded result ends", loaded, _logits(out, ids_BT))
    except NiwakiError as error:
        return str(error).replace(f"{work}/", "")
    except Exception as error:  # a crash is a fault of niwaki: the table must not hold any
        return f"CRASH: {type(error).__name__}: {error}"


def _with_vocabulary(config: Any, size: int) -> Any:
    """Return a config for `size` tokens, with those of the configs inside it."""
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in ("vocab_size", "vocab_size_per_layer_input", "n_words"):
            if hasattr(part, name):
                setattr(part, name, size)
    return config


def _walked(folder: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits after a walk over the dense blocks."""
    decoder = open_decoder(folder, CPU)
    stream = Stream(decoder, ids_BT)
    forward(decoder, [stream])
    return decoder.logits(ids_BT, stream.hidden.read(slice(0, len(ids_BT))))


def _logits(folder: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = niwaki.model.hf.auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _differs(what: str, found: torch.Tensor, wanted: torch.Tensor) -> str:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return "" if error < 1e-5 else f"{what} at other logits than transformers (by {error:.0e} of the largest)"


def main() -> None:
    """Find the class of every type, prove it, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a model folder with a tokenizer of at most 4096 tokens")
    parser.add_argument("data", type=Path, help="a folder with calibration.jsonl")
    parser.add_argument("--types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: dict[str, Any] = {}
    for model_type in options.types:
        row = classified = classify(model_type)
        if classified.status != REFUSED:
            with tempfile.TemporaryDirectory() as work:
                problem = prove(model_type, options.model, options.data / "calibration.jsonl", Path(work))
            row = replace(classified, status=REFUSED, reason=problem) if problem else classified
        rows[model_type] = asdict(row) | {"found": classified.status}
        print(f"{model_type}: {row.status} {row.reason}", flush=True)
    if options.out is not None and options.out.is_file():  # some types are made again
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] | rows
    result = {"what": "all causal model types", **provenance("cpu"), "rows": dict(sorted(rows.items()))}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
