"""Learned forms of a matrix of codes: a linear layer whose stored columns are parts that learn.

Columns on a grid (`LearnedGrid`) have a latent number per code. The forward rounds it to the nearest legal code, and
the gradient passes the rounding unchanged (straight-through). Scales and offsets are learned beside it. Zero points are
rounded like codes.

Columns that a trellis codes (`LearnedTrellis`) have a latent level per code. Neighboring rows share the bits of a path,
so that no weight can reach another code alone. So the paths nearest to the latent levels are searched now and then
(`search`), and the gradient passes the search unchanged. The paths stay as they are where a code stands for a pruned
weight, and in the other modes. Then the levels are learned instead, rounded to whole numbers. Not both: paths would
follow the latent numbers back from wherever the levels went.

Scales are rounded to float16 in the forward, as the file stores them.

    new = CodesLinear(packed, mode="weights", rank=16, generator=generator, frozen=False)
    new.learned()   # parameters with the size of their step
    new.packed()    # the record, in the form that the file had

Legend: O outputs, I inputs, C columns of a part, G groups of columns that share a scale, U rows of whole rings,
S states, R rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from niwaki.errors import NumericalError
from niwaki.formats.packed import PackedTensors
from niwaki.formats.quantized import SCALE_DTYPE, QuantizedColumns, centre, part_columns, read_parts, widen
from niwaki.formats.sparse import CODES, Sparse
from niwaki.formats.sparse_tiles import LAYOUT, Tiled
from niwaki.formats.trellis import MAX_LEVEL, TrellisColumns, read_trellis
from niwaki.kernels.trellis import encode
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear
from niwaki.runtime.trellis_linear import TrellisLinear

Mode = Literal["weights", "low-rank", "scales"]
MODES: tuple[Mode, ...] = ("weights", "low-rank", "scales")
StoredLinear = PackedLinear | SparseLinear | TrellisLinear
StoredColumns = QuantizedColumns | TrellisColumns
MARGIN = 0.49  # of a step that a latent number may lie outside the codes
LOW_RANK_SPEED = 4.0  # of the steps of thin matrices, which move fewer numbers
LATENT_SPEED = 4.0  # of the steps of latent numbers, which change a weight only when they reach another code
PATH_SPEED = 4.0  # of the steps of latent levels, relative to the distance between levels: a path has inertia


@dataclass(frozen=True)
class Learned:
    """A parameter, the size of its weights that steps are relative to, and the weights that it may change."""

    parameter: nn.Parameter
    size: float
    keep: Tensor | None = None


class LowRank(nn.Module):
    """Sum of a frozen weight [..., O, I] and B·A · size, where the weight is not zero."""

    def __init__(self, weight: Tensor, rank: int, size: float, generator: torch.Generator, masked: bool) -> None:
        super().__init__()
        rank = min(rank, *weight.shape[-2:])
        shape_A, shape_B = (*weight.shape[:-2], rank, weight.shape[-1]), (*weight.shape[:-1], rank)
        start = torch.randn(shape_A, generator=generator) / rank**0.5
        self.A = nn.Parameter(start.to(weight.device))
        self.B = nn.Parameter(torch.zeros(shape_B, device=weight.device))
        self.size, self.masked = size, masked

    def forward(self, weight: Tensor) -> Tensor:
        """Add the product."""
        change = (self.B.to(weight.dtype) @ self.A.to(weight.dtype)) * self.size
        merged: Tensor = weight + (change * (weight != 0) if self.masked else change)
        return merged


class _Decode(torch.autograd.Function):
    """Weights [O, C] of latent numbers: nearest code · scale + offset. The gradient passes the rounding unchanged."""

    @staticmethod
    def forward(
        ctx: Any, latent_OC: Tensor, scale_OG: Tensor, offset_OG: Tensor, group: int, limits: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        code_OC = latent_OC.round().clamp(*limits)
        columns = latent_OC.shape[1]
        ctx.save_for_backward(code_OC.to(torch.int16 if limits[1] > 127 else torch.int8), scale_OG)
        ctx.group = min(group, columns)
        return (code_OC * widen(scale_OG, group, columns) + widen(offset_OG, group, columns)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        code_OC, scale_OG = ctx.saved_tensors
        (grad_OC,) = gradients
        grad_OC = grad_OC.float()
        columns = grad_OC.shape[1]
        latent_OC = grad_OC * widen(scale_OG, ctx.group, columns) if ctx.needs_input_grad[0] else None
        return latent_OC, _grouped(grad_OC * code_OC, ctx.group), _grouped(grad_OC, ctx.group), None, None, None


def _grouped(values_OC: Tensor, group: int) -> Tensor:
    """Return the sums over groups of columns [O, G]; the last group may be shorter."""
    sums_OG: Tensor = pad(values_OC, (0, -values_OC.shape[1] % group)).unflatten(1, (-1, group)).sum(-1)
    return sums_OG


def rounded(values: Tensor, nearest: Tensor) -> Tensor:
    """Return `nearest` with the gradient of `values`."""
    return values + (nearest - values).detach()


class _DecodePaths(torch.autograd.Function):
    """Weights [O, C] of states: level · scale of the row. Latent levels [O, C], levels and scales have gradients."""

    @staticmethod
    def forward(
        ctx: Any, _latent_OC: Tensor | None, state_OC: Tensor, level_S: Tensor, scale_O: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(state_OC, level_S, scale_O)
        return (level_S[state_OC.int()] * scale_O[:, None]).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        state_OC, level_S, scale_O = ctx.saved_tensors
        grad_OC, index_OC = gradients[0].to(scale_O.dtype), state_OC.int()
        by_level_OC, by_level_S = grad_OC * scale_O[:, None], None
        if ctx.needs_input_grad[2]:
            by_level_S = torch.zeros_like(level_S).index_add_(0, index_OC.flatten(), by_level_OC.flatten())
        by_latent_OC = by_level_OC if ctx.needs_input_grad[0] else None
        return by_latent_OC, None, by_level_S, (grad_OC * level_S[index_OC]).sum(1), None


class LearnedPart(nn.Module, ABC):
    """Columns of one width: codes as they are, and what is learned of them."""

    columns_C: Tensor

    @abstractmethod
    def learned(self) -> Iterator[Learned]:
        """Yield what is learned."""

    @abstractmethod
    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [O, C]."""

    @abstractmethod
    def clamp(self) -> None:
        """Keep what is rounded near its legal values."""

    def search(self) -> None:
        """Search the codes nearest to latent weights, if they do not follow from them in every forward."""

    @abstractmethod
    def columns(self) -> StoredColumns:
        """Return the columns as they are stored, on the CPU. Raises NumericalError for scales that are not finite."""


