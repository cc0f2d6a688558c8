"""Products of a few tokens with a matrix stored by inputs, which read only the rows of inputs above a threshold.

A token keeps input i if |x_i| > threshold. An input that is not a number is kept and reaches the output. Every token
keeps inputs of its own. The matrix is the transpose of a linear layer's: [I, O]. So the weights of one input are
neighbours, 2 to 20 KB, which memory delivers at full speed. Matrices that share inputs (q, k and v; gate and up) lie
side by side along O, as one wide matrix.

Sums are in float32; results have the dtype of the inputs. A token is the same alone and among others, and on any number
of threads. On a GPU the threshold is a tensor on the device, so that a captured CUDA graph sees later writes.

Cost: the bytes of the kept rows over the memory bandwidth. Levels of codes are read whole: 3 bytes beside 64 bytes of
codes at 4 bits in groups of 128.

Legend: B tokens (1 to 8), I inputs, O outputs, P outputs in whole blocks of 128, G groups of inputs that share a scale.

    y_BO = inputs_dot(x_BI, weight_OI.T.contiguous(), 0.03)
    y_BO = codes_inputs_dot(x_BI, InputCodes.pack([q_part, k_part, v_part]), 0.03)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niwaki.formats.quantized import QuantizedColumns, centre
from niwaki.kernels.cpu_module import BEST, as_array, cpu_module
from niwaki.kernels.types import MAX_TOKENS

KINDS = (torch.bfloat16, torch.float16, torch.float32)  # in the order of C++
BLOCK = 128  # outputs of a block of codes: 64 bytes, one line of memory
BITS = 4


class Kept(NamedTuple):
    """Mask of the kept inputs of every token, and their number."""

    mask_BI: Tensor
    count_B: Tensor


@dataclass(frozen=True)
class InputCodes:
    """Codes of up to 4 bits by inputs: weight = code · scale + offset, with levels per output and group of inputs.

    Without `offset_GP` (float16 as int16, like the scales) the offset is −(zero or centre) · scale. A block of 128
    outputs is 32 words of 16 bits (l, h, j), 4 × 2 × 4. Nibble k of a word belongs to output 64·h + 16·k + 4·l + j.
    Registers with the words of two inputs so unpack into neighbouring outputs.
    """

    codes_IB: Tensor
    scale_GP: Tensor
    offset_GP: Tensor | None
    zero_GP: Tensor | None
    centre: float
    group: int
    outputs: int

    @classmethod
    def pack(cls, matrices: Sequence[QuantizedColumns]) -> "InputCodes":
        """Pack matrices that share inputs, side by side along O. Each is one part with all columns in order."""
        first = matrices[0]
        columns = first.code_OC.shape[1]
        for part in matrices:
            _require(part.bits <= BITS, f"expected codes of at most {BITS} bits, got {part.bits}")
            _require(part.code_OC.shape[1] == columns, f"expected {columns} inputs, got {part.code_OC.shape[1]}")
            in_order = torch.equal(part.columns_C.cpu(), torch.arange(columns))
            _require(in_order, "expected one part that holds all columns in order")
            alike = part.grid == first.grid and (first.zero_OG is not None or part.bits == first.bits)
            _require(alike, f"expected the grid {first.grid} of {first.bits} bits, got {part.grid} of {part.bits}")
        group = min(_group(part, columns) for part in matrices)
        for part in matrices:
            own = _group(part, columns)
            _require(own % group == 0, f"expected groups of whole {group} inputs, got {own}")
        return cls(
            _packed(torch.cat([part.code_OC for part in matrices])),
            _levels([_by_group(part, part.scale_OG, group) for part in matrices]),
            None if first.offset_OG is None else _levels([_by_group(p, p.offset_OG, group) for p in matrices]),
            None if first.zero_OG is None else _zeros([_by_group(p, p.zero_OG, group) for p in matrices]),
            centre(first.bits, first.grid),
            group,
            sum(len(part.code_OC) for part in matrices),
        )

    @property
    def inputs(self) -> int:
        """Return the number of inputs."""
        return len(self.codes_IB)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values() if tensor is not None)

    def to(self, device: torch.device | str) -> "InputCodes":
        """Return the codes on a device."""
        moved = {name: None if t is None else t.to(device) for name, t in self._tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def decode(self) -> Tensor:
        """Return the weights [I, O] in float32."""
        scale_GP = self.scale_GP.view(torch.float16).float()
        if self.offset_GP is not None:
            offset_GP = self.offset_GP.view(torch.float16).float()
        else:
            offset_GP = -scale_GP * (self.centre if self.zero_GP is None else self.zero_GP.float())
        group_I = torch.arange(self.inputs, device=scale_GP.device) // self.group
        weight_IP = _unpacked(self.codes_IB) * scale_GP[group_I] + offset_GP[group_I]
        return weight_IP[:, : self.outputs]

    def _tensors(self) -> dict[str, Tensor | None]:
        names = ("codes_IB", "scale_GP", "offset_GP", "zero_GP")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def levels_by_nibble(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return scales, offsets and zero codes as the GPU kernel takes them: [G, 8, W] for the nibbles of W words."""
        order_8W = _outputs_of_nibbles(self.scale_GP.shape[1]).to(self.scale_GP.device)
        half = (None if t is None else t.view(torch.float16)[:, order_8W] for t in (self.scale_GP, self.offset_GP))
        return *half, None if self.zero_GP is None else self.zero_GP[:, order_8W]  # type: ignore[return-value]

    @cached_property
    def layer(self) -> Any:
        """Return the codes as one object of the compiled kernels."""
        compiled = cpu_module()
        assert compiled is not None, "callers check it first"
        codes, scale, offset, zero = (as_array(tensor) for tensor in self._tensors().values())
        return compiled.InputCodesLayer(self.outputs, self.group, codes, scale, offset, zero, self.centre)


