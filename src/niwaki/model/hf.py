"""Glue to transformers: skeletons, buffers, weight names, matrices of their own shape, quiet loading.

Blocks of an unevenly pruned model have widths of their own, which no config of transformers can express. Its
config.json then names, in niwaki's `quantization_config`, the shape of each such matrix. Loading builds the model on
the meta device as always, and `resize` gives these matrices their shape.
"""

import copy
import logging
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from niwaki.errors import ArchitectureError, CheckpointError
from niwaki.formats.quantized import WEIGHT

# The first reads text alone. The others wrap a decoder with towers for images and sound.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
PACKED = ".planes_0"  # one of the tensors that may stand for a weight (`formats.quantized`)
HEADS = "num_heads"  # attribute of attention in some families (OPT); the others derive it from the width

_INITIALIZERS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.uniform_, Tensor.normal_}

Shapes = Mapping[str, Sequence[int]]  # name of an nn.Linear → outputs, inputs


def auto_class(config: Any) -> Any:
    """Return the auto class of transformers that loads the model which `config` describes.

    Several may know a type, such as one for the decoder alone and one for the wrapper with its towers. The class that
    config.json names under `architectures` decides, otherwise the first that knows the type.
    """
    import transformers

    kinds = [getattr(transformers, name) for name in AUTO_CLASSES if hasattr(transformers, name)]
    found = [(kind, kind._model_mapping.get(type(config), None)) for kind in kinds]
    named = (kind for kind, model in found if getattr(model, "__name__", "") in (config.architectures or ()))
    known = (kind for kind, model in found if model is not None)
    return next(named, None) or next(known, kinds[0])


def wrapped_parts(config: Any) -> list[str]:
    """Return the configs inside the config of a wrapper, such as text_config and vision_config; none for a decoder."""
    return (
        [] if config.get_text_config() is config else sorted(n for n in config.sub_configs if getattr(config, n, None))
    )


def on_meta(config: Any, dtype: torch.dtype) -> Any:
    """Build the language model of `config` on the meta device, with the towers that its class has.

    Raises ArchitectureError if transformers has no such model, and for an encoder with a decoder.
    """
    try:
        kind, text = auto_class(config), config.get_text_config()
        encodes = kind.__name__ != AUTO_CLASSES[0] and (config.is_encoder_decoder or text.is_encoder_decoder)
        if not encodes:
            with torch.device("meta"), _NoValues():
                return kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # any config may be one that its model does not accept
        reason = str(error).strip().split("\n")[0][:200]
        raise ArchitectureError(
            f"no causal language model for model_type {config.model_type!r} in this transformers ({reason})"
        ) from error
    raise ArchitectureError(
        f"model_type {config.model_type!r} is an encoder with a decoder: niwaki compresses decoders that run on text "
        "alone"
    )


class _NoValues(TorchFunctionMode):
    """Mode in which weights without memory are not initialized: a third of the time to build a model goes there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return a weight as it is where it would get random numbers."""
        if func in _INITIALIZERS:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


def build_skeleton(config: Any, dtype: torch.dtype) -> Any:
    """Build the model of `config` as `on_meta` does, in eval mode. Experts run one by one."""
    config = copy.deepcopy(config)
    config.use_cache = False
    config._experts_implementation = "eager"  # the other implementations hide the product of each expert
    skeleton: Any = on_meta(config, dtype).eval().requires_grad_(False)
    return skeleton


def materialize_buffers(skeleton: Any, module: nn.Module, device: torch.device | str, *, recurse: bool = True) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies and causal masks.

    transformers computes them where it initializes weights, for a module itself or for a module that contains it.
    """
    computed = []
    for part in module.modules() if recurse else [module]:
        missing = {name: buffer for name, buffer in part.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in missing.items():
            part._buffers[name] = torch.zeros_like(buffer, device=device)
        if missing:
            computed.append(part)
            _initialize(skeleton, part)
    for outer in _containing(skeleton, computed):
        _initialize(skeleton, outer)


def _containing(skeleton: Any, parts: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules of `skeleton` that contain one of `parts`, the outermost first."""
    if not parts:
        return []
    modules = dict(skeleton.named_modules())
    names = [name for name, module in modules.items() if any(module is part for part in parts)]
    outer = {name[:end] for name in names for end in range(len(name)) if name[end] == "."} | ({""} if names else set())
    return [modules[name] for name in sorted(outer)]


