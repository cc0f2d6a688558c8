"""Uses of the weights of a block: what a short forward does with each parameter of two or more dimensions.

A weight that multiplies activations by a matrix product is a matrix. Every other use is told apart by its operator: a
convolution, a lookup, a product of elements. A weight that no operator joins with an activation has no use.

The probe follows values by their storage. What stems from the hidden state or another argument is an activation. What
stems from weights alone is still a weight.

    uses = WeightUses(parameters, [hidden_BTD], seed=0)
    with torch.no_grad(), uses:
        module(hidden_BTD)
    uses.products["mlp.up_proj.weight"].x, uses.others["mixer.conv1d.weight"]
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from niwaki.model.matmul_observer import (
    CASTS,
    Slice,
    add_cast,
    fake_result,
    find_products,
    meta_result,
    weight_pointers,
)

CONVOLVED = "convolution"
LOOKED_UP = "lookup"
NORM = "norm"
ELEMENTS = "used element by element"
MULTIPLIED = "multiplied, but not as a whole matrix"

_MIN_FAKED = 2**20  # elements of a weight from which on its copy in another dtype is not written


@dataclass(frozen=True)
class Use:
    """First product of a matrix of a stored shape. `version` tells inputs apart that lie at one address."""

    x: Tensor
    version: int
    transposed: bool
    shape: torch.Size


class WeightUses(TorchFunctionMode):
    """Function mode that records the first use of each parameter, without access to the memory of matrices.

    Products return random numbers, so that another `seed` sends tokens to other experts. `products` holds the use of
    each matrix (`parameter` or `parameter[expert]`), `others` how else a parameter meets activations.
    """

    def __init__(self, parameters: Mapping[str, Tensor], activations: Any, seed: int) -> None:
        super().__init__()
        self.products: dict[str, Use] = {}
        self.others: dict[str, str] = {}
        self._pointers = weight_pointers(parameters)
        self._weights = {place: {name} for name, p in parameters.items() if (place := _place(p))}
        self._stored = {place: (name, p) for name, p in parameters.items() if (place := _place(p))}
        self._activations = set(_places(activations))
        self._held: list[Tensor] = []  # an address tells values apart only while all of them live
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        casts = func in CASTS
        given = _places(args[:1] if casts else [args, kwargs])
        met: set[str] = set().union(*(self._weights.get(place, ()) for place in given))
        active = any(place in self._activations for place in given)
        if not met:
            result = func(*args, **kwargs)
            if active and (result is None or _IN_PLACE.search(_name(func))):
                self._note(args[0], met, active=True)
            return self._note(result, met, active=active)
        if _PRODUCT.search(_name(func)):
            self._find_parts([args, kwargs])
        if products := list(find_products(func, args, kwargs, self._pointers)):
            for product in products:
                use = Use(product.x, product.x._version, product.transposed, product.slice.shape)
                self.products.setdefault(product.slice.name, use)
            for bias in met - {product.slice.name.partition("[")[0] for product in products}:
                self.others.setdefault(bias, ELEMENTS)
            return self._note(fake_result(func, args, kwargs, self._generator), met, active=True)
        if casts:
            result = _cast(func, args, kwargs)
            add_cast(self._pointers, args[0], result)
            return self._note(result, met, active=False)
        result = func(*args, **kwargs)
        looked_up = _LOOKUP.search(_name(func)) is not None
        if not self._weights.keys() >= set(_places(result)) and (active or looked_up):
            self._describe(func, met)
        return self._note(result, met, active=active and not looked_up)

    def _find_parts(self, given: Any) -> None:
        """Note which parameters of two dimensions are multiplied as equal parts of their rows."""
        for operand in _tensors(given):
            name, weight = self._stored.get(_place(operand) or 0, ("", operand))
            if not name or weight.dim() != 2 or not weight.is_contiguous() or operand.dim() not in (2, 3):
                continue
            part = operand[0] if operand.dim() == 3 else operand
            part = part if part.stride(-1) == 1 else part.T
            first, step = part.storage_offset() - weight.storage_offset(), part.numel()
            whole = part.is_contiguous() and part.shape[1] == weight.shape[1] and step < weight.numel()
            if whole and weight.numel() % step == 0 and first % step == 0:
                for index, one in enumerate(weight.unflatten(0, (-1, part.shape[0]))):
                    self._pointers[one.data_ptr()] = Slice(f"{name}[{index}]", one.shape)

    def _describe(self, func: Any, met: set[str]) -> None:
        """Note how `func` uses the parameters `met`: the first use counts, and a product more than any other."""
        name = _name(func)
        if _PRODUCT.search(name):
            self.others |= dict.fromkeys(met, MULTIPLIED)
            return
        kinds = ((_LOOKUP, LOOKED_UP), (_CONVOLUTION, CONVOLVED), (_NORM, NORM))
        found = next((kind for pattern, kind in kinds if pattern.search(name)), ELEMENTS)
        for parameter in met:
            self.others.setdefault(parameter, found)

    def _note(self, result: Any, met: set[str], *, active: bool) -> Any:
        """Remember from what the tensors of a result stem: from activations, or from weights alone."""
        for value in _tensors(result):
            place = _place(value)
            if place is None or place in self._stored:
                continue
            self._held.append(value)
            if active:
                self._activations.add(place)
            elif met:
                self._weights.setdefault(place, set()).update(met)
        return result


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """Return a weight in another dtype; a large one has memory that is not written."""
    if args[0].numel() < _MIN_FAKED:
        return func(*args, **kwargs)
    found = meta_result(func, args, kwargs)
    if found.dtype == args[0].dtype:
        return func(*args, **kwargs)
    return torch.empty_like(found, device="cpu")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _places(value: Any) -> list[int]:
    return [place for tensor in _tensors(value) if (place := _place(tensor)) is not None]


def _place(tensor: Tensor) -> int | None:
    """Return the address of the storage of a tensor, None if it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # tensors inside a transformation of torch
        return None


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


_PRODUCT = re.compile(
    r"(^|_)(mm|bmm|addmm|baddbmm|addbmm|matmul|mv|addmv|dot|vdot|inner|tensordot|einsum|linear|bilinear|multi_dot)(_|$)"
)
_LOOKUP = re.compile(r"^(__getitem__|embedding|embedding_bag|gather|take|take_along_dim|index_select|index)$")
_CONVOLUTION = re.compile(r"conv")
_NORM = re.compile(r"norm")
_IN_PLACE = re.compile(r"[^_]_$|^__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)__$")
