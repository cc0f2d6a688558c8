"""Models in memory: random weights, copies that share tensors, byte counts.

A copy costs only its modules: it holds the tensors of the original until a variant replaces them.

Cost: random weights take one pass. Counting reads no weight.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.hf import materialize_buffers, on_meta
from niwaki.runtime.stored import StoredMatrix

RANDOM_STD = 0.02


def config_only_folder(model: str | Path) -> Path | None:
    """Return the folder `model` if it holds a config.json and no weights, else None."""
    folder = Path(model).expanduser()
    kinds = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".onnx"}
    if not (folder / "config.json").is_file() or any(path.suffix in kinds for path in folder.iterdir()):
        return None
    return None if list(folder.glob("*.index.json")) else folder


def read_config(folder: Path) -> Any:
    """Read a config.json without weights. Raises CheckpointError if transformers cannot use it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises validation errors of several libraries here
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{folder}/config.json cannot be used ({reason})") from error


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Create the causal language model of a config with normal random weights on the device.

    Raises ArchitectureError if transformers has no such model.
    """
    model = on_meta(config, dtype)
    materialize_buffers(model, model, device)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, meta in list(module._parameters.items()):
            if meta is None:
                continue
            tensor = torch.empty_like(meta, device=device)
            if meta.dim() < 2:
                tensor.fill_(1.0 if name == "weight" else 0.0)
            else:
                tensor.normal_(0.0, RANDOM_STD, generator=generator)
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    model.tie_weights()
    return model.eval()


def copy_sharing_tensors(model: Any) -> Any:
    """Copy the modules of a model, and share its tensors."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def tensors_of(model: nn.Module) -> dict[int, Tensor]:
    """Return every tensor of a model once, by address."""
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all weights. Tensors that LM head and embeddings share count once."""
    return sum(tensor.nbytes for tensor in tensors_of(model).values())


def read_bytes(model: nn.Module) -> int:
    """Count the bytes of the weights that a step reads: all but embeddings that no LM head multiplies."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            sizes |= {tensor.data_ptr(): tensor.nbytes for tensor in _own_tensors(module)}
    return sum(sizes.values())


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if isinstance(module, StoredMatrix):
        yield from module.stored().values()  # includes those of an LM head tied to the embeddings


def resolve_dtype(name: str, checkpoint: Checkpoint | None, config: Any) -> torch.dtype:
    """Return the named dtype. `auto` is that of the stored weights."""
    from niwaki.model.device import pick_dtype

    named = pick_dtype(name)
    if named is not None:
        return named
    if checkpoint is not None:
        return checkpoint.dtype
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
