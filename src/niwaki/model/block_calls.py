"""Calls of blocks: the arguments beside the hidden state, and what a block hands to later ones.

Some models give a block more than its hidden state. Per-layer inputs and token ids differ between windows. Shared keys
and values lie in a container that one block fills and later ones read. A walk of one block at a time must give every
window its own. So the shapes of all of them are measured with one and with two windows, on a skeleton without weights.
The dimension that doubles is that of the windows.

Some arguments no walk can give: those that the model computes from the output of an earlier block. Nor can it follow a
hidden state that the model changes between two blocks. Both are refused here, before any work.

Legend: B windows, T tokens, D hidden size.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import ArchitectureError

KeyPath = tuple[Any, ...]  # keys from the arguments of a block down to a value
PROBE_TOKENS = 8
_CACHE_ARGUMENTS = {"past_key_values", "past_key_value", "layer_past", "use_cache", "cache_position"}


@dataclass(frozen=True)
class Call:
    """Call arguments of one block besides its hidden state, as the model passed them.

    `dims` are the dimensions of windows and tokens in the hidden state of the model; here they come first. `inherited`
    holds tensors among the arguments that earlier blocks handed on. `handed` holds the containers after the last run,
    by their place.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: tuple[int, int] = (0, 1)
    inherited: Mapping[Any, Tensor] = field(default_factory=dict)
    handed: dict[KeyPath, Any] = field(default_factory=dict)

    def __call__(self, module: nn.Module, x_BTD: Tensor) -> Tensor:
        """Run the block on `x_BTD` [B, T, D] or [B, T, …, D] and return its hidden state of the same shape."""
        # A block may write into its containers: every run begins with the same ones.
        args, kwargs = rebuilt((self.args, self.kwargs)) if has_containers(self) else (self.args, self.kwargs)
        out = module(x_BTD.movedim((0, 1), self.dims), *args, **kwargs)
        self.handed.clear()
        self.handed.update(containers({**dict(enumerate(args)), **kwargs}))
        hidden: Tensor = out[0] if isinstance(out, tuple | list) else out
        return hidden.movedim(self.dims, (0, 1))

    @property
    def named(self) -> dict[Any, Any]:
        """Return all arguments by place or name."""
        return {**dict(enumerate(self.args)), **self.kwargs}


@dataclass(frozen=True)
class Layout:
    """Dimension of the windows in every tensor that a block receives, by block and path; None if it has none.

    `dims` are those of windows and tokens in the hidden state. `handed` describes what each block puts into its
    containers.
    """

    dims: tuple[int, int] = (0, 1)
    arguments: tuple[Mapping[KeyPath, int | None], ...] = ()
    handed: tuple[Mapping[KeyPath, int | None], ...] = ()


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield everything in nested containers and tuples that is neither, with its path."""
    if isinstance(value, MutableMapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def containers(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the outermost containers among the values of `value`: what a block can write into."""
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(item, MutableMapping | list):
            yield (*path, key), item
        elif isinstance(item, tuple):
            yield from containers(item, (*path, key))


def has_containers(call: Call) -> bool:
    """Return True if the block of this call could write into an argument."""
    return next(containers(call.named), None) is not None


