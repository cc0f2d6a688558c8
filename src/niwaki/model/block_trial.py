"""Trial runs of one block without its weights: does a smaller block compute what the full one with zeros does?

A skeleton on the meta device says which tensors a block has, and not what it does with them. Here the block runs on a
few random hidden states with random weights. Entry [o, i] of a random matrix is element o + i of a short random row
(a Hankel matrix). So a matrix of any size takes almost no memory, and its products are correlations, which a Fourier
transform makes without the matrix. A block of 70B takes as long as a small one.

    full = TrialModel.of(config)
    weights = full.random_weights()
    out_BTD = full.run(0, weights)
"""

import copy
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from niwaki.model.anatomy import find_blocks, run_stubbed
from niwaki.model.block_calls import Call
from niwaki.model.hf import Shapes, build_skeleton, materialize_buffers, resize

SAME = 1e-8  # relative squared error of two orders of the same float32 sums


@dataclass(frozen=True)
class TrialModel:
    """A skeleton in float32 with the call arguments of each of its blocks for one short input."""

    skeleton: Any
    path: str
    blocks: nn.ModuleList
    calls: list[Call]
    shape: torch.Size

    @classmethod
    def of(cls, config: Any, tuple_size: int | None, shapes: Shapes | None = None) -> "TrialModel":
        """Build the model of a config; matrices named in `shapes` get a shape of their own.

        `tuple_size` is that of the output of a block. Raises an InputError for a model that cannot be built or run.
        """
        skeleton = build_skeleton(config, torch.float32)
        if shapes:
            resize(skeleton, shapes)
        path, blocks = find_blocks(skeleton)
        calls: list[Call] = []
        shapes_met: list[torch.Size] = []

        def record(index: int, call: Call, hidden_BTD: Tensor) -> Any:
            calls.append(call)
            shapes_met.append(hidden_BTD.shape)
            return hidden_BTD if tuple_size is None else (hidden_BTD, *[None] * (tuple_size - 1))

        run_stubbed(skeleton, path, blocks, record)
        return cls(skeleton, path, blocks, calls, shapes_met[0])

    def parameters(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a block on the meta device."""
        return dict(self.blocks[index].named_parameters())

    def random_weights(self) -> dict[str, Tensor]:
        """Return random values of all parameters of the first block: near 1 for vectors, small for matrices."""
        return {name: _random(name, p.shape) for name, p in self.parameters(0).items()}

    def run(
        self, index: int, weights: Mapping[str, Tensor], zeros: Mapping[str, tuple[bool, int]] | None = None
    ) -> Tensor:
        """Return the output [1, T, D] of a block with these weights for one fixed random input.

        `zeros`: matrices by name whose first inputs (True) or outputs (False) count as zero, and how many.
        """
        masks = {weights[name].data_ptr(): mask for name, mask in (zeros or {}).items()}
        module = copy.deepcopy(self.blocks[index])
        vars(module).pop("forward", None)
        materialize_buffers(self.skeleton, module, "cpu")
        for name, weight in weights.items():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
        with torch.no_grad(), _HankelProducts(masks):
            return self.calls[index](module, self.input())

    def input(self) -> Tensor:
        """Return the hidden states [1, T, D] that every block runs on."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.shape, generator=generator)


class _HankelProducts(TorchFunctionMode):
    """Function mode that multiplies with Hankel matrices by Fourier transforms.

    `masks`: address of a matrix → whether its first inputs or its first outputs count as zero, and how many.
    """

    def __init__(self, masks: Mapping[int, tuple[bool, int]]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x, weight, bias, inputs = None, None, None, 0
        if func is torch.nn.functional.linear:
            x, weight, inputs = args[0], args[1] if len(args) > 1 else kwargs["weight"], 1
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
        elif func is torch.addmm and len(args) == 3:
            bias, x, weight = args
        elif func in _PRODUCTS and len(args) == 2:
            x, weight = args
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.stride() != (1, 1) or x is None:
            return func(*args, **kwargs)
        out = self._product(x, weight, weight.shape[inputs])
        return out if bias is None else out + bias

    def _product(self, x: Tensor, weight: Tensor, inputs: int) -> Tensor:
        reads, count = self.masks.get(weight.data_ptr(), (True, 0))
        if reads and count:
            x = torch.cat([torch.zeros_like(x[..., :count]), x[..., count:]], dim=-1)
        row = weight.as_strided((sum(weight.shape) - 1,), (1,))
        size = 1 << (len(row) - 1).bit_length()
        spectrum = torch.fft.rfft(row.double(), size) * torch.fft.rfft(x.double(), size).conj()
        out: Tensor = torch.fft.irfft(spectrum, size)[..., : sum(weight.shape) - inputs].to(x.dtype)
        if not reads:
            out[..., :count] = 0
        return out


_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm}


def same(found: Tensor, wanted: Tensor) -> bool:
    """Return whether two outputs differ by no more than the order of their sums."""
    if found.shape != wanted.shape or not bool(found.isfinite().all() and wanted.isfinite().all()):
        return False
    error = (found - wanted).double().square().sum() / wanted.double().square().sum()
    return bool(error <= SAME)


def differing_attribute(before: nn.Module, after: nn.Module, index: int, other: int) -> str | None:
    """Return the name of a plain attribute in which two blocks differ, beside their own numbers; None without one."""
    parts = dict(after.named_modules())
    for name, part in before.named_modules():
        if name not in parts or type(parts[name]) is not type(part):
            return name or type(part).__name__
        twin = vars(parts[name])
        for attribute, value in vars(part).items():
            if not isinstance(value, bool | int | float | str | tuple) or isinstance(value, torch.Size):
                continue
            own = twin.get(attribute)
            if own != value and (value, own) != (index, other):
                return f"{name}.{attribute}".lstrip(".")
    return None


def differing_argument(before: Call, after: Call) -> str | None:
    """Return the name of a call argument in which two blocks differ, or None."""
    ours = dict(enumerate(before.args)) | before.kwargs
    theirs = dict(enumerate(after.args)) | after.kwargs
    if set(ours) != set(theirs):
        return str(next(iter(set(ours) ^ set(theirs))))
    return next((str(name) for name, value in ours.items() if not _equal(value, theirs[name])), None)


def _equal(first: Any, other: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(other, Tensor) and first.shape == other.shape and torch.equal(first, other)
    if isinstance(first, list | tuple) and isinstance(other, list | tuple):
        return len(first) == len(other) and all(_equal(a, b) for a, b in zip(first, other, strict=True))
    if isinstance(first, bool | int | float | str | None):
        return bool(first == other)
    return True


def _random(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    length = sum(shape) - len(shape) + 1 if len(shape) else 1
    row = torch.randn(length, generator=generator)
    if len(shape) < 2:
        return 1 + 0.3 * row.view(shape)
    return (row / math.sqrt(shape[-1])).as_strided(tuple(shape), (1,) * len(shape))
