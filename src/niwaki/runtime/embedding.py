"""Input embeddings that keep their weights as codes and decode only the rows of a look-up.

An LM head that is tied to them is a PackedLinear that reads the same tensors.

Legend: N tokens looked up, D hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.formats.quantized import assemble, read_parts
from niwaki.runtime.linear import PackedLinear, register_buffers, stored_buffers

DECODED_TOKENS = 2048  # rows decoded together


class PackedEmbedding(nn.Embedding):
    """Embedding whose rows are stored as the parts that `described` lists (see `formats.quantized`).

    `weight` is a buffer without rows. Its dtype is that of the looked-up rows, and follows casts of the model.
    """

    described: list[Mapping[str, Any]]

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors of the matrix by their names in the file."""
        return stored_buffers(self, self.described)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded matrix."""
        return assemble(read_parts(self.stored(), self.described, self.embedding_dim)).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows [..., D] of the tokens [...], in the dtype of `weight`."""
        stored, ids_N = self.stored(), input.reshape(-1)
        rows_ND = self.weight.new_empty(len(ids_N), self.embedding_dim)
        for first in range(0, len(ids_N), DECODED_TOKENS):
            part = slice(first, first + DECODED_TOKENS)
            rows_ND[part] = assemble(read_parts(stored, self.described, self.embedding_dim, ids_N[part]))
        return rows_ND.view(*input.shape, self.embedding_dim)

    def head(self, bias: bool) -> PackedLinear:
        """Return the LM head that is tied to these embeddings."""
        return PackedLinear(self.num_embeddings, self.embedding_dim, {"parts": self.described}, bias, owner=self)


def pack_embedding(module: nn.Embedding, described: Mapping[str, Any]) -> None:
    """Make embeddings on the meta device packed ones; the rest of their class stays, such as a scale of the rows."""
    dtype = module.weight.dtype
    module.__class__ = _packed_kind(type(module))
    assert isinstance(module, PackedEmbedding)
    del module.weight
    module.padding_idx = None  # only gradients and new weights use it
    module.described = described["parts"]
    with torch.device("meta"):
        module.register_buffer("weight", torch.empty(0, module.embedding_dim, dtype=dtype), persistent=False)
        register_buffers(module, module.num_embeddings, module.embedding_dim, module.described)


def _packed_kind(kind: type[nn.Embedding]) -> type[PackedEmbedding]:
    """Return a subclass of `kind` whose `super().forward` is the packed look-up."""
    if kind is nn.Embedding:
        return PackedEmbedding
    return type(f"Packed{kind.__name__}", (kind, PackedEmbedding), {})
