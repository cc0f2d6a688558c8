"""Input embeddings that keep their weights as codes and decode only the rows of a look-up.

An LM head that is tied to them is a PackedLinear that reads the same tensors.

Legend: N tokens looked up, D hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import CheckpointError
from niwaki.formats.descriptors import AGAIN, CodesDescriptor, read_descriptor
from niwaki.formats.quantized import assemble, read_parts
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.stored import StoredMatrix

DECODED_TOKENS = 2048  # rows decoded together


class _Rows(Tensor):
    """Stand-in [0, D] for the weight of packed embeddings: an index decodes the rows that it asks for."""

    owner: "PackedEmbedding"

    def __getitem__(self, index: Any) -> Tensor:
        row, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(row, int):  # a wrapper reads the row of its padding at every step
            ids_1 = torch.tensor([row % self.owner.num_embeddings], device=self.device)
            return self.owner.rows(ids_1)[(0, *rest)]
        return self.owner.weight_OI(self.dtype)[index]


class PackedEmbedding(StoredMatrix, nn.Embedding):
    """Embedding whose rows are stored as the parts that `described` lists (see `formats.quantized`).

    Looked-up rows have the dtype of the buffer `_like`, which follows casts of the model.
    """

    described: list[Mapping[str, Any]]
    _like: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return a stand-in without rows, which decodes the rows that an index asks for."""
        rows = self._like.as_subclass(_Rows)
        rows.owner = self
        return rows

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded matrix."""
        return assemble(read_parts(self.stored(), self.described, self.embedding_dim)).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows [..., D] of the tokens [...], in the dtype of `_like`."""
        return self.rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)

    def rows(self, ids_N: Tensor) -> Tensor:
        """Return the decoded rows [N, D] of tokens, without what a subclass does to them."""
        self.check()
        stored = self.stored()
        rows_ND = self._like.new_empty(len(ids_N), self.embedding_dim)
        for first in range(0, len(ids_N), DECODED_TOKENS):
            part = slice(first, first + DECODED_TOKENS)
            rows_ND[part] = assemble(read_parts(stored, self.described, self.embedding_dim, ids_N[part]))
        return rows_ND

    def head(self, bias: bool) -> PackedLinear:
        """Return the LM head that is tied to these embeddings."""
        return PackedLinear(self.num_embeddings, self.embedding_dim, {"parts": self.described}, bias, owner=self)


def pack_embedding(module: nn.Embedding, described: Mapping[str, Any], name: str = "packed embeddings") -> None:
    """Make embeddings on the meta device packed ones; the rest of their class stays, such as a scale of the rows."""
    shape = [module.num_embeddings, module.embedding_dim]
    descriptor = read_descriptor(name, {"shape": shape, **described})
    if not isinstance(descriptor, CodesDescriptor):
        raise CheckpointError(f"config.json describes {name} wrongly: embeddings have parts, got sparse; {AGAIN}")
    dtype = module.weight.dtype
    del module.weight
    module.__class__ = _packed_kind(type(module))
    assert isinstance(module, PackedEmbedding)
    module.padding_idx = None  # only gradients and new weights use it
    module.described = described["parts"]
    with torch.device("meta"):
        module.register_buffer("_like", torch.empty(0, module.embedding_dim, dtype=dtype), persistent=False)
        module.register(descriptor)


def _packed_kind(kind: type[nn.Embedding]) -> type[PackedEmbedding]:
    """Return a subclass of `kind` whose `super().forward` is the packed look-up."""
    if kind is nn.Embedding:
        return PackedEmbedding
    return type(f"Packed{kind.__name__}", (kind, PackedEmbedding), {})