class LearnedGrid(LearnedPart):
    """Columns on a grid, with a latent number per code."""

    code_OC: Tensor

    def __init__(self, part: QuantizedColumns, mode: Mode, rank: int, generator: torch.Generator, frozen: bool) -> None:
        super().__init__()
        self.bits, self.grid, self.group = part.bits, part.grid, part.group
        self.register_buffer("code_OC", part.code_OC.to(torch.uint8).contiguous())
        self.register_buffer("columns_C", part.columns_C)
        self.limits = (0, 2**part.bits - 1)
        self.scale_OG = nn.Parameter(part.scale_OG.float().contiguous().clone())
        self.offset_OG = None if part.offset_OG is None else nn.Parameter(part.offset_OG.float().contiguous().clone())
        self.zero_OG = None if part.zero_OG is None else nn.Parameter(part.zero_OG.float().contiguous().clone())
        weight_OC = part.decode()
        self.keep_OC = weight_OC != 0 if frozen else None
        if self.zero_OG is not None and frozen:
            self.zero_OG.requires_grad_(False)  # a code that stands for zero must go on to do so
        self.size = float(weight_OC.square().mean().sqrt())
        self.step = max(float(self.scale_OG.detach().square().mean().sqrt()), 1e-12)
        self.latent_OC = nn.Parameter(part.code_OC.float().clone()) if mode == "weights" else None
        self.low_rank = (
            LowRank(weight_OC, rank, self.size / self.step, generator, masked=False) if mode == "low-rank" else None
        )

    def learned(self) -> Iterator[Learned]:
        """Yield what is learned."""
        relative = self.size / self.step
        if self.latent_OC is not None:
            yield Learned(self.latent_OC, LATENT_SPEED * relative, self.keep_OC)
        if self.low_rank is not None:
            yield Learned(self.low_rank.A, LOW_RANK_SPEED)
            yield Learned(self.low_rank.B, LOW_RANK_SPEED)
        yield Learned(self.scale_OG, self.step)
        if self.offset_OG is not None:
            yield Learned(self.offset_OG, self.step)
        if self.zero_OG is not None and self.zero_OG.requires_grad:
            yield Learned(self.zero_OG, relative)

    def latent(self) -> Tensor:
        """Return the number of every code before it is rounded."""
        if self.latent_OC is not None:
            return self.latent_OC
        code_OC = self.code_OC.float()
        if self.low_rank is None:
            return code_OC
        moved_OC: Tensor = self.low_rank(code_OC)
        return moved_OC if self.keep_OC is None else torch.where(self.keep_OC, moved_OC, code_OC)

    def zero(self) -> Tensor | None:
        """Return the zero points, rounded to legal codes."""
        if self.zero_OG is None:
            return None
        return rounded(self.zero_OG, self.zero_OG.round().clamp(*self.limits))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [O, C]."""
        scale_OG, zero_OG = as_half(self.scale_OG), self.zero()
        if self.offset_OG is not None:
            offset_OG = as_half(self.offset_OG)
        else:
            offset_OG = -(zero_OG if zero_OG is not None else centre(self.bits, self.grid)) * scale_OG
        weight_OC: Tensor = _Decode.apply(self.latent(), scale_OG, offset_OG, self.group, self.limits, dtype)
        return weight_OC

    def clamp(self) -> None:
        """Keep latent numbers and zero points near the codes."""
        low, high = self.limits
        for values in (self.latent_OC, self.zero_OG):
            if values is not None:
                values.clamp_(low - MARGIN, high + MARGIN)

    @torch.no_grad()
    def columns(self) -> QuantizedColumns:
        """Return the columns as they are stored, on the CPU. Raises NumericalError for scales that are not finite."""
        offset_OG, zero_OG = self.offset_OG, self.zero()
        _check_scales(self.scale_OG, *([] if offset_OG is None else [offset_OG]))
        return QuantizedColumns(
            self.columns_C.cpu(), self.bits, self.grid, self.group,
            self.latent().round().clamp(*self.limits).to(torch.uint8).cpu(), self.scale_OG.to(SCALE_DTYPE).cpu(),
            None if offset_OG is None else offset_OG.to(SCALE_DTYPE).cpu(),
            None if zero_OG is None else zero_OG.to(torch.uint8).cpu(),
        )  # fmt: skip


class LearnedTrellis(LearnedPart):
    """Columns that a trellis codes: scales are learned, and latent levels that the paths follow, or the levels."""

    state_UC: Tensor

    def __init__(self, part: TrellisColumns, mode: Mode, frozen: bool) -> None:
        super().__init__()
        self.bits = part.bits
        self.register_buffer("state_UC", part.state_UC.contiguous())
        self.register_buffer("columns_C", part.columns_C)
        level_S = part.level_S.float()
        self.level_S = nn.Parameter(level_S.clone())
        self.scale_O = nn.Parameter(part.scale_O.float().contiguous().clone())
        self.keep_S = level_S != 0 if frozen else None
        self.sizes = [max(float(values.square().mean().sqrt()), 1e-12) for values in (level_S, self.scale_O.detach())]
        self.latent_OC: nn.Parameter | None = None
        if mode == "weights" and not frozen:
            self.latent_OC = nn.Parameter(level_S[part.state_UC[: len(part.scale_O)].int()].contiguous())
            self.level_S.requires_grad_(False)

    def learned(self) -> Iterator[Learned]:
        """Yield what is learned."""
        if self.latent_OC is None:
            yield Learned(self.level_S, self.sizes[0], self.keep_S)
        else:
            distance = 2.0 ** (2 - self.bits) * max(float(self.latent_OC.detach().square().mean().sqrt()), 1e-12)
            yield Learned(self.latent_OC, PATH_SPEED * distance)
        yield Learned(self.scale_O, self.sizes[1])

    def levels(self) -> Tensor:
        """Return the levels as whole numbers."""
        return rounded(self.level_S, self.level_S.round().clamp(-MAX_LEVEL, MAX_LEVEL))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [O, C]."""
        state_OC = self.state_UC[: len(self.scale_O)]
        weight_OC: Tensor = _DecodePaths.apply(self.latent_OC, state_OC, self.levels(), as_half(self.scale_O), dtype)
        return weight_OC

    @torch.no_grad()
    def search(self) -> None:
        """Search the path nearest to the latent levels; a row counts by its squared scale."""
        if self.latent_OC is not None:
            row_O = as_half(self.scale_O).square()
            self.state_UC.copy_(encode(self.latent_OC, row_O, self.levels(), self.bits))

    def clamp(self) -> None:
        """Keep levels near the whole numbers that can be stored."""
        self.level_S.clamp_(-MAX_LEVEL - MARGIN, MAX_LEVEL + MARGIN)

    @torch.no_grad()
    def columns(self) -> TrellisColumns:
        """Return the columns as they are stored, on the CPU. Raises NumericalError for scales that are not finite."""
        _check_scales(self.level_S, self.scale_O)
        level_S, scale_O = self.levels().to(torch.int8).cpu(), self.scale_O.to(SCALE_DTYPE).cpu()
        return TrellisColumns(self.columns_C.cpu(), self.bits, self.state_UC.cpu(), level_S, scale_O)