def kept_inputs(x_BI: Tensor, threshold: float | Tensor) -> Kept:
    """Return the inputs that the products below read."""
    mask_BI = ~(x_BI.float().abs() <= threshold)
    return Kept(mask_BI, mask_BI.sum(1))


def inputs_dot(
    x_BI: Tensor,
    weight_IO: Tensor,
    threshold: float | Tensor,
    bias_O: Tensor | None = None,
    *,
    count: Tensor | None = None,
    path: int = BEST,
) -> Tensor:
    """Return y[b] = Σ x[b, i] · W[i] + bias over the kept inputs i of token b: [B, O].

    Weights are bfloat16, float16 or float32, and the outputs of an input are neighbours. `count` (int64 [1]) grows by
    the kept inputs of all tokens. More than 8 tokens multiply the masked inputs with the whole matrix.
    """
    _check(x_BI, weight_IO.shape, bias_O, weight_IO.device)
    if weight_IO.dtype not in KINDS or weight_IO.stride(1) != 1:
        _require(weight_IO.dtype in KINDS, f"expected weights in bfloat16, float16 or float32, got {weight_IO.dtype}")
        raise ValueError(f"expected the outputs of an input as neighbours, got strides {weight_IO.stride()}")
    if x_BI.is_cuda and len(x_BI) <= MAX_TOKENS:
        from niwaki.kernels.triton.inputs import inputs_dot_triton

        return inputs_dot_triton(x_BI.contiguous(), weight_IO, _own(threshold, x_BI), bias_O, count)
    compiled = None if x_BI.is_cuda else cpu_module()
    if compiled is None or len(x_BI) > MAX_TOKENS or weight_IO.stride(0) < weight_IO.shape[1]:
        return _masked(x_BI, weight_IO, threshold, bias_O, count)
    inputs, outputs = weight_IO.shape
    call = _Call(x_BI, bias_O, outputs)
    kept = compiled.inputs_product(
        weight_IO.data_ptr(), KINDS.index(weight_IO.dtype), inputs, outputs, weight_IO.stride(0),
        *call.addresses, len(x_BI), call.narrow, float(threshold), torch.get_num_threads(), path,
    )  # fmt: skip
    return call.result(count, kept)


def codes_inputs_dot(
    x_BI: Tensor,
    codes: InputCodes,
    threshold: float | Tensor,
    bias_O: Tensor | None = None,
    *,
    count: Tensor | None = None,
    path: int = BEST,
) -> Tensor:
    """Return the product of `inputs_dot` with codes. A CPU rounds the inputs of a group to 16 bits."""
    _check(x_BI, torch.Size((codes.inputs, codes.outputs)), bias_O, codes.codes_IB.device)
    if x_BI.is_cuda and len(x_BI) <= MAX_TOKENS:
        from niwaki.kernels.triton.inputs import Levels, codes_dot_triton

        levels = Levels(*codes.levels_by_nibble, codes.centre)
        own, outputs = _own(threshold, x_BI), codes.outputs
        return codes_dot_triton(x_BI.contiguous(), codes.codes_IB, levels, codes.group, own, bias_O, count, outputs)
    if x_BI.is_cuda or cpu_module() is None or len(x_BI) > MAX_TOKENS:
        return _masked(x_BI, codes.decode(), threshold, bias_O, count)
    call = _Call(x_BI, bias_O, codes.outputs)
    threads = torch.get_num_threads()
    kept = codes.layer.multiply(*call.addresses, len(x_BI), call.narrow, float(threshold), threads, path)
    return call.result(count, kept)


class _Call:
    """Inputs, bias and outputs of a product in one dtype that C++ takes, whose addresses it gets."""

    def __init__(self, x_BI: Tensor, bias_O: Tensor | None, outputs: int) -> None:
        dtype = x_BI.dtype if x_BI.dtype == torch.bfloat16 else torch.float32
        self.x_BI, self.dtype, self.narrow = x_BI.to(dtype).contiguous(), x_BI.dtype, dtype == torch.bfloat16
        self.bias_O = None if bias_O is None else bias_O.to(dtype).contiguous()
        self.out_BO = self.x_BI.new_empty(len(x_BI), outputs)
        bias = 0 if self.bias_O is None else self.bias_O.data_ptr()
        self.addresses = self.x_BI.data_ptr(), bias, self.out_BO.data_ptr()

    def result(self, count: Tensor | None, kept: int) -> Tensor:
        """Return the outputs, and add to the count."""
        if count is not None:
            count += kept
        return self.out_BO.to(self.dtype)


