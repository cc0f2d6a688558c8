"""Table of the export formats: all facts of a format that are not its code.

Export, model card and command line read them here. The code of a format is its module, with `check` and `write` (see
`niwaki.exporters.export.Exporter`). Nothing here needs torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ExportFormat:
    """One format. `suffixes`: those of its weight files, which the record counts and hashes.

    `library`: the library that the card names for loading. `storage`: the text of the card about the files; fields of
    the record of the result and of its export stand in braces. `purpose`: a few words for the command line.
    """

    module: str
    suffixes: tuple[str, ...]
    library: str
    purpose: str
    storage: str


FORMATS: Mapping[str, ExportFormat] = {
    "compressed-tensors": ExportFormat(
        module="niwaki.exporters.compressed_tensors",
        suffixes=(".safetensors",),
        library="transformers",
        purpose="4- and 8-bit codes of rtn and gptq",
        storage="""{packed} of the matrices are stored as codes, in the format `{format}` of {to}, which
transformers reads after `pip install {to}`.""",
    ),
    "gguf": ExportFormat(
        module="niwaki.exporters.gguf_file",
        suffixes=(".gguf",),
        library="gguf",
        purpose="one file for llama.cpp",
        storage="""One GGUF file with vocabulary ({format}), which llama.cpp runs: `llama-cli -m model.gguf`.""",
    ),
    "onnx": ExportFormat(
        module="niwaki.exporters.onnx_graph",
        suffixes=(".onnx", ".data"),
        library="onnx",
        purpose="a graph for onnxruntime",
        storage="An ONNX graph ({format}) from tokens and their mask to logits, with room for any batch and length "
        """and no
cache of keys and values: `onnxruntime.InferenceSession("model.onnx")`. The tokenizer lies beside it.""",
    ),
}
