"""Trained forms of compressed matrices: what of each is learned, and how it goes back to its stored form.

A pruned matrix keeps its zeros, because their gradient is zero. So 2:4 stays 2:4. A smaller matrix is learned as it is.
A matrix of codes has a latent number per code. The forward rounds it to the nearest legal code, and the gradient passes
the rounding unchanged (straight-through). Scales and offsets are learned beside it. Zero points are rounded like codes.
Scales are rounded to float16 in the forward, as the file stores them.

The mode `weights` learns a number per weight. `low-rank` learns a product of two thin matrices per matrix. It
is added to the weights or to the latent numbers, and merges in the end. `scales` learns only scales, offsets and zero
points. Norms and biases are learned in all modes.

    trained = prepare(model, skeleton, mode="weights", rank=16, seed=0, pruned=True)
    trained.groups      # parameters with the size of their step
    trained.plain()     # new weights by parameter

Legend: O outputs, I inputs, C columns of a part, G groups of columns that share a scale, E experts, R rank.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.nn.utils import parametrize

from niwaki.errors import ArchitectureError, NumericalError
from niwaki.formats.packed import PackedTensors
from niwaki.formats.quantized import SCALE_DTYPE, QuantizedColumns, centre, part_columns, read_parts, widen
from niwaki.formats.sparse import CODES, VALUES, Sparse
from niwaki.formats.sparse_tiles import LAYOUT, Tiled
from niwaki.model.decoder import Decoder
from niwaki.runtime.linear import PackedLinear, ReadableLinear
from niwaki.runtime.sparse_linear import SparseLinear

Mode = Literal["weights", "low-rank", "scales"]
MODES: tuple[Mode, ...] = ("weights", "low-rank", "scales")
MARGIN = 0.49  # of a step that a latent number may lie outside the codes
LOW_RANK_SPEED = 4.0  # of the steps of thin matrices, which move fewer numbers
LATENT_SPEED = 4.0  # of the steps of latent numbers, which change a weight only when they reach another code
NORM = "norm"


@dataclass(frozen=True)
class Learned:
    """A parameter, the size of its weights that steps are relative to, and the weights that it may change."""

    parameter: nn.Parameter
    size: float
    keep: Tensor | None = None


@dataclass
class Trained:
    """Learned parts of a model: parameters, plain weights by name, and packed modules by name."""

    learned: list[Learned] = field(default_factory=list)
    weights: dict[str, "_Plain"] = field(default_factory=dict)
    modules: dict[str, "CodesLinear | _Nonzeros"] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters."""
        return [one.parameter for one in self.learned]

    @property
    def groups(self) -> dict[float, list[nn.Parameter]]:
        """Return the parameters by the size of their step: a power of two near the size of the weights."""
        found: dict[float, list[nn.Parameter]] = {}
        for one in self.learned:
            found.setdefault(2.0 ** round(math.log2(max(one.size, 1e-6))), []).append(one.parameter)
        return found

    def mask_gradients(self) -> None:
        """Set the gradient of pruned weights to zero."""
        for one in self.learned:
            if one.keep is not None and one.parameter.grad is not None:
                one.parameter.grad.mul_(one.keep)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep latent numbers at the codes."""
        for module in self.modules.values():
            if isinstance(module, CodesLinear):
                module.clamp()

    @torch.no_grad()
    def settle(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Merge thin matrices, and round all plain weights as the file stores them."""
        nonzeros = [
            (one.plain, VALUES[one.about["values"]]) for one in self.modules.values() if isinstance(one, _Nonzeros)
        ]
        for one, dtype in [*((one, dtypes[name]) for name, one in self.weights.items()), *nonzeros]:
            weight = one.weight().to(dtype)
            if parametrize.is_parametrized(one.module, one.name):
                parametrize.remove_parametrizations(one.module, one.name, leave_parametrized=False)
            one.module.get_parameter(one.name).copy_(weight)

    def plain(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Return the new weights by parameter in the dtype of the file, on the CPU. Raises NumericalError."""
        found = {}
        for name, one in self.weights.items():
            weight = one.weight().detach().to(dtypes[name]).cpu()
            if not weight.isfinite().all():
                raise NumericalError(f"{name} is not finite after training: lower the rate")
            if one.keep is not None and bool(weight[~one.keep.cpu()].any()):
                raise NumericalError(f"{name}: training would change which weights are zero")
            found[name] = weight
        return found

    def packed(self) -> dict[str, PackedTensors]:
        """Return the new records of packed modules by name, on the CPU."""
        return {name: module.packed() for name, module in self.modules.items()}


@dataclass(frozen=True)
class _Plain:
    """A weight of the model that is learned: where it is, and which of its numbers are not zero."""

    module: nn.Module
    name: str
    keep: Tensor | None = None

    def weight(self) -> Tensor:
        """Return the weight, with what was learned in it."""
        weight: Tensor = getattr(self.module, self.name)
        return weight


@dataclass(frozen=True)
class _Nonzeros:
    """A matrix that the file stores as nonzeros, learned as a plain one."""

    plain: _Plain
    about: Mapping[str, Any]

    def packed(self) -> PackedTensors:
        """Return the nonzeros in the layout that they had. Weights that became zero take no room in a bitmap."""
        weight_OI, stored = self.plain.weight().detach(), self.about
        if self.plain.keep is not None:
            weight_OI = weight_OI * self.plain.keep
        record = Sparse.encode(weight_OI, VALUES[stored["values"]], stored["layout"])
        return PackedTensors.of_nonzeros(record)


class _LowRank(nn.Module):
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


class _Part(nn.Module):
    """Columns of one width: codes as they are, and what is learned of them."""

    code_OC: Tensor
    columns_C: Tensor

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
            _LowRank(weight_OC, rank, self.size / self.step, generator, masked=False) if mode == "low-rank" else None
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
        scale_OG, zero_OG = _as_half(self.scale_OG), self.zero()
        if self.offset_OG is not None:
            offset_OG = _as_half(self.offset_OG)
        else:
            offset_OG = -(zero_OG if zero_OG is not None else centre(self.bits, self.grid)) * scale_OG
        weight_OC: Tensor = _Decode.apply(self.latent(), scale_OG, offset_OG, self.group, self.limits, dtype)
        return weight_OC

    @torch.no_grad()
    def columns(self) -> QuantizedColumns:
        """Return the columns as they are stored, on the CPU. Raises NumericalError for scales that are not finite."""
        offset_OG, zero_OG = self.offset_OG, self.zero()
        for values in (self.scale_OG, *([] if offset_OG is None else [offset_OG])):
            if not values.to(SCALE_DTYPE).isfinite().all():
                raise NumericalError("a scale is not finite after training: lower the rate")
        return QuantizedColumns(
            self.columns_C.cpu(), self.bits, self.grid, self.group,
            self.latent().round().clamp(*self.limits).to(torch.uint8).cpu(), self.scale_OG.to(SCALE_DTYPE).cpu(),
            None if offset_OG is None else offset_OG.to(SCALE_DTYPE).cpu(),
            None if zero_OG is None else zero_OG.to(torch.uint8).cpu(),
        )  # fmt: skip


def _as_half(values: Tensor) -> Tensor:
    """Return the numbers as float16 has them."""
    return rounded(values, values.to(SCALE_DTYPE).float())


class CodesLinear(nn.Module):
    """Product y = x Wᵀ + b with a matrix of codes, which is learned."""

    order_I: Tensor | None

    def __init__(
        self, packed: PackedLinear | SparseLinear, mode: Mode, rank: int, generator: torch.Generator, frozen: bool
    ) -> None:
        super().__init__()
        self.rows, self.inputs = packed.out_features, packed.in_features
        self.layout = packed.described["sparse"]["layout"] if isinstance(packed, SparseLinear) else ""
        parts = _columns_of(packed)
        self.parts = nn.ModuleList(_Part(part, mode, rank, generator, frozen or bool(self.layout)) for part in parts)
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
        """Keep latent numbers and zero points near the codes."""
        for part in self.parts:
            for values in (part.latent_OC, part.zero_OG):
                if isinstance(values, Tensor):
                    low, high = part.limits  # type: ignore[misc]
                    values.clamp_(low - MARGIN, high + MARGIN)

    def packed(self) -> PackedTensors:
        """Return the record in the form that the file had."""
        parts: Sequence[QuantizedColumns] = [part.columns() for part in self.parts]  # type: ignore[operator]
        if not self.layout:
            return PackedTensors.of_codes(parts, (self.rows, self.inputs))
        tiled = self.layout == LAYOUT
        record = Sparse.encode_codes(parts[0], layout="two_four" if tiled else self.layout)
        assert record is not None, "codes that were stored so can be stored so again"
        whole = Tiled.encode(record) if tiled else record
        assert whole is not None, "shapes do not change"
        return PackedTensors.of_nonzeros(whole)


def _columns_of(packed: PackedLinear | SparseLinear) -> Sequence[QuantizedColumns]:
    """Return the quantized columns of a packed module; those of nonzeros have the middle code for a zero."""
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


def prepare(model: Any, skeleton: Decoder, *, mode: Mode, rank: int, seed: int, pruned: bool) -> Trained:
    """Freeze a model, replace its packed modules, and return what is learned. `pruned`: a code of zero stays one."""
    model.requires_grad_(False)
    generator, trained = torch.Generator().manual_seed(seed), Trained()
    anatomy = skeleton.anatomy
    names = {
        anatomy.prefix(index) + linear.parameter
        for index, block in enumerate(anatomy.blocks)
        for linear in block.linears.values()
    }
    for name, module in list(model.named_modules()):
        if isinstance(module, ReadableLinear):
            _replace_packed(model, name, module, f"{name}.weight" in names, (mode, rank, generator, pruned), trained)
    for name in sorted(names & {name for name, _ in model.named_parameters()}):
        place, _, leaf = name.rpartition(".")
        if place not in trained.modules:
            _learn_plain(model.get_submodule(place), leaf, name, mode, rank, generator, trained)
    _learn_vectors(model, skeleton, names, trained)
    if not trained.learned:
        raise ArchitectureError("nothing in this model can be learned")
    return trained


def _replace_packed(
    model: Any, name: str, module: ReadableLinear, learn: bool, how: tuple[Mode, int, torch.Generator, bool],
    trained: Trained,
) -> None:  # fmt: skip
    """Replace a packed module by one that autograd passes."""
    mode, rank, generator, pruned = how
    stored: Mapping[str, Any] = module.described["sparse"] if isinstance(module, SparseLinear) else {}
    codes = not stored or stored["values"] in CODES
    new: nn.Module
    if learn and codes:
        assert isinstance(module, PackedLinear | SparseLinear)
        new = CodesLinear(module, mode, rank, generator, pruned)
        trained.modules[name] = new
        trained.learned += new.learned()
    else:
        weight_OI = module.weight
        with torch.device("meta"):
            new = nn.Linear(module.in_features, module.out_features, bias=False)
        new.weight = nn.Parameter(weight_OI, requires_grad=False)
        new.bias = module.bias  # type: ignore[assignment]
        if learn:
            one = _learn_plain(new, "weight", "", mode, rank, generator, trained)
            trained.modules[name] = _Nonzeros(one, stored)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def _learn_plain(
    module: nn.Module, leaf: str, name: str, mode: Mode, rank: int, generator: torch.Generator, trained: Trained
) -> _Plain:
    """Learn a weight of a module in place, with its zeros kept. Mode `scales` leaves it as it is."""
    parameter = module.get_parameter(leaf)
    zeros = parameter == 0
    keep = ~zeros if bool(zeros.any()) else None
    size = float(parameter.detach().float().norm()) / max(1, int((~zeros).sum())) ** 0.5
    one = _Plain(module, leaf, keep)
    if mode == "weights":
        learned = nn.Parameter(parameter.detach().float())
        module._parameters[leaf] = learned
        trained.learned.append(Learned(learned, size, keep))
    elif mode == "low-rank":
        added = _LowRank(parameter, rank, size, generator, masked=keep is not None)
        parametrize.register_parametrization(module, leaf, added, unsafe=True)
        trained.learned += [Learned(added.A, LOW_RANK_SPEED), Learned(added.B, LOW_RANK_SPEED)]
    if name and mode != "scales":
        trained.weights[name] = one
    return one


def _learn_vectors(model: Any, skeleton: Decoder, names: set[str], trained: Trained) -> None:
    """Learn norms of the decoder and biases of its matrices."""
    biases = {name.removesuffix("weight") + "bias" for name in names}
    idle = tuple(f"{name}." for name in skeleton.anatomy.idle)
    for name, parameter in list(model.named_parameters()):
        place, _, leaf = name.rpartition(".")
        module = model.get_submodule(place)
        norm = NORM in type(module).__name__.lower() and parameter.dim() == 1
        if (name in biases or norm) and not name.startswith(idle) and name not in trained.weights:
            learned = nn.Parameter(parameter.detach().float())
            module._parameters[leaf] = learned
            size = float(learned.detach().square().mean().sqrt())
            trained.learned.append(Learned(learned, size or 1e-2))
            trained.weights[name] = _Plain(module, leaf)