def _own(threshold: float | Tensor, x_BI: Tensor) -> float | Tensor:
    """Return a threshold that a kernel can read."""
    if isinstance(threshold, Tensor):
        expected = f"expected one threshold on {x_BI.device}, got {threshold.numel()} on {threshold.device}"
        _require(threshold.device == x_BI.device and threshold.numel() == 1, expected)
        return threshold
    return float(threshold)


def _masked(
    x_BI: Tensor, weight_IO: Tensor, threshold: float | Tensor, bias_O: Tensor | None, count: Tensor | None
) -> Tensor:
    """Compute the product in torch, on any device: the reference, and the way of many tokens."""
    kept = kept_inputs(x_BI, threshold)
    dtype = weight_IO.dtype if len(x_BI) > MAX_TOKENS and weight_IO.dtype == x_BI.dtype else torch.float32
    y_BO = torch.where(kept.mask_BI, x_BI, 0.0).to(dtype) @ weight_IO.to(dtype)
    if bias_O is not None:
        y_BO += bias_O.to(dtype)
    if count is not None:
        count += kept.count_B.sum()
    return y_BO.to(x_BI.dtype)


def _check(x_BI: Tensor, shape: torch.Size, bias_O: Tensor | None, device: torch.device) -> None:
    fits = x_BI.dim() == len(shape) == 2 and x_BI.shape[1] == shape[0] and x_BI.dtype in KINDS
    if fits and x_BI.device == device and (bias_O is None or bias_O.shape == shape[1:]):
        return  # texts take longer than the check
    _require(x_BI.dim() == len(shape) == 2, f"expected tokens and a matrix, got {x_BI.dim()} and {len(shape)} axes")
    _require(x_BI.shape[1] == shape[0], f"expected {shape[0]} inputs, got {x_BI.shape[1]}")
    _require(x_BI.dtype in KINDS, f"expected inputs in bfloat16, float16 or float32, got {x_BI.dtype}")
    _require(x_BI.device == device, f"expected inputs on {device}, got {x_BI.device}")
    given = None if bias_O is None else tuple(bias_O.shape)
    raise ValueError(f"expected a bias of {shape[1]} outputs, got {given}")


def _require(holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(expected)


def _group(part: QuantizedColumns, columns: int) -> int:
    """Return the inputs that share a level."""
    return columns if part.scale_OG.shape[1] == 1 else min(part.group, columns)


def _by_group(part: QuantizedColumns, values_OG: Tensor | None, group: int) -> Tensor:
    """Return levels with one column per `group` inputs."""
    assert values_OG is not None
    columns = part.code_OC.shape[1]
    group_G = torch.arange(0, columns, group, device=values_OG.device) // _group(part, columns)
    return values_OG[:, group_G]


def _levels(values: Sequence[Tensor]) -> Tensor:
    """Return float16 levels of some matrices as int16 [G, P]."""
    return _by_block(torch.cat([value_OG.to(torch.float16) for value_OG in values]).T).view(torch.int16)


def _zeros(values: Sequence[Tensor]) -> Tensor:
    return _by_block(torch.cat([value_OG.to(torch.uint8) for value_OG in values]).T)


def _by_block(values_GO: Tensor) -> Tensor:
    return torch.nn.functional.pad(values_GO, (0, -values_GO.shape[1] % BLOCK)).contiguous()


def _packed(code_OC: Tensor) -> Tensor:
    """Return the bytes [I, P / 2] of codes [O, I]."""
    code_IP = _by_block(code_OC.to(torch.uint8).T)
    words = code_IP.view(len(code_IP), -1, 2, 4, 4, 4).permute(0, 1, 4, 2, 5, 3)  # h, k, l, j to l, h, j, k
    pairs = words.reshape(len(code_IP), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def _unpacked(codes_IB: Tensor) -> Tensor:
    """Return the codes [I, P] of `_packed`."""
    nibbles = torch.stack((codes_IB & 15, codes_IB >> 4), dim=-1)
    return nibbles.view(len(codes_IB), -1, 4, 2, 4, 4).permute(0, 1, 3, 5, 2, 4).reshape(len(codes_IB), -1)


def _outputs_of_nibbles(padded: int) -> Tensor:
    """Return the output of every nibble of the words of 32 bits: [8, W]."""
    block_8W = (
        torch.arange(BLOCK).view(2, 4, 4, 2, 2).permute(4, 1, 2, 0, 3).reshape(8, -1)
    )  # h, k, l, j to j₀, k, l, h, j₁
    return (block_8W[:, None] + torch.arange(0, padded, BLOCK)[:, None]).flatten(1)
