"""Tiny models whose blocks make structured pruning hard: other field names, inner norms, tables per head."""

from typing import Any

import transformers

from support.families import COMMON

_PLAIN = {k: v for k, v in COMMON.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
_LLAMA: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48}


def odd_config(family: str, **changes: Any) -> Any:
    """Return the config of a family by name, with changes."""
    configs = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    values: dict[str, Any] = {**_LLAMA, **_OWN.get(family, {})}
    if family in _RENAMED:
        values = {**_PLAIN, **_RENAMED[family]}
    return configs[family](**{**values, **changes})


_OWN: dict[str, dict[str, Any]] = {
    "stablelm": {"qk_layernorm": True},
    "diffllama": {"num_key_value_heads": 4},
    "granite_swa": {"head_dim": 8},
    "bert": {"is_decoder": True, "num_key_value_heads": None},
}
_RENAMED: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 6,
        "attention_types": [[["global", "local"], 2]],  # neurons of the default, four times the width
    },
    "xglm": {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48},
    "ctrl": {"n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48, "n_positions": 64},
    "xlstm": {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "chunk_size": 16},
}  # fmt: skip
