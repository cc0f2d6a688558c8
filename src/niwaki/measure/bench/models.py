"""Models in memory: with random weights, as another one of the same tensors, and how many bytes they are.

A second model costs nothing but its modules: it holds the tensors of the first one until a form puts others there.

Cost: random weights take one pass; counting looks at no weight.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import ArchitectureError, CheckpointError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.hf import materialize_buffers
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear

SPREAD = 0.02  # of random weights


def only_config(model: str | Path) -> Path | None:
    """The folder `model` if it holds a config.json and no weights of any kind."""
    folder = Path(model).expanduser()
    kinds = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".onnx"}
    if not (folder / "config.json").is_file() or any(path.suffix in kinds for path in folder.iterdir()):
        return None
    return None if list(folder.glob("*.index.json")) else folder


def read_config(folder: Path) -> Any:
    """config.json alone. Raises CheckpointError in one line."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises validation errors of several libraries here
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{folder}/config.json cannot be used ({reason})") from error


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model of a config with normal weights, made on the device."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ArchitectureError(f"no causal language model for model_type {config.model_type!r} ({reason})") from error
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
                tensor.normal_(0.0, SPREAD, generator=generator)
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    model.tie_weights()
    return model.eval()


def twin(model: Any) -> Any:
    """Another model of the same tensors."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def tensors_of(model: nn.Module) -> dict[int, Tensor]:
    """Every tensor that a model holds, once, by address."""
    found = (*model.parameters(), *model.buffers())
    return {tensor.data_ptr(): tensor for tensor in found if tensor.numel()}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights; what the head shares with the embeddings once."""
    return sum(tensor.nbytes for tensor in tensors_of(model).values())


def read_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a step reads: all but embeddings that no head multiplies."""
    found: dict[int, int] = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            found |= {tensor.data_ptr(): tensor.nbytes for tensor in _own(module)}
    return sum(found.values())


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if isinstance(module, PackedLinear | SparseLinear):
        yield from module.stored().values()  # also of a head that has the tensors of the embeddings


def dtype_of(name: str, checkpoint: Checkpoint | None, config: Any) -> torch.dtype:
    """The arithmetic of a model: as asked, or as its weights are stored."""
    from niwaki.model.device import pick_dtype

    asked = pick_dtype(name)
    if asked is not None:
        return asked
    if checkpoint is not None:
        return checkpoint.dtype
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
