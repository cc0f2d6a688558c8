"""Statistics of a prefill: the activity of every unit, and the output of the heads of the first block.

They are sums over the tokens that are not padding. So a prompt may come in chunks, and later tokens may be added.

Legend: B sequences, T tokens, C channels, D width of the heads' output, U units.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.config.targets import Kind
from niwaki.runtime.contextual.units import KINDS, UnitLayout


class Prefill:
    """Number of the tokens of each sequence that the full model read so far, without padding."""

    def __init__(self) -> None:
        self.tokens_B: Tensor | None = None

    @contextmanager
    def observe(self, blocks: nn.ModuleList, real_BT: Tensor) -> Iterator[None]:
        """Add the dense forwards inside; `real_BT` is true for tokens that are not padding."""
        yield
        self._count(real_BT)

    def _count(self, real_BT: Tensor) -> None:
        count_B = real_BT.sum(1)
        self.tokens_B = count_B if self.tokens_B is None else self.tokens_B + count_B


class PrefillStatistics(Prefill):
    """Sums over the tokens that the full model read so far."""

    def __init__(self, layout: UnitLayout) -> None:
        super().__init__()
        self.layout = layout
        self._last_BD: Tensor | None = None
        self._sums: dict[tuple[int, Kind], Tensor] = {}
        self._squares: dict[tuple[int, Kind], Tensor] = {}

    @contextmanager
    def observe(self, blocks: nn.ModuleList, real_BT: Tensor) -> Iterator[None]:
        """Add the dense forwards inside; `real_BT` is true for tokens that are not padding."""
        handles = [
            block.get_submodule(self.layout.units[kind].consumer).register_forward_pre_hook(
                lambda _, args, key=(index, kind): self._add(key, args[0], real_BT)
            )
            for index, block in enumerate(blocks)
            for kind in KINDS
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, key: tuple[int, Kind], x: Tensor, real_BT: Tensor) -> None:
        x_BTC = x.detach().reshape(*real_BT.shape, -1).float()
        real_B1T = real_BT.to(x_BTC)[:, None]
        sum_BC, square_BC = (real_B1T @ x_BTC)[:, 0], (real_B1T @ x_BTC.square())[:, 0]
        square_BG = square_BC.view(len(x_BTC), self.layout.count(key[1]), -1).mean(2)
        started = key in self._sums
        self._sums[key] = self._sums[key] + sum_BC if started else sum_BC
        self._squares[key] = self._squares[key] + square_BG if started else square_BG
        if key == (0, "heads"):
            count_B = real_BT.sum(1)
            at_B = (real_BT.cumsum(1) * real_BT).argmax(1)  # of the last real token
            last_BD = x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), at_B]
            none_B1 = (count_B == 0)[:, None]
            self._last_BD = last_BD if self._last_BD is None else torch.where(none_B1, self._last_BD, last_BD)
            self._count(real_BT)

    @property
    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of `Predictor.scores`: last [B, D], mean [B, D] and prompt [B, U]."""
        assert self._last_BD is not None and self.tokens_B is not None, "no forward was observed"
        count_B1 = self.tokens_B[:, None]
        blocks = range(self.layout.blocks)
        rms = [torch.stack([(self._squares[i, kind] / count_B1).sqrt() for i in blocks], dim=1) for kind in KINDS]
        return self._last_BD, self.mean((0, "heads")), self.layout.join(*rms)

    def mean(self, key: tuple[int, Kind]) -> Tensor:
        """Return the mean input [B, C] of the matrix that consumes a kind of unit in a block."""
        assert self.tokens_B is not None, "no forward was observed"
        return self._sums[key] / self.tokens_B[:, None]


def real_tokens(kwargs: dict[str, Any], ids_BT: Tensor) -> Tensor | None:
    """Return which of these tokens are not padding [B, T]; None if the mask is not of two dimensions."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids_BT, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask[:, -ids_BT.shape[1] :].to(torch.bool)
