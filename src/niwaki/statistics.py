"""Streaming sums over the inputs of a group of matrices.

Only sums are kept, so several processes could add theirs together. A Gram matrix is collected once per group
and serves every matrix in it; its diagonal is the squared norms, which are then not collected twice.

Legend: N tokens, I input features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_TOKENS = 128
UNREACHED = "no calibration token reached this matrix: ranked by magnitude"


@dataclass(frozen=True)
class Needs:
    """What a method asks the walk for.

    `sqnorm` and `gram`: sums for every group of matrices. `learn_batches`: how many windows a learning method draws
    at a time from the block's inputs and the dense block's outputs (empty: it does not learn). `dense`: the
    outputs of the same block in the dense model as well.
    """

    sqnorm: bool = False
    gram: bool = False
    learn_batches: frozenset[int] = frozenset()
    dense: bool = False

    @property
    def windows(self) -> bool:
        """Whether inputs and outputs of the block are wanted, not only sums."""
        return bool(self.learn_batches)

    @property
    def anything(self) -> bool:
        """Whether the walk has to run the dense block over all windows before compressing it."""
        return self.sqnorm or self.gram or self.windows

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.sqnorm or other.sqnorm,
            self.gram or other.gram,
            self.learn_batches | other.learn_batches,
            self.dense or other.dense,
        )


class Statistics:
    """Sums over the calibration tokens that reached one group of matrices.

    `tokens` counts them. `sample_NI` keeps the first SAMPLE_TOKENS inputs, to measure output errors on.
    """

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.tokens = 0
        self.sample_NI: Tensor | None = None
        self._sqnorm_I: Tensor | None = None
        self._gram_II: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Adds inputs of shape [..., I]; sums are float32, products of bf16 inputs are exact in it."""
        x_NI = x.reshape(-1, x.shape[-1])
        if self.sample_NI is None:
            self.sample_NI = x_NI[:0]
        if len(self.sample_NI) < SAMPLE_TOKENS:
            room = SAMPLE_TOKENS - len(self.sample_NI)
            self.sample_NI = torch.cat([self.sample_NI, x_NI[:room].clone()])
        self.tokens += len(x_NI)
        if self.needs.gram:
            gram_II = _gram(x_NI)
            self._gram_II = gram_II if self._gram_II is None else self._gram_II.add_(gram_II)
        elif self.needs.sqnorm:
            sqnorm_I = torch.linalg.vector_norm(x_NI, dim=0, dtype=torch.float32).square_()
            self._sqnorm_I = sqnorm_I if self._sqnorm_I is None else self._sqnorm_I.add_(sqnorm_I)

    @property
    def sqnorm_I(self) -> Tensor:
        """Squared L2 norm of every input feature over all tokens, [I] float32."""
        found = self._gram_II.diagonal() if self._gram_II is not None else self._sqnorm_I
        if found is None:
            raise KeyError("squared norms were not collected: no token reached this group, or they were not needed")
        return found

    @property
    def gram_II(self) -> Tensor:
        """XᵀX over all tokens, [I, I] float32."""
        if self._gram_II is None:
            raise KeyError("no Gram matrix: no token reached this group, or it was not needed")
        return self._gram_II


def _gram(x_NI: Tensor) -> Tensor:
    """XᵀX in float32. On CUDA half precision inputs keep float32 accumulation at tensor-core speed."""
    if x_NI.is_cuda and x_NI.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x_NI.T, x_NI, out_dtype=torch.float32)
    x_NI = x_NI.float()
    return x_NI.T @ x_NI
