"""A GGUF file as a model: dequantized once by the reader of transformers into a folder of safetensors.

The folder lies in the cache of the user (NIWAKI_CACHE, or XDG_CACHE_HOME/niwaki, or ~/.cache/niwaki). Its name follows
from path, size and time of the file. It is complete or absent, and it stays until somebody deletes it. Float32 and
bfloat16 files keep their dtype, and all others become float16. The file `SOURCE` in the folder says where it comes
from, and results record it.

transformers drops tensors and settings of the file that it has no place for. A model that would compute something else
for this reason is refused.
"""

import fcntl
import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from niwaki.errors import CheckpointError, OutputError, faults_of
from niwaki.model.files import CACHE, cache_folder
from niwaki.model.hf import only_errors, plain_loading
from niwaki.model.read_log import ReadLog

SOURCE = "gguf-source"  # no suffix: files that a result copies have one
MAGIC = b"GGUF"
LOCK = "lock"
BIAS = "attention_bias"
# Names of word splitters in GGUF: plain GPT-2 words, and the same after every digit stands alone.
PLAIN_WORDS = ("default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "gigachat")
DIGITS_ALONE = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
# Settings that change what a model computes; others name or describe it.
_COMPUTES = re.compile(r"rope\.scaling|scale$|softcap|sliding_window|experts?_|alibi")


def gguf_folder(file: Path) -> Path:
    """Return the folder of safetensors of a GGUF file, and write it first if there is none.

    Raises CheckpointError with one line for a file that does not hold a whole language model.
    """
    file = file.resolve()
    state = _state(file)
    folder = cache_folder("gguf") / f"{file.stem}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    if not (folder / SOURCE).is_file():
        reader = _open(file)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _converting(folder.parent) as made:
                _convert(file, reader, made / "model")
                if _state(file) != state:
                    raise CheckpointError(f"{file} changed while it was read: let its download or copy finish")
                try:
                    (made / "model").rename(folder)
                except OSError:
                    if not (folder / SOURCE).is_file():  # else another process was faster
                        raise
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"cannot write {folder}: {reason}. Free space, or set {CACHE} to another folder"
            ) from error
    return folder


def gguf_source(folder: Path) -> dict[str, Any] | None:
    """Return what is known of the GGUF file that a folder was made of, None for another folder."""
    path = folder / SOURCE
    if not path.is_file():
        return None
    with faults_of(f"{path} is not a record of niwaki", "remove it"):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**found, **{name: str(found[name]) for name in ("file", "note", "dtype")}}


def _state(file: Path) -> str:
    """Return what changes if a file does. No program can set its change time (`st_ctime_ns`)."""
    status = file.stat()
    return f"{file}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


