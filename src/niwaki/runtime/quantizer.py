"""niwaki's packed checkpoints as a quantization method of transformers.

`register()` runs when transformers' table of quantizers is first imported, wherever that happens, once niwaki has been
imported (see niwaki/__init__). `AutoModelForCausalLM.from_pretrained` then builds packed modules (linear layers, and
embeddings with the head that is tied to them) on the meta device and fills them from the file; the dense matrices never
exist.
"""

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from niwaki.errors import CheckpointError
from niwaki.formats.quantized import WEIGHT
from niwaki.model.checkpoint import QUANT_METHOD
from niwaki.model.hf import resize
from niwaki.runtime.embedding import pack_embedding
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear

FORMAT = 1


class NiwakiConfig(QuantizationConfigMixin):
    """What config.json says: how every quantized module is stored, and matrices with shapes of their own."""

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        shapes: dict[str, list[int]] | None = None,
        format: int = FORMAT,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # a name of ours, not of their list
        self.format = format
        self.modules: dict[str, Any] = modules or {}
        self.shapes: dict[str, list[int]] = shapes or {}


class NiwakiQuantizer(HfQuantizer):
    """Puts packed modules in the place of those that the config names, and of heads that are tied to them."""

    quantization_config: NiwakiConfig
    requires_calibration = True  # it loads what `niwaki compress` wrote, and quantizes nothing itself

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.quantization_config.format != FORMAT:
            raise CheckpointError(
                f"packed format {self.quantization_config.format}, this niwaki reads {FORMAT}: install a newer one"
            )
        resize(model, self.quantization_config.shapes)
        packed = self.quantization_config.modules
        for name, about in packed.items():
            module: Any = model.get_submodule(name)
            rows, columns = about["shape"]
            if (found := _shape(module)) != (rows, columns):
                here = f"{found[0]}×{found[1]}"
                raise CheckpointError(f"{name} is {here} in the model and {rows}×{columns} in the file")
            if isinstance(module, nn.Embedding):
                pack_embedding(module, about)
            else:
                kind = SparseLinear if "sparse" in about else PackedLinear
                _replace(model, name, kind(rows, columns, about, module.bias is not None))
        # transformers ties parameters, and codes are none: the modules are tied instead
        for target, source in list(model.all_tied_weights_keys.items()):
            owner = source.removesuffix(WEIGHT)
            if owner in packed:
                head = target.removesuffix(WEIGHT)
                _replace(model, head, model.get_submodule(owner).head(model.get_submodule(head).bias is not None))
                del model.all_tied_weights_keys[target]

    def is_serializable(self) -> bool:
        """save_pretrained writes the codes back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


def _shape(module: Any) -> tuple[int, int]:
    """Rows and columns of the weight of embeddings or a linear layer."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module`, on the meta device, in the place of the one called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.to("meta"))


def register() -> None:
    """Makes transformers know the method; called once."""
    register_quantization_config(QUANT_METHOD)(NiwakiConfig)
    register_quantizer(QUANT_METHOD)(NiwakiQuantizer)
