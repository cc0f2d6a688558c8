"""Streaming sums over the inputs of a group of matrices.

Only sums are kept, so several processes can add theirs together. One Gram matrix per group serves each matrix in it.
Its diagonal holds the squared norms, so they are not collected again.

Legend: N tokens, I input features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_TOKENS = 128
STRIP_COLUMNS = 1024
UNREACHED = "no calibration token reached this matrix: ranked by magnitude"


@dataclass(frozen=True)
class Needs:
    """Statistics and streams that a method asks of the walk.

    `sqnorm` and `gram`: sums per group of matrices. `learn_batches`: batch sizes that a learning method draws from
    the inputs and outputs of the dense block (empty: it does not learn). `dense`: also the outputs of the same block
    in the dense model. `full`: Gram matrices with the inputs of the same tokens in the dense model. `mean`: sums of
    the inputs. `gradient`: squared gradients of the loss of each window in the dense model. `held`: Gram matrices of
    every eighth part of the tokens too, to judge by. `ahead`: how many dense blocks after this one are needed.
    """

    sqnorm: bool = False
    gram: bool = False
    learn_batches: frozenset[int] = frozenset()
    dense: bool = False
    full: bool = False
    mean: bool = False
    gradient: bool = False
    held: bool = False
    ahead: int = 0

    @property
    def windows(self) -> bool:
        """Return True if inputs and outputs of the block are needed, not only sums."""
        return bool(self.learn_batches)

    @property
    def anything(self) -> bool:
        """Return True if the walk must run the dense block over all windows before it compresses the block."""
        return self.sqnorm or self.gram or self.full or self.mean or self.gradient or self.windows

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.sqnorm or other.sqnorm,
            self.gram or other.gram,
            self.learn_batches | other.learn_batches,
            self.dense or other.dense,
            self.full or other.full,
            self.mean or other.mean,
            self.gradient or other.gradient,
            self.held or other.held,
            max(self.ahead, other.ahead),
        )


class Statistics:
    """Sums over the calibration tokens that reached one group of matrices.

    `own_tokens` counts them, and `tokens` also those that `lean_on` lends. `sample_NI` keeps the first SAMPLE_TOKENS
    inputs, for the measurement of output errors.
    """

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.tokens = 0
        self.own_tokens = 0
        self.sample_NI: Tensor | None = None
        self._sqnorm_I: Tensor | None = None
        self._gram_II: Tensor | None = None
        self._mirrored = False  # until then only the strips up to the diagonal are valid
        self._full: tuple[Tensor, Tensor] | None = None
        self._sum_I: Tensor | None = None
        self._held_II: Tensor | None = None

    def add(self, x: Tensor, full: Tensor | None = None) -> None:
        """Add inputs of shape [..., I]. Sums are float32, in which products of bf16 inputs are exact.

        `full`: inputs of the same tokens in the dense model, of the same shape.
        """
        x_NI = x.reshape(-1, x.shape[-1])
        if self.sample_NI is None:
            self.sample_NI = x_NI[:0]
        if len(self.sample_NI) < SAMPLE_TOKENS:
            room = SAMPLE_TOKENS - len(self.sample_NI)
            self.sample_NI = torch.cat([self.sample_NI, x_NI[:room].clone()])
        self.tokens += len(x_NI)
        self.own_tokens += len(x_NI)
        if self.needs.gram:
            self._add_gram(x_NI)
        elif self.needs.sqnorm:
            sqnorm_I = torch.linalg.vector_norm(x_NI, dim=0, dtype=torch.float32).square_()
            self._sqnorm_I = sqnorm_I if self._sqnorm_I is None else self._sqnorm_I.add_(sqnorm_I)
        if self.needs.held:
            held_NI = x_NI[len(x_NI) - len(x_NI) // 8 :]
            held_II = _product(held_NI, held_NI)
            self._held_II = held_II if self._held_II is None else self._held_II.add_(held_II)
        if self.needs.mean:
            sum_I = x_NI.sum(0, dtype=torch.float32)
            self._sum_I = sum_I if self._sum_I is None else self._sum_I.add_(sum_I)
        if full is not None:
            full_NI = full.reshape(-1, full.shape[-1])
            found = _product(full_NI, full_NI), _product(full_NI, x_NI)
            self._full = found if self._full is None else (self._full[0].add_(found[0]), self._full[1].add_(found[1]))

    def _add_gram(self, x_NI: Tensor) -> None:
        """Add to the strips of XᵀX that hold its lower triangle, at little more than half of the operations."""
        width = x_NI.shape[1]
        if self._gram_II is None:
            self._gram_II = torch.zeros(width, width, device=x_NI.device)
        for first in range(0, width, STRIP_COLUMNS):
            last = min(first + STRIP_COLUMNS, width)
            self._gram_II[first:last, :last] += _product(x_NI[:, first:last], x_NI[:, :last])
        self._mirrored = False

    def lean_on(self, other: "Statistics", tokens: int) -> None:
        """Add the sums of `other` with the weight of `tokens` tokens; nothing if it has met none."""
        if not other.tokens:
            return
        share = tokens / other.tokens
        for name in ("_sqnorm_I", "_gram_II", "_sum_I", "_held_II"):
            own, lent = getattr(self, name), getattr(other, name)
            if lent is not None:
                setattr(self, name, lent * share if own is None else own.add_(lent, alpha=share))
        self.tokens += tokens
        self._mirrored = False

    @property
    def sqnorm_I(self) -> Tensor:
        """Return the squared L2 norm of each input feature over all tokens, [I] float32."""
        found = self._gram_II.diagonal() if self._gram_II is not None else self._sqnorm_I
        if found is None:
            raise KeyError("squared norms were not collected: no token reached this group, or they were not needed")
        return found

    @property
    def mean_I(self) -> Tensor:
        """Return the mean of each input feature over all tokens, [I] float32."""
        if self._sum_I is None:
            raise KeyError("means were not collected: no token reached this group, or they were not needed")
        return self._sum_I / self.tokens

    @property
    def gram_II(self) -> Tensor:
        """Return XᵀX over all tokens, [I, I] float32."""
        if self._gram_II is None:
            raise KeyError("no Gram matrix: no token reached this group, or it was not needed")
        if not self._mirrored:
            for first in range(STRIP_COLUMNS, len(self._gram_II), STRIP_COLUMNS):
                last = min(first + STRIP_COLUMNS, len(self._gram_II))
                self._gram_II[:first, first:last] = self._gram_II[first:last, :first].T
            self._mirrored = True
        return self._gram_II

    @property
    def held_II(self) -> Tensor:
        """Return XᵀX of the last eighth of every batch of tokens, [I, I] float32; `gram_II` includes them."""
        if self._held_II is None:
            raise KeyError("no held-out Gram matrix: no token reached this group, or it was not needed")
        return self._held_II

    @property
    def full_II(self) -> tuple[Tensor, Tensor]:
        """Return FᵀF and FᵀX, each [I, I] float32, where F holds the inputs of the same tokens in the dense model."""
        if self._full is None:
            raise KeyError("no inputs of the dense model: no token reached this group, or they were not needed")
        return self._full


def _product(x_NI: Tensor, y_NI: Tensor) -> Tensor:
    """Return XᵀY in float32. On CUDA, half-precision inputs keep float32 accumulation at tensor-core speed."""
    if x_NI.is_cuda and x_NI.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x_NI.T, y_NI, out_dtype=torch.float32)
    return x_NI.float().T @ y_NI.float()
