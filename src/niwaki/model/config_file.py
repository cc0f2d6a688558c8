"""config.json of a model folder: what it says, and what is refused before a model is built from it.

A config is a few bytes that decide how much is built. So its counts are compared with the tensors of the file first.
A model with 10⁹ layers is refused before transformers makes a list of them.

    config = read_config(folder, read_json(folder / CONFIG), tensors)
"""

import re
import reprlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from niwaki.errors import CheckpointError, faults_of
from niwaki.model.shards import TensorInfo, check_link, numbered, read_headers, read_json

CONFIG = "config.json"
QUANT_METHOD = "niwaki"
WEIGHTS_FIELD = "transformers_weights"
# Fields that say how many modules a model has. Towers may have more layers than the file, so there is a margin.
_LAYERS = re.compile(
    r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|(en|de)coder_layers|depth|num_nextn\w*_layers)"
)
_NEEDED = re.compile(r"num_(hidden_)?layers|n_layers?")
_COUNTS = re.compile(r"(num|n)_\w+|\w*(layers|experts|heads|blocks|labels|groups)")
_SIZES = re.compile(r"\w+_size|\w*(dim|embd|channels)")
_UNBOUNDED = re.compile(r"\w*(position|ctx|token|embeddings|param|step|train|seq|window|chunk)\w*")
_LAYER_MARGIN = 4, 256  # times the length of the longest list of the file, and on top of that
_MAX_SIZE = 10**8  # without a tensor of that size

GENERATION = "generation_config.json"
_MAX_WHOLE = 2**31 - 1
_MAX_COPIES = 1024  # beams or answers of one prompt, which take memory each
# Fields of generation_config.json that decide what is computed: least and most of a number. Null is always fine.
_WHOLE = {  # -1 is off
    **dict.fromkeys(("top_k", "max_length", "min_length", "min_new_tokens", "no_repeat_ngram_size",
                     "encoder_no_repeat_ngram_size", "num_assistant_tokens"), (-1, _MAX_WHOLE)),
    "max_new_tokens": (1, _MAX_WHOLE),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1, _MAX_COPIES)),
}  # fmt: skip
_NUMBERS = {
    **dict.fromkeys(("top_p", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff"), (0.0, 1.0)),
    **dict.fromkeys(("temperature", "repetition_penalty", "encoder_repetition_penalty", "guidance_scale",
                     "diversity_penalty", "max_time"), (0.0, 1e9)),
    "length_penalty": (-1e9, 1e9),
}  # fmt: skip
_FLAGS = ("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits", "output_scores", "output_logits",
          "output_attentions", "output_hidden_states", "return_dict_in_generate", "low_memory")  # fmt: skip
_TOKEN = re.compile(r"\w*_token_id|(begin_)?suppress_tokens")
# What would run other code or another model beside this one, or needs a tokenizer: niwaki generates without it.
_FOREIGN = ("custom_generate", "assistant_model", "constraints", "force_words_ids", "sequence_bias", "stop_strings",
            "dola_layers", "penalty_alpha", "prompt_lookup_num_tokens", "exponential_decay_length_penalty",
            "forced_decoder_ids")  # fmt: skip


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return the content of config.json, and the headers of a model folder, after every check that needs no torch.

    Raises CheckpointError for links out of the folder, for files that disagree, and for a config that cannot belong to
    its tensors.
    """
    check_link(folder, folder / CONFIG)
    check_link(folder, folder / GENERATION)
    content = read_json(folder / CONFIG)
    packed = stored_quantization(folder, content)
    headers = read_headers(folder, None if packed else content.get(WEIGHTS_FIELD))
    _check_counts(folder / CONFIG, content, headers)
    check_generation(folder)
    return content, headers


def stored_quantization(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of niwaki in the content of config.json, {} for a plain model."""
    stored = content.get("quantization_config")
    if stored is None:
        return {}
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is already quantized: start from the bf16, fp16 or fp32 checkpoint")
    return stored


def read_config(folder: Path, content: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Any:
    """Return the transformers config of a folder. Raises CheckpointError for one that does not fit its tensors."""
    from transformers import AutoConfig

    _check_counts(folder / CONFIG, content, tensors)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises validation errors of several libraries here
        raise CheckpointError(f"{folder / CONFIG} cannot be used ({_reason(error)})") from error
    return config


def config_faults(folder: Path) -> AbstractContextManager[None]:
    """Turn what transformers and torch raise for a config that describes no model into a CheckpointError."""
    step = "download the model again, or use the transformers version that it names"
    return faults_of(f"{folder / CONFIG} describes no model that can be read", step)


def check_generation(folder: Path) -> None:
    """Raise CheckpointError for a field of generation_config.json with a value that no generation can use."""
    path = folder / GENERATION
    if not path.is_file():
        return
    for name, value in read_json(path).items():
        if expected := None if value is None else _expected(name, value):
            raise CheckpointError(f"{path}: {name} is {reprlib.repr(value)}: expected {expected}; download it again")


def _expected(name: str, value: Any) -> str | None:
    """Return what a field of generation_config.json must be, None if it is."""
    if name in _FOREIGN:
        return "null, for niwaki generates without it"
    if name in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if name in _WHOLE:
        least, most = _WHOLE[name]
        fits = type(value) is int and least <= value <= most
        return None if fits else f"a whole number from {least:,} to {most:,}"
    if name in _NUMBERS:
        low, high = _NUMBERS[name]
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"a number from {low:g} to {high:g}"
    if _TOKEN.fullmatch(name):
        tokens = value if isinstance(value, list) else [value]
        fits = all(type(token) is int and -1 <= token <= _MAX_WHOLE for token in tokens)
        return None if fits else "a token id, or a list of them"
    return None


def _check_counts(path: Path, content: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError for a count in config.json, at any depth, that the tensors of the file rule out."""
    longest = numbered(list(tensors))
    largest = max((size for info in tensors.values() for size in info.shape), default=0)
    times, more = _LAYER_MARGIN
    bounds = (
        (_LAYERS, times * longest + more, f"the longest list of layers in the file has {longest:,}"),
        (_COUNTS, times * max(largest, len(tensors)) + more, f"no tensor of the file is longer than {largest:,}"),
        (_SIZES, max(_MAX_SIZE, largest), f"no tensor of the file is longer than {largest:,}"),
    )
    # What niwaki stores of packed matrices is checked by its own descriptors.
    pending: list[Any] = [{name: part for name, part in content.items() if name != "quantization_config"}]
    while pending:
        part = pending.pop()
        pending.extend(part if isinstance(part, list) else part.values() if isinstance(part, Mapping) else ())
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if _NEEDED.fullmatch(name) and isinstance(value, int | float) and value < 1 <= longest:
                raise CheckpointError(f"{path}: {name} is {value:,}, and the file holds layers: download it again")
            if isinstance(value, int | float) and not _UNBOUNDED.fullmatch(name):
                for pattern, bound, why in bounds:
                    if pattern.fullmatch(name) and value > bound:
                        raise CheckpointError(
                            f"{path}: {name} is {value:,}, and {why}: config and weights belong to different models"
                        )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