@contextmanager
def _converting(cache: Path) -> Iterator[Path]:
    """Yield a new folder that is removed in the end, after those of killed processes, whose locks are free."""
    for left in cache.glob(".converting-*"):
        with suppress(OSError), (left / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=cache) as made, (Path(made) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(made)


def _open(file: Path) -> Any:
    """Return a reader of a whole language model. Raises CheckpointError for anything else."""
    with file.open("rb") as opened:
        if opened.read(4) != MAGIC:
            raise CheckpointError(f"{file} is not a GGUF file: it does not begin with {MAGIC.decode()}")
    if find_spec("gguf") is None:
        raise CheckpointError(f"{file}: reading GGUF needs the package gguf: pip install 'niwaki[export]'")
    if part := _PART.search(file.stem):
        raise _split(file, part.group(1), part.group(2))
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        _check_kind(file, reader)
        end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    except CheckpointError:
        raise
    except Exception as error:  # the reader maps the file and fails wherever its bytes end
        raise CheckpointError(
            f"{file} is not a whole GGUF file ({type(error).__name__}: {' '.join(str(error).split())[:120]}): "
            "copy or download it again"
        ) from error
    if end > (size := file.stat().st_size):
        raise CheckpointError(f"{file} ends at byte {size:,} of {end:,}: copy or download it again")
    return reader


def _split(file: Path, part: str, parts: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is part {int(part)} of {int(parts)} of a model: join them first (llama-gguf-split --merge FIRST OUT)"
    )


def _check_kind(file: Path, reader: Any) -> None:
    """Raise CheckpointError for a file that holds something else than the weights of a whole model."""
    kind, architecture = _field(reader, "general.type"), _field(reader, "general.architecture")
    if int(_field(reader, "split.count") or 0) > 1:
        raise _split(file, str(int(_field(reader, "split.no") or 0) + 1), str(_field(reader, "split.count")))
    if kind == "adapter" or any(name.startswith("adapter.") for name in reader.fields):
        raise CheckpointError(f"{file} is an adapter: merge it into its base model, and give the result")
    if kind == "mmproj" or architecture == "clip":
        raise CheckpointError(f"{file} is the projector of images or sound of a model: give the file of the text model")
    if architecture is None:
        raise CheckpointError(f"{file} does not name an architecture (general.architecture)")
    if not reader.tensors:
        raise CheckpointError(f"{file} holds a vocabulary and no weights: give the file of the model")


def _field(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def _convert(file: Path, reader: Any, out: Path) -> None:
    """Dequantize a file to `out`. Raises CheckpointError if transformers cannot read all that counts."""
    log = ReadLog.of([file], [])
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    matrices = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    dtype = _DTYPES.get(next(iter(matrices)), torch.float16) if len(matrices) == 1 else torch.float16
    model, tokenizer = _read(file, reader, dtype)
    _check_settings(file, reader, model.config)
    unread = sorted({tensor.name for tensor in reader.tensors} - set(_read_names(model)))
    if unread:
        raise CheckpointError(
            f"{file}: transformers has no place for its tensor {unread[0]} in a {model.config.model_type} and would "
            "compute something else: start from the safetensors of this model"
        )
    _complete_tokenizer(file, reader, tokenizer)
    with plain_loading():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    known = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "sha256": log.files[file][1],
        "architecture": _field(reader, "general.architecture"),
        "types": dict(sorted(types.items())),
        "dtype": str(dtype).removeprefix("torch."),
        "note": f"dequantized from {', '.join(name for name, _ in matrices.most_common())}",
    }
    log.check()
    (out / SOURCE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def _known_splitters() -> Collection[str]:
    """Return the names of word splitters that transformers makes itself; versions before 5.23 have two."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return ("llama-bpe", "qwen2")
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _complete_config(reader: Any, config: Any) -> None:
    """Set what transformers leaves out of the config: width of heads, biases of a Llama, linearly scaled positions."""
    prefix = f"{_field(reader, 'general.architecture')}."
    width, scaled = _field(reader, f"{prefix}attention.key_length"), _field(reader, f"{prefix}rope.scaling.type")
    names = {tensor.name for tensor in reader.tensors}
    if width and hasattr(config, "head_dim"):
        config.head_dim = int(width)
    for field, tensor in ("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias"):
        if tensor in names and getattr(config, field, None) is False:
            setattr(config, field, True)
    if scaled == "linear" and isinstance(getattr(config, "rope_parameters", None), dict):
        factor = float(_field(reader, f"{prefix}rope.scaling.factor") or 1)
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}


def _read(file: Path, reader: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the model of a file as a plain one, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    given: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    models: Any = AutoModelForCausalLM
    try:
        with only_errors("transformers"), plain_loading():
            config = AutoConfig.from_pretrained(file.parent, **given)
            _complete_config(reader, config)
            # The class of a family would replace the word splitter of the file by its own.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, **given)
            given |= {"config": config, "dtype": dtype, "output_loading_info": True}
            read, info = models.from_pretrained(file.parent, **given)
    except Exception as error:  # transformers and gguf raise errors of many kinds here
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: transformers cannot read this GGUF ({reason}): start from the safetensors of this model"
        ) from error
    # The file of a model with some biases has no zeros for the others, and transformers makes all or none.
    zeros = {name for name in info["missing_keys"] if name.endswith(".bias")} if getattr(config, BIAS, False) else set()
    lost = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])} - zeros)
    if lost:
        raise CheckpointError(
            f"{file}: transformers finds no value for {lost[0]} in it and would draw a random one: start from the "
            "safetensors of this model"
        )
    config = read.config
    del config.quantization_config  # names the reader; a plain model has none
    config._name_or_path = ""
    vars(config).pop("_model_name_or_path", None)
    model = type(read)(config).to(dtype)
    state = read.state_dict()
    model.load_state_dict(state | {name: torch.zeros_like(state[name]) for name in zeros})
    return model.eval(), tokenizer


def _complete_tokenizer(file: Path, reader: Any, tokenizer: Any) -> None:
    """Give a tokenizer what transformers leaves out of the file: word splitter, chat template, beginning of texts.

    Raises CheckpointError for a word splitter that neither transformers nor niwaki knows by its name.
    """
    from tokenizers import pre_tokenizers

    splitter = _field(reader, "tokenizer.ggml.pre")
    if _field(reader, "tokenizer.ggml.model") == "gpt2" and splitter is not None:
        if splitter in DIGITS_ALONE:
            digits = pre_tokenizers.Digits(individual_digits=True)
            words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        elif splitter not in {*PLAIN_WORDS, *_known_splitters()}:
            raise CheckpointError(
                f"{file}: its tokenizer cuts words by the rule {splitter!r}, which transformers does not know: start "
                "from the safetensors of this model"
            )
    template, begins = _field(reader, "tokenizer.chat_template"), _field(reader, "tokenizer.ggml.add_bos_token")
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template
    bos = tokenizer.bos_token_id
    if begins is not None and bos is not None and (tokenizer("a")["input_ids"][:1] == [bos]) != bool(begins):
        tokenizer.add_bos_token = bool(begins)


def _read_names(model: Any) -> Mapping[str, str]:
    """Return the GGUF names that transformers reads for a model."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    kind = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)
    found: dict[str, str] = get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    return found


def _check_settings(file: Path, reader: Any, config: Any) -> None:
    """Raise CheckpointError for a setting that changes what the model computes and that transformers drops."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    prefix = f"{_field(reader, 'general.architecture')}."
    known: Any = GGUF_CONFIG_MAPPING
    mapped = {**known.get(config.model_type, {}), **known.get(prefix.rstrip("."), {})}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    unscaled = _field(reader, f"{prefix}rope.scaling.type") in (None, "none", "linear")
    for name in reader.fields:
        key = name.removeprefix(prefix)
        if key == name or mapped.get(key) is not None or (unscaled and key.startswith("rope.scaling")):
            continue
        value = _field(reader, name)
        widths = key in ("rope.dimension_count", "attention.key_length", "attention.value_length")
        if (widths and value != head_dim) or _COMPUTES.search(key):
            raise CheckpointError(
                f"{file}: transformers ignores its setting {name} = {value} and would compute something else: start "
                "from the safetensors of this model"
            )