def learned_part(part: StoredColumns, mode: Mode, rank: int, generator: torch.Generator, frozen: bool) -> LearnedPart:
    """Return the learned form of stored columns. `frozen`: a code of zero stays one."""
    if isinstance(part, TrellisColumns):
        return LearnedTrellis(part, mode, frozen)
    return LearnedGrid(part, mode, rank, generator, frozen)


def _check_scales(*scales: Tensor) -> None:
    """Raise NumericalError for scales that cannot be stored."""
    if not all(bool(values.to(SCALE_DTYPE).isfinite().all()) for values in scales):
        raise NumericalError("a scale is not finite after training: lower the rate")


def as_half(values: Tensor) -> Tensor:
    """Return the numbers as float16 has them."""
    return rounded(values, values.to(SCALE_DTYPE).float())


class CodesLinear(nn.Module):
    """Product y = x Wᵀ + b with a matrix of codes, which is learned."""

    order_I: Tensor | None

    def __init__(self, packed: StoredLinear, mode: Mode, rank: int, generator: torch.Generator, frozen: bool) -> None:
        super().__init__()
        self.rows, self.inputs = packed.out_features, packed.in_features
        self.layout = packed.described["sparse"]["layout"] if isinstance(packed, SparseLinear) else ""
        parts = _columns_of(packed)
        self.parts = nn.ModuleList(
            learned_part(part, mode, rank, generator, frozen or bool(self.layout)) for part in parts
        )
        self.bias = packed.bias
        order_I = torch.cat([part.columns_C for part in parts]).argsort()
        self.register_buffer("order_I", order_I if len(parts) > 1 else None)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix."""
        found = [part.weight(dtype) for part in self.parts]  # type: ignore[operator]
        return found[0] if self.order_I is None else torch.cat(found, dim=1).index_select(1, self.order_I)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., I] → [..., O]."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(dtype)
        return linear(x, self.weight_OI(dtype), None if self.bias is None else self.bias.to(x.dtype))

    def learned(self) -> Iterator[Learned]:
        """Yield what is learned, without the bias."""
        for part in self.parts:
            yield from part.learned()  # type: ignore[operator]

    def clamp(self) -> None:
        """Keep what is rounded near its legal values."""
        for part in self.parts:
            part.clamp()  # type: ignore[operator]

    def search(self) -> None:
        """Search codes that do not follow from latent weights in every forward."""
        for part in self.parts:
            part.search()  # type: ignore[operator]

    def packed(self) -> PackedTensors:
        """Return the record in the form that the file had."""
        parts: list[Any] = [part.columns() for part in self.parts]  # type: ignore[operator]
        if not self.layout:
            store = PackedTensors.of_trellis if isinstance(parts[0], TrellisColumns) else PackedTensors.of_codes
            return store(parts, (self.rows, self.inputs))
        tiled = self.layout == LAYOUT
        record = Sparse.encode_codes(parts[0], layout="two_four" if tiled else self.layout)
        assert record is not None, "codes that were stored so can be stored so again"
        whole = Tiled.encode(record) if tiled else record
        assert whole is not None, "shapes do not change"
        return PackedTensors.of_nonzeros(whole)


def _columns_of(packed: StoredLinear) -> Sequence[StoredColumns]:
    """Return the quantized columns of a packed module; those of nonzeros have the middle code for a zero."""
    if isinstance(packed, TrellisLinear):
        return read_trellis(packed.stored(), packed.described, packed.in_features)
    if isinstance(packed, PackedLinear):
        parts = read_parts(packed.stored(), packed.described, packed.in_features)
        columns = part_columns(packed.stored(), packed.described, packed.in_features)
        assert all(torch.equal(part.columns_C, own) for part, own in zip(parts, columns, strict=True))
        return parts
    record, stored = packed.record(), packed.described["sparse"]
    bits = CODES[stored["values"]]
    weight_OI = record.decode()
    scale_OG = record.scale_GO.view(SCALE_DTYPE).T if isinstance(record, Tiled) else record.scale_OG
    assert scale_OG is not None, "codes have scales"
    scale_OG = scale_OG.view(SCALE_DTYPE)[: packed.out_features].contiguous()
    wide_OI = widen(scale_OG.float(), stored["group"], packed.in_features)
    code_OI = (weight_OI / torch.where(wide_OI == 0, 1.0, wide_OI)).round() + centre(bits, "symmetric")
    every_I = torch.arange(packed.in_features, device=weight_OI.device)
    return [QuantizedColumns(every_I, bits, "symmetric", stored["group"], code_OI, scale_OG)]
