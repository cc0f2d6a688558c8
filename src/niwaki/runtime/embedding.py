"""Input embeddings that keep their weights as codes; only the rows that are looked up are decoded.

A head that is tied to them is a PackedLinear that reads the same tensors.

Legend: N tokens looked up, D hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.formats.quantized import assemble, read_parts
from niwaki.runtime.linear import PackedLinear, make_room, stored_buffers

DECODED_TOKENS = 2048  # rows of a look-up that are decoded at a time


class PackedEmbedding(nn.Embedding):
    """An embedding whose rows are stored as the parts that `described` lists (see `codes`).

    `weight` is a buffer of no rows: it says in which dtype look-ups come out, and follows casts of the model.
    """

    described: list[Mapping[str, Any]]

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the matrix by their names in the file."""
        return stored_buffers(self, self.described)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """The matrix that the codes stand for."""
        return assemble(read_parts(self.stored(), self.described, self.embedding_dim)).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., D] of the tokens [...], in the dtype of `weight`."""
        stored, ids_N = self.stored(), input.reshape(-1)
        found_ND = self.weight.new_empty(len(ids_N), self.embedding_dim)
        for first in range(0, len(ids_N), DECODED_TOKENS):
            some = slice(first, first + DECODED_TOKENS)
            found_ND[some] = assemble(read_parts(stored, self.described, self.embedding_dim, ids_N[some]))
        return found_ND.view(*input.shape, self.embedding_dim)

    def head(self, bias: bool) -> PackedLinear:
        """The head that is tied to these embeddings."""
        return PackedLinear(self.num_embeddings, self.embedding_dim, {"parts": self.described}, bias, owner=self)


def pack_embedding(module: nn.Embedding, described: Mapping[str, Any]) -> None:
    """Turns embeddings on the meta device into packed ones; what their class does beside the look-up stays."""
    dtype = module.weight.dtype
    module.__class__ = _packed_kind(type(module))
    assert isinstance(module, PackedEmbedding)
    del module.weight
    module.padding_idx = None  # it matters to gradients and to new weights, of which there are none
    module.described = described["parts"]
    with torch.device("meta"):
        module.register_buffer("weight", torch.empty(0, module.embedding_dim, dtype=dtype), persistent=False)
        make_room(module, module.num_embeddings, module.embedding_dim, module.described)


def _packed_kind(kind: type[nn.Embedding]) -> type[PackedEmbedding]:
    """A subclass of `kind` whose `super().forward` is the packed look-up."""
    if kind is nn.Embedding:
        return PackedEmbedding
    return type(f"Packed{kind.__name__}", (kind, PackedEmbedding), {})