def _initialize(skeleton: Any, part: nn.Module) -> None:
    """Initialize the buffers of a module as transformers does, while its parameters are out of reach."""
    held = dict(part._parameters)
    for name, parameter in held.items():
        if parameter is not None:
            part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    try:
        with torch.no_grad():
            owning_model(skeleton, part)._init_weights(part)
    finally:
        part._parameters.update(held)


def owning_model(skeleton: Any, module: nn.Module) -> Any:
    """Return the innermost model of transformers around `module`: it knows how to initialize it."""
    from transformers import PreTrainedModel

    owner = skeleton
    for model in skeleton.modules():  # outer ones first
        if isinstance(model, PreTrainedModel) and any(part is module for part in model.modules()):
            owner = model
    return owner


@dataclass(frozen=True)
class WeightNames:
    """Names of the tensors of a checkpoint in the model that transformers builds.

    `parameters`: name on disk → parameter name. `converted`: names on disk that pass a conversion, such as the fusion
    of experts. `modules`: module of the model → its name on disk, for each weight that is renamed at most and whose
    packed tensors are renamed alike. `mapping`: the conversions of transformers. `unread`: names on disk that the model
    has no place for.
    """

    parameters: Mapping[str, str]
    converted: frozenset[str]
    modules: Mapping[str, str]
    mapping: list[Any]
    unread: tuple[str, ...] = ()

    def below(self, prefix: str) -> list[str]:
        """Return the names on disk of the parameters below `prefix`."""
        return [name for name, parameter in self.parameters.items() if parameter.startswith(prefix)]

    def outside(self, prefix: str) -> list[str]:
        """Return the names on disk of the parameters outside `prefix`."""
        return [name for name, parameter in self.parameters.items() if not parameter.startswith(prefix)]


def weight_names(model: Any, names: Iterable[str]) -> WeightNames:
    """Map `names` on disk to the parameters of `model`, as transformers does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()

    def renamed(name: str) -> tuple[str, bool]:
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return (name, False) if parameter not in known and name in known else (parameter, pattern is not None)

    parameters: dict[str, str] = {}
    converted: set[str] = set()
    modules: dict[str, str] = {}
    unread: list[str] = []
    for name in names:
        parameter, changed = renamed(name)
        if parameter not in known:
            unread.append(name)
            continue
        parameters[name] = parameter
        module, place = name.removesuffix(WEIGHT), parameter.removesuffix(WEIGHT)
        if changed:
            converted.add(name)
        elif name.endswith(WEIGHT) and parameter == place + WEIGHT:
            known[place + PACKED] = known[parameter]
            if module == place or renamed(module + PACKED) == (place + PACKED, False):
                modules[place] = module
            del known[place + PACKED]
    return WeightNames(parameters, frozenset(converted), modules, mapping, tuple(unread))


def tied_names(model: Any, names: WeightNames) -> list[tuple[list[str], list[str]]]:
    """Return the names on disk of each pair of weights that the config ties, if the checkpoint stores both."""
    stored: dict[str, list[str]] = {}
    for name, parameter in names.parameters.items():
        stored.setdefault(parameter, []).append(name)
    pairs = model.all_tied_weights_keys.items()
    return [(stored[source], stored[target]) for target, source in pairs if source in stored and target in stored]


def missing_names(model: Any, names: WeightNames) -> list[str]:
    """Return the names of all weights that `model` needs and the checkpoint lacks, as the file should hold them.

    Of weights that are tied, one is enough.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = set(names.parameters.values())
    missing = {name for name in parameters if name not in given}
    for target, source in model.all_tied_weights_keys.items():
        group = {source, *(other for other, owner in model.all_tied_weights_keys.items() if owner == source)}
        missing -= group if group & given else {target}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = {name for name in missing if not any(pattern.search(name) for pattern in ignored)}
    lacking = list(revert_weight_conversion(model, {name: parameters[name] for name in parameters if name in missing}))
    if base := _left_out_prefix(model, names):
        lacking = [name.removeprefix(base) for name in lacking]
    # A fused parameter is there as soon as one of its parts is: count all of them.
    fused = {names.parameters[name] for name in names.converted}
    if fused:
        parts = revert_weight_conversion(model, {name: parameters[name] for name in parameters if name in fused})
        owners = weight_names(model, parts).parameters
        wanted, found = Counter(owners.values()), Counter(names.parameters.values())
        lacking += [
            part for part, name in owners.items() if found[name] < wanted[name] and part not in names.parameters
        ]
    return sorted(lacking)


