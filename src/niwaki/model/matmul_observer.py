"""Observer of all products of an activation and a weight, whichever module or operation computes them.

The observer is a torch function mode and knows no layer class. `nn.Linear`, the `Conv1D` of GPT-2 and `x @ weight.T` of
Falcon all end in one of a few products. So do the slices of fused 3-D expert tensors, and batched products with a whole
stack. The observer recognizes the weight operand by its memory address. A product with a stack counts as one product
per slice.

Legend: E slices of a stack, N tokens, O outputs, I inputs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Observe = Callable[[str, Tensor, bool], None]


@dataclass(frozen=True)
class Slice:
    """Matrix at a memory address: its name (`parameter` or `parameter[expert]`), and its stored rows and columns."""

    name: str
    shape: torch.Size


Pointers = dict[int, Slice]


class MatmulObserver(TorchFunctionMode):
    """Function mode that calls `observe(name, x, transposed)` when `x` [..., I] is multiplied with the weight `name`.

    `pointers` maps the address of the first element of a weight to its name. `transposed` is True if the weight is
    stored [I, O] (used as `x @ W`), not [O, I]. A `dry` observer returns zeros and does not multiply, so it probes
    weights of any size without access to their memory.
    """

    def __init__(self, pointers: Pointers, observe: Observe, *, dry: bool = False) -> None:
        super().__init__()
        self.pointers = dict(pointers)
        self.observe = observe
        self.dry = dry
        self._casts: list[Tensor] = []  # keeps the addresses of converted weights in use

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._observed(func, args, kwargs) and self.dry:
            fake = fake_result(func, args, kwargs)
            followed = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
            return fake + 0 * followed[0].sum() if followed else fake  # still follows from x for autograd
        result = func(*args, **kwargs)
        if func in CASTS and add_cast(self.pointers, args[0], result):
            self._casts.append(result)
        return result

    def _observed(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Report the products of a call. Return False if it multiplies no known weight."""
        found = list(find_products(func, args, kwargs, self.pointers))
        for product in found:
            # A token that did not choose an expert of a stack is a row of zeros for it.
            x = product.x if self.dry or not product.batched else product.x[product.x.any(-1)]
            self.observe(product.slice.name, x, product.transposed)
        return bool(found)


@dataclass(frozen=True)
class Product:
    """Product of the activation `x` [..., I] and one slice. `batched`: the call multiplies a stack at once."""

    slice: Slice
    x: Tensor
    transposed: bool
    batched: bool


def weight_pointers(parameters: Mapping[str, Tensor]) -> Pointers:
    """Map the address of the first element of each matrix to its name: `parameter` or `parameter[expert]`."""
    pointers: Pointers = {}
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            pointers[parameter.data_ptr()] = Slice(name, parameter.shape)
        elif parameter.dim() == 3:
            for expert, part in enumerate(parameter):
                pointers[part.data_ptr()] = Slice(f"{name}[{expert}]", part.shape)
    return pointers


def add_cast(pointers: Pointers, weight: Any, result: Any) -> bool:
    """Give the copy of a weight in another dtype the name of the weight. Return False for any other result."""
    if not isinstance(weight, Tensor) or not isinstance(result, Tensor) or weight.data_ptr() not in pointers:
        return False
    if result.data_ptr() == weight.data_ptr() or result.shape != weight.shape or not weight.is_contiguous():
        return False
    for part, cast in zip(_slices(weight), _slices(result), strict=True):
        if part.data_ptr() in pointers:
            pointers[cast.data_ptr()] = pointers[part.data_ptr()]
    return True


def find_products(func: Any, args: Any, kwargs: Any, pointers: Pointers) -> Iterator[Product]:
    """Yield the products of a call with whole weights of `pointers`, a batched one slice by slice."""
    for x, weight_IO in _operands(func, args, kwargs, pointers):
        batched = weight_IO.dim() == 3
        parts = []
        for index, part_IO in enumerate(_slices(weight_IO)):
            known = pointers.get(part_IO.data_ptr())
            if known is None or part_IO.numel() != known.shape.numel():
                break  # a part of a matrix
            own = x
            if batched and x.dim() > 2:
                own = x.select(-3, index if x.shape[-3] > 1 else 0)
            parts.append(Product(known, own, _stored_as_used(part_IO, known), batched))
        else:
            yield from parts


