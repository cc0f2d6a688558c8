"""Call arguments of all blocks for all windows, and what blocks hand to later ones.

Arguments that are the same for every window are kept as the model passed them, once per batch size. Those that differ
(per-layer inputs, token ids) are stored for every window beside the hidden states, in the place that has room. So is
what a block puts into a container for later blocks (shared keys and values), when the stream passes the block. Any
choice of windows can be put together again.

Legend: S windows, B windows in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, equal

from niwaki.data.hidden_states import Activations, choose_place
from niwaki.errors import ArchitectureError
from niwaki.model.block_calls import (
    Call,
    KeyPath,
    containers,
    has_containers,
    leaves,
    rebuilt,
    tell,
    windows_back,
    windows_first,
)
from niwaki.model.decoder import Decoder

Windows = slice | Sequence[int]  # the windows of a batch
_ORIGINAL = object()  # in the contents of a container: what the model itself put there


@dataclass(eq=False)
class Stored:
    """A tensor of every window: `values` [S, …], whose windows lie in dimension `dim` of the argument.

    `handed`: a block has put it into a container. `gradient` is that of the loss, in a backward walk.
    """

    values: Activations
    dim: int
    handed: bool
    gradient: Activations | None = None

    def read(self, windows: Windows, values: Activations | None = None) -> Tensor:
        """Return the argument for `windows`, or `values` of its shape, in memory of its own."""
        return windows_back(take(values or self.values, windows), self.dim).clone()

    def write(self, rows: slice, argument: Tensor, values: Activations | None = None) -> None:
        """Store the argument of the windows `rows`, or put something of its shape into `values`."""
        (values or self.values).write(rows, windows_first(argument, self.dim, rows.stop - rows.start))


@dataclass
class _Seen:
    """An argument: its first window (all of it without windows), and every window as soon as one differs."""

    first: Tensor
    dim: int | None
    stored: Stored | None = None


@dataclass
class _Handed:
    """Tensors that a block put into containers, and the contents of these by number with `Stored` for tensors."""

    own: dict[KeyPath, Stored] = field(default_factory=dict)
    contents: dict[int, Any] = field(default_factory=dict)


def take(values: Activations, windows: Windows) -> Tensor:
    """Return the chosen windows in the order given."""
    return values.read(windows) if isinstance(windows, slice) else values.take(list(windows))


class CallArguments:
    """Call arguments of all blocks of `decoder` for the windows `ids_ST`, filled batch by batch with `record`.

    `used_bytes` are those of the hidden states, which share the limit `activation_bytes`. `folder` holds the files.
    """

    def __init__(
        self,
        decoder: Decoder,
        ids_ST: Tensor,
        used_bytes: int,
        activation_bytes: int | None = None,
        folder: Path | None = None,
        name: str = "stream",
    ) -> None:
        self.decoder = decoder
        self.ids_ST = ids_ST
        self._layout = decoder.anatomy.layout
        self._used_bytes = used_bytes
        self._activation_bytes = activation_bytes
        self._folder, self._name, self._files = folder, name, 0
        self._calls: dict[int, list[Call]] = {}  # by batch size
        self._light: set[int] = set()  # sizes whose calls no longer hold what is stored
        self._seen: list[dict[KeyPath, _Seen]] = [{} for _ in range(len(decoder))]
        self._numbers: list[dict[KeyPath, int]] = [{} for _ in range(len(decoder))]  # of containers, by place
        self._handed: dict[int, _Handed] = {}

    def record(self, rows: slice, calls: list[Call]) -> None:
        """Take the calls of all blocks for the windows `rows`, which come in order."""
        self._calls.setdefault(rows.stop - rows.start, calls)
        met: dict[int, _Seen] = {}  # blocks share arguments
        numbers: dict[int, int] = {}
        varying: list[tuple[_Seen, Tensor]] = []
        for index, call in enumerate(calls):
            for place, container in containers(call.named):
                self._numbers[index][place] = numbers.setdefault(id(container), len(numbers))
            for path, leaf in leaves(call.named):
                if not isinstance(leaf, Tensor):
                    continue
                if id(leaf) in met:
                    self._seen[index].setdefault(path, met[id(leaf)])
                    continue
                seen = met[id(leaf)] = self._see(index, path, leaf, rows)
                if seen.stored is not None or not _alike(seen, leaf, rows):
                    varying.append((seen, leaf))
        new = sum(leaf.nbytes for seen, leaf in varying if seen.stored is None)
        self._used_bytes += new // (rows.stop - rows.start) * len(self.ids_ST)
        for seen, leaf in varying:
            if seen.stored is None:
                assert seen.dim is not None
                seen.stored = self._new(leaf, seen.dim, rows)
                for row in range(rows.start):  # all earlier windows were alike
                    seen.stored.values.write(slice(row, row + 1), seen.first)
            seen.stored.write(rows, leaf)

    def call(self, windows: Windows, index: int) -> Call:
        """Return the call arguments of block `index` for `windows`, rows or a list in any order."""
        size = windows.stop - windows.start if isinstance(windows, slice) else len(windows)
        if size not in self._calls:  # only what all windows share is taken from these calls
            self._calls[size] = self.decoder.embed(self.ids_ST[:1].expand(size, -1))[1]
        if size not in self._light:
            self._light.add(size)
            self._calls[size] = [self._without_stored(*numbered) for numbered in enumerate(self._calls[size])]
        call, seen = self._calls[size][index], self._seen[index]
        if not has_containers(call) and not any(argument.stored for argument in seen.values()):
            return call
        original = dict(leaves(call.named))
        read: dict[Stored, Tensor] = {}

        def value(path: KeyPath, leaf: Any) -> Any:
            stored = leaf if isinstance(leaf, Stored) else seen[path].stored if path in seen else None
            if stored is None:
                return original[path] if leaf is _ORIGINAL else leaf
            if stored not in read:
                read[stored] = stored.read(windows)
            return read[stored]

        contents = {place: self._contents(index, place) for place, _ in containers(call.named)}
        named = rebuilt(_replaced(call.named, {place: new for place, new in contents.items() if new}), value)
        args = tuple(named.pop(number) for number in range(len(call.args)))
        return Call(args, named, call.dims, {stored: x for stored, x in read.items() if stored.handed})

    def keep(self, rows: slice, index: int, call: Call) -> None:
        """Store what block `index` handed on when it ran `call` for the windows `rows`."""
        new = _written(call)
        handed = self._handed.get(index, _Handed())
        if not new and not handed.own:
            return
        if not handed.own:
            self._used_bytes += sum(x.nbytes for x in new.values()) // (rows.stop - rows.start) * len(self.ids_ST)
            handed.own = {path: self._new(x, self._handed_dim(index, path, x), rows, True) for path, x in new.items()}
            inherited = {id(x): stored for stored, x in call.inherited.items()}

            def stored(path: KeyPath, leaf: Any) -> Any:
                return handed.own.get(path) or inherited.get(id(leaf), _ORIGINAL if isinstance(leaf, Tensor) else leaf)

            for place, container in call.handed.items():
                handed.contents[self._numbers[index][place]] = rebuilt(container, stored, place)
            self._handed[index] = handed
        if new.keys() != handed.own.keys():
            path = next(iter(new.keys() ^ handed.own.keys()))
            raise ArchitectureError(f"block {index} hands on {tell(path)} for some windows and not for others")
        for path, x in new.items():
            handed.own[path].write(rows, x)

    def written(self, index: int, call: Call) -> dict[Stored, Tensor]:
        """Return what block `index` handed on in the last run of `call`."""
        return {self._handed[index].own[path]: x for path, x in _written(call).items()}

    def gradient(self, stored: Stored) -> Activations:
        """Return where the gradient of what a block handed on is summed up, zero at first."""
        if stored.gradient is None:
            store = stored.values.store_STD
            self._used_bytes += store.nbytes
            stored.gradient = self._allocate(store)
            stored.gradient.store_STD.zero_()
        return stored.gradient

    def _see(self, index: int, path: KeyPath, leaf: Tensor, rows: slice) -> _Seen:
        """Return what is known of an argument; refuse one that depends on the batch but not on a window."""
        dim = self._layout.arguments[index].get(path)
        if path not in self._seen[index]:
            first = leaf if dim is None else windows_first(leaf, dim, rows.stop - rows.start)[:1].clone()
            self._seen[index][path] = _Seen(first, dim)
        seen = self._seen[index][path]
        if dim is None and seen.first is not leaf and not equal(seen.first, leaf):
            raise ArchitectureError(
                f"block {index} receives {tell(path)} of shape {list(leaf.shape)}, which depends on the batch but has "
                "no dimension of windows: niwaki walks decoders whose windows do not see each other"
            )
        return seen

    def _without_stored(self, index: int, call: Call) -> Call:
        """Return the call without the tensors that are stored for every window."""
        seen = self._seen[index]
        if not any(argument.stored for argument in seen.values()):
            return call
        named = rebuilt(call.named, lambda path, leaf: None if path in seen and seen[path].stored else leaf)
        return replace(call, args=tuple(named.pop(number) for number in range(len(call.args))), kwargs=named)

    def _contents(self, index: int, place: KeyPath) -> Any:
        """Return what a container holds before block `index`, None if no block has written into it."""
        number = self._numbers[index][place]
        writers = [block for block, handed in self._handed.items() if block < index and number in handed.contents]
        return self._handed[max(writers)].contents[number] if writers else None

    def _handed_dim(self, index: int, path: KeyPath, x: Tensor) -> int:
        dim = self._layout.handed[index].get(path)
        if dim is None:
            raise ArchitectureError(
                f"block {index} hands on {tell(path)} of shape {list(x.shape)}, which has no dimension of windows: "
                "niwaki walks decoders whose windows do not see each other"
            )
        return dim

    def _new(self, argument: Tensor, dim: int, rows: slice, handed: bool = False) -> Stored:
        """Allocate an argument for all windows."""
        one = windows_first(argument, dim, rows.stop - rows.start)[:1]
        return Stored(self._allocate(one.expand(len(self.ids_ST), *one.shape[1:])), dim, handed)

    def _allocate(self, like: Tensor) -> Activations:
        """Allocate in the fastest place that has room for the hidden states and all arguments."""
        self._files += 1
        place = choose_place(self._used_bytes, self.decoder.device, self._activation_bytes)
        name = f"{self._name}-arguments-{self._files}.bin"
        return Activations.allocate(tuple(like.shape), like.dtype, self.decoder.device, place, self._folder, name)


def _alike(seen: _Seen, leaf: Tensor, rows: slice) -> bool:
    """Return True if all windows of the batch have the argument of the first window."""
    if seen.dim is None:
        return True
    return bool((windows_first(leaf, seen.dim, rows.stop - rows.start) == seen.first).all())


def _written(call: Call) -> dict[KeyPath, Tensor]:
    """Return the tensors that are new in the containers after the last run of `call`, or changed in place."""
    old = {id(leaf) for _, leaf in leaves(call.named)}
    old -= {id(x) for x in call.inherited.values() if x._version}
    found = ((path, leaf) for place, container in call.handed.items() for path, leaf in leaves(container, place))
    return {path: leaf for path, leaf in found if isinstance(leaf, Tensor) and id(leaf) not in old}


def _replaced(named: dict[Any, Any], new: dict[KeyPath, Any]) -> dict[Any, Any]:
    """Return a copy of arguments with the containers `new` at their places."""

    def replace(value: Any, place: KeyPath) -> Any:
        if place in new:
            return new[place]
        if isinstance(value, tuple):
            items = [replace(item, (*place, key)) for key, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    return {key: replace(value, (key,)) for key, value in named.items()}