def _left_out_prefix(model: Any, names: WeightNames) -> str:
    """Return the prefix of the base model if the checkpoint stores its tensors without it, else ""."""
    prefix = f"{model.base_model_prefix}."
    left_out = any(parameter == prefix + name for name, parameter in names.parameters.items())
    return prefix if left_out else ""


def fill(model: Any, stored: dict[str, Tensor], mapping: list[Any], dtype: torch.dtype) -> str | None:
    """Set parameters of the skeleton `model` from tensors as they are on disk, through the conversions of transformers.

    Return the first name that does not fit, or None.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(device_map={"": "cpu"}, dtype=dtype, weight_mapping=mapping)
    with plain_loading():
        info, _ = convert_and_load_state_dict_in_model(model=model, state_dict=stored, load_config=settings)
    wrong = [str(key) for key in info.mismatched_keys] + list(info.conversion_errors)
    return wrong[0] if wrong else None


def split_converted(model: Any, fused: dict[str, Tensor], expected: Container[str]) -> dict[str, Tensor]:
    """Return fused parameters (experts) as the checkpoint stores them, by the reverse conversion of transformers.

    Raises ArchitectureError if a name is not in `expected`, the names of the checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    split: dict[str, Tensor] = revert_weight_conversion(model, fused)
    for name in sorted(split):
        if name not in expected:
            raise ArchitectureError(f"transformers cannot write {name} back as the checkpoint stores it")
    return split


def saved_name(model: Any, name: str) -> str:
    """Return the name under which transformers saves the tensor `name` of a loaded model."""
    from transformers.core_model_loading import revert_weight_conversion

    saved: str
    (saved,) = revert_weight_conversion(model, {name: model.get_buffer(name)})
    return saved


def resize(model: nn.Module, shapes: Shapes) -> None:
    """Give matrices of a model on the meta device, and their biases, the rows and columns of `shapes`.

    Raises CheckpointError for a name that is not a linear layer of this model.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    narrowed: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in shapes.items():
        if name not in linears:
            raise CheckpointError(f"config.json gives {name} a shape, and this model has no such linear layer")
        linear = linears[name]
        if rows != linear.out_features:
            narrowed[name.rpartition(".")[0]] = rows, linear.out_features
        like = linear.weight
        linear.out_features, linear.in_features = rows, columns
        linear.weight = nn.Parameter(like.new_empty(rows, columns), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(like.new_empty(rows), requires_grad=False)
    for name, (rows, before) in narrowed.items():
        attention: Any = model.get_submodule(name)
        if HEADS in vars(attention):
            setattr(attention, HEADS, getattr(attention, HEADS) * rows // before)


@contextmanager
def plain_loading() -> Iterator[None]:
    """Run the loader of transformers without its progress bar and its threads.

    The tensors are in memory already. Threads would only spread them over more heaps.
    """
    from transformers.utils import logging as shown_by_transformers

    shown, threads = shown_by_transformers.is_progress_bar_enabled(), os.environ.get(_NO_THREADS)
    shown_by_transformers.disable_progress_bar()
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if threads is None:
            os.environ.pop(_NO_THREADS, None)
        else:
            os.environ[_NO_THREADS] = threads
        if shown:
            shown_by_transformers.enable_progress_bar()


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Silence the warnings of a logger, where niwaki checks the same itself or the warning does not apply."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
