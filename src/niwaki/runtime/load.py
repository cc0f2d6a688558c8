"""Loading of results, and text generation with them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from niwaki.data.bos import find_bos
from niwaki.data.texts import load_tokenizer
from niwaki.errors import CheckpointError, InputError, faults_of
from niwaki.formats.quantized import WEIGHT
from niwaki.formats.sparse import VALUES
from niwaki.kernels.scans import scans_for
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.complete import names_of
from niwaki.model.config_file import GENERATION, config_faults
from niwaki.model.device import pick_device
from niwaki.model.hf import WeightNames, auto_class, plain_loading
from niwaki.model.own_reader import own_reader
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.decoding import generate_verified
from niwaki.runtime.contextual.predictor_files import ABOUT, TENSORS, has_shadow, read_shadow
from niwaki.runtime.sparse_linear import SparseLinear


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dense: bool = False,
    dtype: torch.dtype | None = None,
    fast_prompts: bool = False,
) -> Any:
    """Return the whole model as a transformers `PreTrainedModel` in eval mode, in `dtype` or that of the checkpoint.

    If a predictor is beside the weights (method shadow), the model skips what its inputs do not need, unless `dense`.
    `model.contextual` then holds the records.

    `fast_prompts` (2:4 weights stored packed, on a GPU): long prompts run on sparse tensor cores. They read another
    layout of those weights, made at the first long prompt, which takes 9 more bits per weight in memory.
    """
    return load_checkpoint(
        Checkpoint.open(model), device=device, dense=dense, dtype=dtype, fast_prompts=fast_prompts
    )  # fmt: skip


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    dense: bool = False,
    dtype: torch.dtype | None = None,
    fast_prompts: bool = False,
    hashed: bool = False,
) -> Any:
    """Return the model of an open checkpoint as `load` does.

    With `hashed`, the log of the checkpoint records the weights, so that a later change can be told from a touch.
    Raises CheckpointError for weights that are missing, not finite, or in a dtype that `Decoder` refuses as well. So it
    does if a file changed since the checkpoint was opened.
    """
    names = names_of(checkpoint)  # transformers would make up what is missing
    with plain_loading(), config_faults(checkpoint.folder), own_reader(checkpoint.log, hashed=hashed):
        decoder: Any
        decoder, found = auto_class(checkpoint.config).from_pretrained(
            checkpoint.folder, dtype=dtype or checkpoint.dtype, trust_remote_code=False, output_loading_info=True
        )
    checkpoint.log.check()
    _check_loaded(checkpoint, found)
    decoder = decoder.to(pick_device(device)).eval()
    _check_finite(checkpoint, decoder, names)
    for module in decoder.modules():
        if isinstance(module, SparseLinear):
            module.fast_prompts = fast_prompts
    if has_shadow(checkpoint.folder):
        checkpoint.log.add(checkpoint.folder / name for name in (ABOUT, TENSORS))
    if has_shadow(checkpoint.folder) and not dense:
        with faults_of(f"{checkpoint.folder / ABOUT} does not fit the model", "compress again"):
            decoder.contextual = attach(decoder, read_shadow(checkpoint.folder))
    return decoder


def _check_loaded(checkpoint: Checkpoint, found: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a weight that transformers did not find, or found in another shape."""
    wrong = [*found.get("missing_keys", ()), *(str(key) for key in found.get("mismatched_keys", ()))]
    wrong += found.get("conversion_errors", ()) or ()
    if wrong:
        raise CheckpointError(
            f"{checkpoint.folder}: transformers found no weights for {sorted(map(str, wrong))[0]}: the checkpoint is "
            "incomplete, or belongs to another architecture; download the model again"
        )


@torch.no_grad()
def _check_finite(checkpoint: Checkpoint, decoder: Any, names: WeightNames) -> None:
    """Raise CheckpointError for a loaded tensor that is not finite, with its name on disk, as `Checkpoint.read`."""
    disk = {parameter: name for name, parameter in names.parameters.items()}
    for place, tensor in decoder.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or tensor.dtype.itemsize < 2:
            continue
        if not _finite(tensor):
            module, _, last = place.rpartition(".")
            name = disk.get(place) or f"{disk.get(module + WEIGHT, module + WEIGHT).removesuffix(WEIGHT)}.{last}"
            shard = checkpoint.tensors[name].shard if name in checkpoint.tensors else ""
            raise CheckpointError(
                f"{checkpoint.folder / shard}: {name} holds NaN or infinite values in {tensor.dtype}: repair or "
                "download the checkpoint again"
            )


def _finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are finite, on the CPU by the pass of the compiled kernels."""
    kind = next((name for name, dtype in VALUES.items() if dtype == tensor.dtype), None)
    if kind is None or not tensor.is_contiguous():
        return bool(torch.stack(tensor.aminmax()).isfinite().all())
    return scans_for({"": tensor}).values_finite(tensor.view(-1).view(torch.uint8), tensor.numel(), kind)


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    verify: int = 0,
    device: str = "auto",
) -> str:
    """Return `prompt` and its continuation. Raises InputError for a prompt that leaves no room to continue.

    `verify` (contextual models): after this many tokens the full model checks and corrects what the part wrote. So the
    greedy text is that of the full model.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if verify and (temperature or verify < 0):
        raise InputError(f"verify must be 0 or more tokens, and needs greedy text (temperature 0), got {verify}")
    checkpoint = Checkpoint.open(model)
    if verify and not has_shadow(checkpoint.folder):
        raise InputError(f"{model} holds no predictor, so nothing needs checking: leave out verify")
    decoder = load_checkpoint(checkpoint, device=device)
    tokenizer = load_tokenizer(checkpoint.folder)
    ids = find_bos(tokenizer).encode(tokenizer, prompt)
    if not ids:
        raise InputError("the prompt is empty: give some text to continue")
    positions = getattr(decoder.config.get_text_config(), "max_position_embeddings", None)
    length = len(ids) + max_new_tokens
    if positions is not None and length > positions:
        raise InputError(f"prompt and max_new_tokens take {length} tokens, the model has {positions} positions")
    prompt_1T = torch.tensor([ids], device=decoder.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    if verify:
        end = decoder.generation_config.eos_token_id
        text = generate_verified(
            decoder.contextual, prompt_1T, max_new_tokens=max_new_tokens, every=verify,
            stop_tokens=end if isinstance(end, list) else [end],
        )  # fmt: skip
        return str(tokenizer.decode(text.ids_1T[0], skip_special_tokens=True))
    odd = f"{checkpoint.folder}: the model cannot continue the prompt as {GENERATION} says"
    with torch.no_grad(), faults_of(odd, "correct that file, or download it again"):
        ids_BT = decoder.generate(
            prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id, **sampling,
        )  # fmt: skip
    return str(tokenizer.decode(ids_BT[0], skip_special_tokens=True))
