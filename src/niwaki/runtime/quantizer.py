"""Quantization method of transformers for niwaki's packed checkpoints.

`register()` runs when transformers' table of quantizers is first imported after niwaki (see `hf_hook`). Then
`AutoModelForCausalLM.from_pretrained` builds packed modules on the meta device and fills them from the file. They are
linear layers, and embeddings with the head that is tied to them. The dense matrices never exist.
"""

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from niwaki.errors import CheckpointError, format_problem
from niwaki.formats.quantized import WEIGHT
from niwaki.model.checkpoint import QUANT_METHOD
from niwaki.model.hf import resize
from niwaki.runtime.embedding import pack_embedding
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear

FORMAT = 1


class NiwakiConfig(QuantizationConfigMixin):
    """Quantization section of config.json: the storage of every packed module, and matrices with other shapes."""

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        shapes: dict[str, list[int]] | None = None,
        format: int = FORMAT,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # not a name of their list
        self.format = format
        self.modules: dict[str, Any] = modules or {}
        self.shapes: dict[str, list[int]] = shapes or {}


class NiwakiQuantizer(HfQuantizer):
    """Quantizer that replaces the modules that the config names, and heads that are tied to them, by packed ones."""

    quantization_config: NiwakiConfig
    requires_calibration = True  # it loads results of `niwaki compress` and quantizes no weights

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if problem := format_problem(self.quantization_config.format, (FORMAT,)):
            raise CheckpointError(f"the quantization_config of the model {problem}")
        resize(model, self.quantization_config.shapes)
        packed = self.quantization_config.modules
        for name, about in packed.items():
            module: Any = model.get_submodule(name)
            rows, columns = about["shape"]
            if (shape := _shape(module)) != (rows, columns):
                here = f"{shape[0]}×{shape[1]}"
                raise CheckpointError(f"{name} is {here} in the model and {rows}×{columns} in the file")
            if isinstance(module, nn.Embedding):
                pack_embedding(module, about)
            else:
                kind = SparseLinear if "sparse" in about else PackedLinear
                _replace(model, name, kind(rows, columns, about, module.bias is not None))
        # transformers ties parameters, and codes are buffers: the modules are tied instead
        for target, source in list(model.all_tied_weights_keys.items()):
            owner = source.removesuffix(WEIGHT)
            if owner in packed:
                head = target.removesuffix(WEIGHT)
                _replace(model, head, model.get_submodule(owner).head(model.get_submodule(head).bias is not None))
                del model.all_tied_weights_keys[target]

    def is_serializable(self) -> bool:
        """Return true: save_pretrained writes the codes unchanged."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return false: codes have no gradients."""
        return False


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
