"""Checks that a checkpoint holds the weights that its config.json asks for, from headers alone.

names = names_of(Checkpoint.open("MODEL"))
"""

from collections.abc import Collection
from typing import Any

from niwaki.errors import CheckpointError
from niwaki.formats.quantized import WEIGHT
from niwaki.model.checkpoint import STORED_DTYPES, Checkpoint
from niwaki.model.config_file import config_faults
from niwaki.model.hf import WeightNames, build_skeleton, missing_names, resize, weight_names

SHOWN_NAMES = 4  # of many tensors that are missing


def check_complete(checkpoint: Checkpoint, model: Any, names: WeightNames) -> None:
    """Raise CheckpointError with the names of the weights of `model` that the checkpoint lacks or has in another shape.

    `model` is on the meta device and has the shapes that config.json asks for.
    """
    parameters = model.state_dict()
    for name, parameter in names.parameters.items():
        found, wanted = list(checkpoint.tensors[name].shape), list(parameters[parameter].shape)
        if name not in names.converted and found != wanted:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has the shape {found}, and config.json asks for {wanted}: config and "
                "weights belong to different models"
            )
    missing = missing_names(model, names)
    if not missing:
        return
    shown = ", ".join(missing[:SHOWN_NAMES]) + (
        f" and {len(missing) - SHOWN_NAMES} more" * (len(missing) > SHOWN_NAMES)
    )
    count = f"{len(missing)} tensors" if len(missing) > 1 else "1 tensor"
    head = model.get_output_embeddings()
    heads = {f"{name}{WEIGHT}" for name, module in model.named_modules() if module is head}
    way = (
        "set tie_word_embeddings to true in config.json if the embeddings are the head, or download the model again"
        if set(missing) <= heads
        else "the checkpoint is incomplete, or belongs to another architecture; download the model again"
    )
    raise CheckpointError(f"{checkpoint.folder} lacks {count} of the model: {shown}: {way}")


def names_of(checkpoint: Checkpoint, *, complete: bool = True) -> WeightNames:
    """Return the names of the weights of a checkpoint, and check that it is `complete`. No weight is read."""
    with config_faults(checkpoint.folder):
        skeleton = build_skeleton(checkpoint.config, checkpoint.dtype)
        resize(skeleton, checkpoint.shapes)
        names = weight_names(skeleton, checkpoint.tensors)
        if complete:
            check_dtypes(checkpoint, skeleton, names)
            check_complete(checkpoint, skeleton, names)
    return names


def check_dtypes(checkpoint: Checkpoint, model: Any, names: WeightNames, idle: Collection[str] = ()) -> None:
    """Raise CheckpointError for a weight in a dtype without plain arithmetic, such as fp8, or in float64.

    The tensors `idle`, which nothing reads, may have any dtype.
    """
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, parameter in names.parameters.items():
        dtype = checkpoint.tensors[name].dtype
        if name not in idle and parameter in floating and dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is stored as {dtype}: expected F32, F16 or BF16; start from the "
                "checkpoint before quantization, or convert it"
            )