def rebuilt(value: Any, change: Callable[[KeyPath, Any], Any] = lambda path, leaf: leaf, path: KeyPath = ()) -> Any:
    """Return a copy of nested containers and tuples, with `change(path, leaf)` in the place of each leaf."""
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = rebuilt(item, change, (*path, key))
        return copied
    if isinstance(value, list | tuple):
        items = [rebuilt(item, change, (*path, key)) for key, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return change(path, value)


def windows_first(x: Tensor, dim: int, count: int) -> Tensor:
    """Return a view [B, …] of a tensor whose dimension `dim` holds `count` windows, alone or times something."""
    parts: Tensor = x.unflatten(dim, (count, -1)).movedim(dim, 0)
    return parts


def windows_back(x: Tensor, dim: int) -> Tensor:
    """Undo `windows_first`."""
    return x.movedim(0, dim).flatten(dim, dim + 1)


def tell(path: KeyPath) -> str:
    """Name an argument in a message: `shared_kv_states.full_attention.0`."""
    return "argument " + ".".join(map(str, path))


@contextmanager
def stubbed(blocks: nn.ModuleList, stub: Callable[[int, Call, Tensor], Any]) -> Iterator[None]:
    """Replace the forward of each block: the model calls `stub(index, call, hidden)`.

    Only `forward` is replaced, so the model still reads attributes of its blocks such as `attention_type`.
    """

    def make(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            kwargs = {name: value for name, value in kwargs.items() if name not in _CACHE_ARGUMENTS}
            return stub(index, Call(args, kwargs), hidden)

        return forward

    own = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = make(index)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


class _AllCalled(Exception):  # noqa: N818 (ends a forward, and is not an error)
    """Signal that the last block has been called."""


def record_calls(
    blocks: nn.ModuleList, run: Callable[[], Any], output: Callable[[int, Call, Tensor], Any]
) -> list[tuple[Call, Tensor]]:
    """Return the call and the hidden state of every block while `run()` runs the model; it ends at the last block.

    `output(index, call, hidden)` takes the place of the output of a block.
    """
    calls: list[tuple[Call, Tensor]] = []

    def stub(index: int, call: Call, hidden: Tensor) -> Any:
        calls.append((call, hidden))
        if len(calls) == len(blocks):
            output(index, call, hidden)
            raise _AllCalled
        return output(index, call, hidden)

    with stubbed(blocks, stub), suppress(_AllCalled):
        run()
    return calls


def hidden_dims(blocks: nn.ModuleList, run: Callable[[int, int], Any]) -> tuple[int, int]:
    """Return the dimensions of windows and tokens in the hidden state; `run(count, tokens)` runs the model."""
    shapes: list[torch.Size] = []

    def first(index: int, call: Call, hidden: Tensor) -> Any:
        shapes.append(hidden.shape)
        raise _AllCalled

    for count, tokens in ((1, PROBE_TOKENS), (2, PROBE_TOKENS), (1, PROBE_TOKENS + 1)):
        record_calls(blocks, partial(run, count, tokens), first)
    dims = [[dim for dim, (a, b) in enumerate(zip(shapes[0], other, strict=True)) if a != b] for other in shapes[1:]]
    if [len(found) for found in dims] != [1, 1]:
        raise ArchitectureError(
            f"block 0 receives a hidden state of shape {list(shapes[0])} for one window of {PROBE_TOKENS} tokens: "
            "niwaki expects one dimension of windows and one of tokens"
        )
    return dims[0][0], dims[1][0]


@dataclass(frozen=True)
class _Shapes:
    """Shapes of what one block receives and hands on."""

    hidden: tuple[int, ...]
    arguments: dict[KeyPath, tuple[int, ...]]
    handed: dict[KeyPath, tuple[int, ...]]


def measure_layout(
    blocks: nn.ModuleList,
    run: Callable[[int, int], Any],
    dry: Callable[[int, Call, Tensor], None],
    wraps: Sequence[Callable[[Tensor, Tensor], Any]],
) -> Layout:
    """Measure where the windows lie: `run(count, tokens)` runs the model with one window and with two.

    `dry(index, call, hidden)` runs a block that may hand something on, so that later blocks find it. `wraps` give the
    output of each block its form, from the hidden state and a tensor for all others. Raises ArchitectureError for what
    a walk cannot give to a block.
    """
    one, two = (_measure(blocks, partial(run, count, PROBE_TOKENS), dry, wraps) for count in (1, 2))
    both = list(enumerate(zip(one, two, strict=True)))
    return Layout(
        hidden_dims(blocks, run),
        tuple(_dims(index, a.arguments, b.arguments) for index, (a, b) in both),
        tuple(_dims(index, a.handed, b.handed) for index, (a, b) in both),
    )


def _measure(
    blocks: nn.ModuleList,
    run: Callable[[], Any],
    dry: Callable[[int, Call, Tensor], None],
    wraps: Sequence[Callable[[Tensor, Tensor], Any]],
) -> list[_Shapes]:
    """Return the shapes at every block, where each output is a new tensor that autograd follows."""
    found: list[_Shapes] = []
    outputs: list[Tensor] = []

    def output(index: int, call: Call, hidden: Tensor) -> Any:
        where = f"block {index} ({type(blocks[index]).__name__})"
        if outputs and not _same(hidden, outputs[-1]):
            raise ArchitectureError(
                f"{where}: the model changes the hidden state between block {index - 1} and this one, and niwaki walks "
                "decoders that hand it from block to block as it is"
            )
        tensors = {path: leaf for path, leaf in leaves(call.named) if isinstance(leaf, Tensor)}
        for path, tensor in tensors.items():
            if tensor.requires_grad:
                raise ArchitectureError(
                    f"{where} receives {tell(path)}, which the model computes from the output of an earlier block: "
                    "niwaki walks decoders whose blocks depend on their hidden state and on the tokens"
                )
        handed: dict[KeyPath, tuple[int, ...]] = {}
        if has_containers(call):
            dry(index, call, hidden.detach())
            after = ((path, leaf) for path, leaf in leaves(dict(call.named)) if isinstance(leaf, Tensor))
            handed = {path: tuple(leaf.shape) for path, leaf in after if leaf is not tensors.get(path)}
        found.append(_Shapes(tuple(hidden.shape), {path: tuple(t.shape) for path, t in tensors.items()}, handed))
        outputs.append(torch.zeros_like(hidden, requires_grad=True).clone())
        return wraps[index](outputs[-1], outputs[-1].sum())

    with torch.enable_grad():
        record_calls(blocks, run, output)
    return found


def _same(x: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are the same elements of one memory, never changed."""
    return (
        x.data_ptr() == other.data_ptr()
        and x.shape == other.shape
        and x.stride() == other.stride()
        and x._version == other._version == 0
    )


def _dims(index: int, one: Mapping[KeyPath, Any], two: Mapping[KeyPath, Any]) -> dict[KeyPath, int | None]:
    if one.keys() != two.keys():
        path = next(iter(one.keys() ^ two.keys()))
        raise ArchitectureError(f"block {index} has {tell(path)} for one window or for two, but not for both")
    return {path: _window_dim(index, path, shape, two[path]) for path, shape in one.items()}


def _window_dim(index: int, path: KeyPath, one: tuple[int, ...], two: tuple[int, ...]) -> int | None:
    """Return the dimension that doubles from one window to two, None if all are alike."""
    if one == two:
        return None
    differing = [dim for dim, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    if len(one) == len(two) and len(differing) == 1 and two[differing[0]] == 2 * one[differing[0]]:
        return differing[0]
    raise ArchitectureError(
        f"block {index}: {tell(path)} has the shape {list(one)} for one window and {list(two)} for two: niwaki gives "
        "every window its own part of an argument, and finds none"
    )