def fake_result(func: Any, args: Any, kwargs: Any, generator: torch.Generator | None = None) -> Tensor:
    """Return zeros, or normal numbers of `generator`, in the shape of the result of a call, without computing it."""
    found = meta_result(func, args, kwargs)
    if generator is None:
        return torch.zeros_like(found, device="cpu")
    return torch.randn(found.shape, generator=generator).to(found.dtype)


def meta_result(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the result of a call on the meta device: its shape and its dtype."""

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    found: Tensor = func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    return found


def _operands(func: Any, args: Any, kwargs: Any, pointers: Pointers) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield activation [..., N, I] and known weight [I, O] or [E, I, O] of a call that multiplies them."""
    if func is torch.nn.functional.linear:
        weight_OI = args[1] if len(args) > 1 else kwargs["weight"]
        if isinstance(weight_OI, Tensor) and weight_OI.dim() == 2:
            yield args[0], weight_OI.T
    elif func is torch.functional.einsum:
        yield from _einsum_operands(args, pointers)
    else:
        left, right = _pair(func, args)
        if right is not None and right.dim() in (2, 3) and right.data_ptr() in pointers:
            yield left, right
        elif left is not None and left.dim() in (2, 3) and left.data_ptr() in pointers and right.dim() > 1:
            yield right.transpose(-1, -2), left.transpose(-1, -2)


def _pair(func: Any, args: Any) -> tuple[Any, Any]:
    """Return both operands of a product, None and None for another call."""
    operands: list[Any] = list(args if func in _PRODUCTS else args[1:] if func in _SUMS else ())
    if len(operands) != 2 or not all(isinstance(operand, Tensor) for operand in operands):
        return None, None
    return operands[0], operands[1]


def _einsum_operands(args: Any, pointers: Pointers) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield activation and known weight of an einsum that sums over one letter of a matrix, or of a stack of matrices.

    The first letter of a stack counts its slices, whether the activation has this letter or not.
    """
    equation, *operands = args
    if not isinstance(equation, str) or len(operands) != 2:
        return
    terms, _, out = equation.replace(" ", "").partition("->")
    pairs = list(zip(terms.split(","), operands, strict=True))
    (of_x, x), (of_weight, weight) = pairs if operands[1].data_ptr() in pointers else pairs[::-1]
    if weight.data_ptr() not in pointers or len(of_weight) not in (2, 3) or "." in of_weight:
        return
    of_x = of_x.replace("...", "0123456789"[: x.dim() - len(of_x.replace(".", ""))])
    stack, pair = of_weight[:-2], of_weight[-2:]
    summed = [letter for letter in pair if letter in of_x and letter not in out]
    if len(summed) != 1 or len(set(pair) & set(of_x)) > 1 or (stack and stack not in out):
        return
    own = [letter for letter in of_x if letter not in stack + summed[0]]
    order = [letter for letter in (stack, *own, summed[0]) if letter and letter in of_x]
    x = x.permute([of_x.index(letter) for letter in order])
    if stack:
        x = x.reshape(x.shape[0] if stack in of_x else 1, -1, x.shape[-1])
    yield x, weight if pair[0] == summed[0] else weight.transpose(-1, -2)


def _slices(weight: Tensor) -> Iterator[Tensor]:
    return iter(weight) if weight.dim() == 3 else iter((weight,))


def _stored_as_used(weight_IO: Tensor, known: Slice) -> bool:
    """Return True if a weight lies in memory [I, O], as `x @ W` uses it, False for [O, I]."""
    inputs, outputs = weight_IO.shape
    if inputs != outputs:
        return weight_IO.shape == known.shape
    return weight_IO.stride(-1) == 1


_PRODUCTS = {
    torch.matmul, torch.mm, torch.bmm,
    torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm,
}  # fmt: skip
_SUMS = {torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm}
CASTS = {
    torch.Tensor.to, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16,
    torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.contiguous, torch.Tensor.clone, torch.clone,
}  # fmt: skip
