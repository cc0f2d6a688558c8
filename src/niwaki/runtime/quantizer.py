"""niwaki's packed checkpoints as a quantization method of transformers.

`register()` runs when transformers' table of quantizers is first imported, wherever that happens, once niwaki has been
imported (see niwaki/__init__). `AutoModelForCausalLM.from_pretrained` then builds PackedLinear modules on the meta
device and fills them from the file; the dense matrices never exist.
"""

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from niwaki.checkpoint import QUANT_METHOD
from niwaki.errors import CheckpointError
from niwaki.runtime.linear import PackedLinear

FORMAT = 1


class NiwakiConfig(QuantizationConfigMixin):
    """What config.json says of a packed checkpoint: how every quantized module is stored."""

    def __init__(self, modules: dict[str, Any] | None = None, format: int = FORMAT, **_: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # a name of ours, not of their list
        self.format = format
        self.modules: dict[str, Any] = modules or {}


class NiwakiQuantizer(HfQuantizer):
    """Puts PackedLinear in the place of every module that the config names."""

    quantization_config: NiwakiConfig
    requires_calibration = True  # it loads what `niwaki compress` wrote, and quantizes nothing itself

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.quantization_config.format != FORMAT:
            raise CheckpointError(
                f"packed format {self.quantization_config.format}, this niwaki reads {FORMAT}: install a newer one"
            )
        for name, about in self.quantization_config.modules.items():
            parent, _, last = name.rpartition(".")
            linear: Any = model.get_submodule(name)
            rows, columns = about["shape"]
            if (linear.out_features, linear.in_features) != (rows, columns):
                here = f"{linear.out_features}×{linear.in_features}"
                raise CheckpointError(f"{name} is {here} in the model and {rows}×{columns} in the file")
            packed = PackedLinear(rows, columns, about, linear.bias is not None)
            setattr(model.get_submodule(parent), last, packed.to("meta"))

    def is_serializable(self) -> bool:
        """save_pretrained writes the codes back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


def register() -> None:
    """Makes transformers know the method; called once."""
    register_quantization_config(QUANT_METHOD)(NiwakiConfig)
    register_quantizer(QUANT_METHOD)(NiwakiQuantizer)
