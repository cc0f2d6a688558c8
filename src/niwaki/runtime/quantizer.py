"""Quantization method of transformers for niwaki's packed checkpoints.

`register()` runs when transformers' table of quantizers is first imported after niwaki (see `hf_hook`). Then
`AutoModelForCausalLM.from_pretrained` builds packed modules on the meta device and fills them from the file. They are
linear layers, and embeddings with the head that is tied to them. The dense matrices never exist.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from niwaki.errors import CheckpointError
from niwaki.formats.descriptors import RECORD_NAMES, read_descriptor, read_descriptors
from niwaki.formats.quantized import WEIGHT
from niwaki.model.checkpoint import FORMAT, quantized_config, read_quantization
from niwaki.model.config_file import QUANT_METHOD, WEIGHTS_FIELD
from niwaki.model.files import write_text
from niwaki.model.hf import resize, saved_name, weight_names
from niwaki.model.own_reader import header_of
from niwaki.runtime.embedding import pack_embedding
from niwaki.runtime.stored import StoredMatrix
from niwaki.runtime.trellis_linear import packed_class


class NiwakiConfig(QuantizationConfigMixin):
    """Quantization section of config.json: the storage of every packed module, and matrices with other shapes."""

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        shapes: dict[str, list[int]] | None = None,
        format: int = FORMAT,
        **others: Any,
    ) -> None:
        stored = {"modules": modules or {}, "shapes": shapes or {}, "format": format}
        read_quantization(stored | others)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # not a name of their list
        self.format = format
        self.modules: dict[str, Any] = modules or {}
        self.shapes: dict[str, list[int]] = shapes or {}


class NiwakiQuantizer(HfQuantizer):
    """Quantizer that replaces the modules that the config names, and heads that are tied to them, by packed ones."""

    quantization_config: NiwakiConfig
    places: Mapping[str, Any]  # descriptions of the packed modules by their name in the model
    requires_calibration = True  # it loads results of `niwaki compress` and quantizes no weights

    def update_tp_plan(self, config: Any) -> Any:
        """Remove the field that stops transformers. Versions before 5.20 call this before they look for the files."""
        return _readable(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove the field that stops transformers. Versions from 5.20 on call this before they look for the files."""
        return _readable(config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            # Buffers that are offloaded to a disk are checked when they are back.
            if isinstance(module, StoredMatrix) and not any(tensor.is_meta for tensor in module.stored().values()):
                module.check()
        model.save_pretrained = MethodType(_save_pretrained, model)
        return model

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        places = _places(model, config.shapes)
        resize(model, {places.get(name, name): shape for name, shape in config.shapes.items()})
        packed = self.places = _packed_here(model, config.modules)
        for name, about in packed.items():
            module: Any = model.get_submodule(name)
            rows, columns = about["shape"]
            if (shape := _shape(module)) != (rows, columns):
                here = f"{shape[0]}×{shape[1]}"
                raise CheckpointError(f"{name} is {here} in the model and {rows}×{columns} in the file")
            if isinstance(module, nn.Embedding):
                pack_embedding(module, about, name)
            else:
                kind = packed_class(about)
                with torch.device("meta"):
                    packed_module = kind(rows, columns, about, module.bias is not None, name=name)
                _replace(model, name, packed_module.to(module.weight.dtype))
        _check_files(kwargs.get("checkpoint_files"), config.modules)
        # transformers ties parameters, and codes are buffers: the modules are tied instead
        for target, source in list(model.all_tied_weights_keys.items()):
            owner = source.removesuffix(WEIGHT)
            if owner in packed:
                head = target.removesuffix(WEIGHT)
                tied: Any = model.get_submodule(head)
                packed_head = model.get_submodule(owner).head(tied.bias is not None)
                _replace(model, head, packed_head.to(tied.weight.dtype))
                del model.all_tied_weights_keys[target]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Name the packed modules in the config as the file that is about to be saved does."""
        modules = {}
        for place, about in self.places.items():
            name = f"{place}.{read_descriptor(place, about).names()[0]}"
            modules[saved_name(model, name).rpartition(".")[0]] = about
        model.config.quantization_config.modules = modules
        return None, {}

    def is_serializable(self) -> bool:
        """Return true: save_pretrained writes the codes unchanged."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return false: codes have no gradients."""
        return False


def _packed_here(model: Any, packed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the packed modules by their name in this class of model. A class without LM head has no place for it.

    Raises CheckpointError for any other module without a place, whose weights would be random.
    """
    places, known = _places(model, packed), {name for name, _ in model.named_modules()}
    lost = [name for name in packed if places.get(name) not in known]
    if len(lost) > (model.get_output_embeddings() is None):
        raise CheckpointError(
            f"{type(model).__name__} has no module for the packed {lost[-1]}: load this result with niwaki.load, or "
            "with the class that config.json names"
        )
    return {places[name]: about for name, about in packed.items() if name not in lost}


def _check_files(files: Sequence[str] | None, packed: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the files lack a tensor of a packed module, or hold another dtype or shape.

    transformers draws random numbers for a tensor that is missing.
    """
    if files is None or not all(str(file).endswith(".safetensors") for file in files):
        return
    found: dict[str, tuple[str, Sequence[int]]] = {}
    for file in files:
        found |= {name: (info.dtype, info.shape) for name, info in header_of(Path(file)).items()}
    for module, descriptor in read_descriptors(packed).items():
        names = [name for name in RECORD_NAMES if f"{module}.{name}" in found]
        descriptor.check_header({name: found[f"{module}.{name}"] for name in names})


def _places(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Map names of modules on disk to their names in this class of model, as transformers renames their weights."""
    modules = weight_names(model, [name + WEIGHT for name in names]).modules
    return {name: place for place, name in modules.items()}


def _save_pretrained(model: Any, save_directory: Any, *arguments: Any, **options: Any) -> None:
    """Save a packed model as transformers does, with the field that transformers itself never writes."""
    type(model).save_pretrained(model, save_directory, *arguments, **options)
    if (Path(save_directory) / "config.json").is_file():
        stored = json.loads((Path(save_directory) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        path = Path(save_directory) / "config.json"
        write_text(path, quantized_config(json.loads(path.read_text(encoding="utf-8")), stored))


def _readable(config: Any) -> Any:
    """Return `config` without the field that stops transformers where niwaki is not imported."""
    if hasattr(config, WEIGHTS_FIELD):
        delattr(config, WEIGHTS_FIELD)
    return config


def _shape(module: Any) -> tuple[int, int]:
    """Return rows and columns of the weight of embeddings or a linear layer."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called `name` by `module`, on the meta device."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.to("meta"))


def register() -> None:
    """Register the method with transformers; called once."""
    register_quantization_config(QUANT_METHOD)(NiwakiConfig)
    register_quantizer(QUANT_METHOD)(NiwakiQuantizer)
