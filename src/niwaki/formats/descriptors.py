"""Descriptors of packed matrices: the fields of a stored format, their ranges, and the tensors that follow from them.

A result comes from anyone, and kernels trust what they read. So every reader of a packed matrix goes through here:

    stored = read_descriptor("model.layers.0.mlp.up_proj", {"shape": [48, 32], "parts": [...]})
    stored.shapes()         # name → dtype and shape, of the tensors in the file
    stored.check(tensors)   # raises CheckpointError with the module and the field

No descriptor with a field out of its range exists: the constructors refuse it.

Legend: O outputs, I inputs, G groups of columns that share a scale, B bytes of eight columns.
"""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from niwaki.errors import CheckpointError
from niwaki.formats.quantized import GRIDS, TILE
from niwaki.formats.scans import Scans, TorchScans
from niwaki.formats.sparse import BITS, CODES, LAYOUTS, MAX_VALUES, SLACK_BYTES
from niwaki.formats.sparse_tiles import BLOCK_COLUMNS, LAYOUT
from niwaki.formats.trellis import MAX_TRELLIS_BITS, RING, STATES

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

MAX_SIDE = 2**31 - 1  # rows, columns or columns of a group: kernels count them in 32 bits
MAX_BITS = 8
MAX_PARTS = 2
FORMS = ("parts", "sparse", "trellis")  # fields of a description, one of which says how the matrix is stored
AGAIN = "download the result again, or compress again"
NOT_FINITE = "holds NaN or infinite values: expected finite ones"
NOT_ASCENDING = "places holds a pair of columns that does not ascend: expected two different ones of every four"
_MAX_KNOWN = 2**14
# Names that a tensor of any packed matrix may have, after the name of its module.
RECORD_NAMES = (
    *[
        f"{name}_{number}"
        for name in ("planes", "scale", "offset", "zero", "rings", "levels")
        for number in range(MAX_PARTS)
    ],
    *["columns", "places", "values", "starts", "scale"],
)


class FieldError(ValueError):
    """A field of a description is not what its format allows. The reader adds the module."""


@dataclass(frozen=True)
class PartDescriptor:
    """Columns of one width: K `bits`, the `grid` of their levels, columns per `group`, and number of `columns`."""

    bits: int
    grid: str
    group: int
    columns: int

    def __post_init__(self) -> None:
        _whole("bits", self.bits, 1, MAX_BITS)
        _choice("grid", self.grid, GRIDS)
        _whole("group", self.group, 1, MAX_SIDE)
        _whole("columns", self.columns, 1, MAX_SIDE)

    @property
    def groups(self) -> int:
        """Return the number of groups of columns."""
        return -(-self.columns // self.group)

    @classmethod
    def read(cls, value: object) -> "PartDescriptor":
        """Return the part with this description."""
        return cls(**_object("parts", value, [field.name for field in fields(cls)]))


@dataclass(frozen=True)
class Descriptor(ABC):
    """Stored form of the matrix [rows, columns] called `module`."""

    module: str
    rows: int
    columns: int

    def __post_init__(self) -> None:
        _whole("shape", self.rows, 1, MAX_SIDE)
        _whole("shape", self.columns, 1, MAX_SIDE)

    @abstractmethod
    def shapes(self) -> Shapes:
        """Return dtype and shape of every tensor by its name in the file, in the order of the file."""

    @abstractmethod
    def _content(self, tensors: Mapping[str, Tensor], scans: Scans) -> str | None:
        """Return what the values of tensors of the right shapes violate: their name, what was expected and found."""

    def names(self) -> list[str]:
        """Return the names of the tensors, without the name of the module."""
        return list(self.shapes())

    def empty(self) -> dict[str, Tensor]:
        """Return a tensor of dtype and shape for every name, on the default device."""
        return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in self.shapes().items()}

    def check_header(self, found: Mapping[str, tuple[str, Sequence[int]]]) -> None:
        """Raise CheckpointError if a tensor is missing, or has another dtype or shape. Dtypes as in safetensors."""
        labels = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32"}
        shapes = self.shapes()
        self._refuse_others(found, shapes)
        for name, (dtype, shape) in shapes.items():
            if name not in found:
                self._refuse(f"{name} is missing: expected {labels[dtype]} {list(shape)}")
            label, own = found[name]
            if label != labels[dtype] or tuple(own) != shape:
                self._refuse(f"{name} is {label} {list(own)}: expected {labels[dtype]} {list(shape)}")

    def check(self, tensors: Mapping[str, Tensor], scans: Scans | None = None) -> None:
        """Raise CheckpointError if a tensor is missing, or does not hold what the format and the kernels need.

        The values are read by `scans`, by default in torch.
        """
        shapes = self.shapes()
        self._refuse_others(tensors, shapes)
        for name, (dtype, shape) in shapes.items():
            own = tensors.get(name)
            if own is None or own.is_meta or own.dtype != dtype or tuple(own.shape) != shape:
                self._refuse_tensor(name, own, f"expected {str(dtype).removeprefix('torch.')} {list(shape)}")
        if problem := self._content(tensors, scans or TorchScans()):
            self._refuse(problem)

    def _refuse_tensor(self, name: str, own: Tensor | None, expected: str) -> NoReturn:
        if own is None:
            self._refuse(f"{name} is missing: {expected}")
        if own.is_meta:
            self._refuse(f"{name} has no values: {expected}")
        self._refuse(f"{name} is {str(own.dtype).removeprefix('torch.')} {list(own.shape)}: {expected}")

    def _refuse_others(self, found: Mapping[str, object], shapes: Shapes) -> None:
        if others := sorted((found.keys() & set(RECORD_NAMES)) - shapes.keys()):
            self._refuse(f"{others[0]} is stored, and the description in config.json has no such tensor")

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.module}.{problem}; {AGAIN}")


@dataclass(frozen=True)
class CodesDescriptor(Descriptor):
    """Quantized columns in bit planes (see `quantized`), in one part, or in two with a mask of the first one's."""

    parts: tuple[PartDescriptor, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_parts("parts", self.parts, self.columns)

    def shapes(self) -> Shapes:
        """Return dtype and shape of every tensor."""
        shapes: Shapes = {}
        for number, part in enumerate(self.parts):
            tiles, width = -(-self.rows // TILE), -(-part.columns // 8)
            shapes[f"planes_{number}"] = torch.uint8, (tiles, part.bits, width, TILE)
            shapes[f"scale_{number}"] = torch.int16, (part.groups, self.rows)
            if part.grid == "free":
                shapes[f"offset_{number}"] = torch.int16, (part.groups, self.rows)
            if part.grid == "affine":
                shapes[f"zero_{number}"] = torch.uint8, (part.bits, -(-self.rows * part.groups // 8))
        if len(self.parts) > 1:
            shapes["columns"] = torch.uint8, (-(-self.columns // 8),)
        return shapes

    def _content(self, tensors: Mapping[str, Tensor], scans: Scans) -> str | None:
        return _content_of_parts(self, self.parts, tensors, scans)


@dataclass(frozen=True)
class TrellisPart:
    """Columns of a trellis of K `bits`, and their number."""

    bits: int
    columns: int

    def __post_init__(self) -> None:
        _whole("bits", self.bits, 1, MAX_TRELLIS_BITS)
        _whole("columns", self.columns, 1, MAX_SIDE)

    @classmethod
    def read(cls, value: object) -> "TrellisPart":
        """Return the part with this description."""
        return cls(**_object("trellis", value, [field.name for field in fields(cls)]))


@dataclass(frozen=True)
class TrellisDescriptor(Descriptor):
    """Columns coded by a trellis (see `trellis`), in one part, or in two with a mask of the first one's."""

    parts: tuple[TrellisPart, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_parts("trellis", self.parts, self.columns)

    def shapes(self) -> Shapes:
        """Return dtype and shape of every tensor."""
        shapes: Shapes = {}
        for number, part in enumerate(self.parts):
            rings = -(-self.rows // RING), part.columns, RING * part.bits // 8
            shapes[f"rings_{number}"] = torch.uint8, rings
            shapes[f"levels_{number}"] = torch.uint8, (STATES,)
            shapes[f"scale_{number}"] = torch.int16, (1, self.rows)
        if len(self.parts) > 1:
            shapes["columns"] = torch.uint8, (-(-self.columns // 8),)
        return shapes

    def _content(self, tensors: Mapping[str, Tensor], scans: Scans) -> str | None:
        return _content_of_parts(self, self.parts, tensors, scans)


@dataclass(frozen=True)
class NonzerosDescriptor(Descriptor):
    """Nonzeros in row order with their places (see `sparse`). Only codes have groups; other values have `group` 0."""

    layout: str
    values: str
    nbytes: int
    group: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("layout", self.layout, LAYOUTS)
        _choice("values", self.values, tuple(BITS))
        _whole("bytes", self.nbytes, SLACK_BYTES, MAX_VALUES * 4 + SLACK_BYTES)
        if self.values in CODES:
            _whole("group", self.group, 1, MAX_SIDE)
            if self.group < self.columns and self.group % 8:
                raise FieldError(f"group is {self.group}: expected a multiple of 8, or at least {self.columns}")
        elif self.group:
            raise FieldError(f"group is {self.group}: expected none for {self.values} values")
        if self.layout == "two_four" and self.nbytes != (needed := self._bytes_of(4 * self.rows * self._width)):
            raise FieldError(f"bytes is {self.nbytes}: expected {needed} for {self.values} in this shape")

    @property
    def _width(self) -> int:
        return -(-self.columns // 8)

    def _bytes_of(self, count: int) -> int:
        return -(-count * BITS[self.values] // 8) + SLACK_BYTES

    def shapes(self) -> Shapes:
        """Return dtype and shape of every tensor."""
        shapes: Shapes = {
            "places": (torch.uint8, (self.rows, self._width)),
            "values": (torch.uint8, (self.nbytes,)),
        }
        if self.layout == "bitmap":
            shapes["starts"] = torch.int32, (self.rows,)
        if self.values in CODES:
            shapes["scale"] = torch.int16, (self.rows, -(-self.columns // self.group))
        return shapes

    def _content(self, tensors: Mapping[str, Tensor], scans: Scans) -> str | None:
        places = tensors["places"]
        count = 4 * self.rows * self._width
        if self.layout == "two_four":
            if not scans.pairs_ascend(places):
                return NOT_ASCENDING
        else:
            count, beyond, ordered = scans.bitmap(places, self.columns, tensors["starts"])
            if (needed := self._bytes_of(count)) != self.nbytes:
                return f"places marks {count} values of {needed} bytes: expected {self.nbytes}, as bytes says"
            if count > MAX_VALUES:
                return f"places marks {count} values: expected at most {MAX_VALUES}"
            if beyond:
                return f"places marks values after the last of {self.columns} columns: expected none"
            if not ordered:
                return "starts does not count the values before each row: expected the sums of places"
        if self.values in CODES:
            return None if scans.halves_finite(tensors["scale"]) else f"scale {NOT_FINITE}"
        return None if scans.values_finite(tensors["values"], count, self.values) else f"values {NOT_FINITE}"


@dataclass(frozen=True)
class TilesDescriptor(Descriptor):
    """Two-four matrix of 4-bit codes in tiles of 32 rows (see `sparse_tiles`)."""

    nbytes: int
    group: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _whole("group", self.group, 1, MAX_SIDE)
        if self.columns % BLOCK_COLUMNS:
            raise FieldError(f"shape has {self.columns} columns: expected a multiple of {BLOCK_COLUMNS} in tiles")
        if self.group < self.columns and self.group % BLOCK_COLUMNS:
            raise FieldError(
                f"group is {self.group}: expected a multiple of {BLOCK_COLUMNS}, or at least {self.columns}"
            )
        _whole("bytes", self.nbytes, 1, MAX_VALUES * 4)
        if self.nbytes != (needed := self._tiles * self.columns // 4 * TILE):
            raise FieldError(f"bytes is {self.nbytes}: expected {needed} for this shape in tiles")

    @property
    def _tiles(self) -> int:
        return -(-self.rows // TILE)

    def shapes(self) -> Shapes:
        """Return dtype and shape of every tensor."""
        return {
            "places": (torch.uint8, (self._tiles, self.columns // 8, TILE)),
            "values": (torch.uint8, (self._tiles, self.columns // 4, TILE)),
            "scale": (torch.int16, (-(-self.columns // self.group), self._tiles * TILE)),
        }

    def _content(self, tensors: Mapping[str, Tensor], scans: Scans) -> str | None:
        if not scans.halves_finite(tensors["scale"]):
            return f"scale {NOT_FINITE}"
        return None if scans.tile_pairs_ascend(tensors["places"], self.rows) else NOT_ASCENDING


_KNOWN: dict[tuple[str, str], Descriptor] = {}


def read_descriptor(module: str, description: object) -> Descriptor:
    """Return the descriptor of a packed matrix.

    Raises CheckpointError with the module and the field for anything that its format does not allow.
    """
    try:
        return _known_descriptor(module, description)
    except FieldError as error:
        raise CheckpointError(f"config.json describes {module} wrongly: {error}; {AGAIN}") from error


def read_descriptors(modules: object) -> dict[str, Descriptor]:
    """Return the descriptors of all packed modules of a config by name. Raises CheckpointError as above."""
    if not isinstance(modules, Mapping):
        raise CheckpointError(f"quantization_config.modules is {reprlib.repr(modules)}: expected an object; {AGAIN}")
    return {name: read_descriptor(name, about) for name, about in modules.items()}


def read_shapes(shapes: object) -> dict[str, list[int]]:
    """Return the matrices with other shapes of a config: name → [O, I]. Raises CheckpointError as above."""
    if not isinstance(shapes, Mapping):
        raise CheckpointError(f"quantization_config.shapes is {reprlib.repr(shapes)}: expected an object; {AGAIN}")
    try:
        return {name: list(_shape(shape)) for name, shape in shapes.items()}
    except FieldError as error:
        raise CheckpointError(f"quantization_config.shapes of config.json: {error}; {AGAIN}") from error


def _known_descriptor(module: str, description: object) -> Descriptor:
    """Return the descriptor that was read of the same words before, or read it: a load needs each several times."""
    if type(description) is not dict:
        return _descriptor(module, description)
    try:
        words = module, repr(description)
    except RecursionError:
        return _descriptor(module, description)
    if (found := _KNOWN.get(words)) is None:
        found = _descriptor(module, description)
        if len(_KNOWN) >= _MAX_KNOWN:
            _KNOWN.clear()
        _KNOWN[words] = found
    return found


def _descriptor(module: str, description: object) -> Descriptor:
    forms = [form for form in FORMS if isinstance(description, Mapping) and form in description]
    if not isinstance(description, Mapping) or len(forms) != 1:
        raise FieldError(
            f"got {reprlib.repr(description)}, expected an object with shape, and parts, sparse or trellis"
        )
    if forms == ["parts"]:
        shape, entries = _listed(description, "parts")
        return CodesDescriptor(module, *shape, tuple(PartDescriptor.read(part) for part in entries))
    if forms == ["trellis"]:
        shape, entries = _listed(description, "trellis")
        return TrellisDescriptor(module, *shape, tuple(TrellisPart.read(part) for part in entries))
    about = _object("", description, ["shape", "sparse"])
    rows, columns = _shape(about["shape"])
    stored = _object("sparse", about["sparse"], ["layout", "values", "bytes"], ["group"])
    if stored["layout"] == LAYOUT:
        _choice("values", stored["values"], ("int4",))
        return TilesDescriptor(module, rows, columns, stored["bytes"], stored.get("group"))  # type: ignore[arg-type]
    if stored.get("group", 1) == 0:
        raise FieldError("group is 0: expected at least 1, or no group")
    return NonzerosDescriptor(
        module, rows, columns, stored["layout"], stored["values"], stored["bytes"], stored.get("group", 0)
    )


def _listed(description: Mapping[str, Any], form: str) -> tuple[tuple[int, int], Sequence[object]]:
    """Return the shape and the parts of a matrix whose parts are listed under `form`."""
    about = _object("", description, ["shape", form])
    if not isinstance(about[form], list | tuple):
        raise FieldError(f"{form} is {reprlib.repr(about[form])}: expected a list")
    return _shape(about["shape"]), about[form]


def _check_parts(form: str, parts: Sequence[PartDescriptor | TrellisPart], columns: int) -> None:
    """Raise FieldError unless one or two parts have all columns together."""
    if not 1 <= len(parts) <= MAX_PARTS:
        raise FieldError(f"{form} has {len(parts)} entries: expected 1 or 2")
    if (total := sum(part.columns for part in parts)) != columns:
        raise FieldError(f"columns of the parts add up to {total}: expected {columns}, as in shape")


def _content_of_parts(
    descriptor: Descriptor, parts: Sequence[PartDescriptor | TrellisPart], tensors: Mapping[str, Tensor], scans: Scans
) -> str | None:
    """Return what scales, offsets or the mask of the first part's columns violate."""
    for name in descriptor.names():
        if name.startswith(("scale", "offset")) and not scans.halves_finite(tensors[name]):
            return f"{name} {NOT_FINITE}"
    if len(parts) == 1:
        return None
    picked, beyond = _inside_and_beyond(tensors["columns"], descriptor.columns)
    if beyond:
        return f"columns sets {beyond} bits after the last of {descriptor.columns} columns: expected none"
    if picked != parts[0].columns:
        return f"columns picks {picked} columns: expected {parts[0].columns}, as part 0 has"
    return None


def _object(name: str, value: object, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of an object of JSON, all of which are known."""
    if not isinstance(value, Mapping):
        raise FieldError(f"{name} is {reprlib.repr(value)}: expected an object")
    known = [*required, *optional]
    prefix = f"{name}." if name else ""
    for key in value:
        if key not in known:
            raise FieldError(f"{prefix}{reprlib.repr(key)} is unknown: expected {', '.join(known)}")
    for key in required:
        if key not in value:
            raise FieldError(f"{prefix}{key} is missing")
    return dict(value)


def _shape(value: object) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise FieldError(f"shape is {reprlib.repr(value)}: expected two whole numbers, [rows, columns]")
    for side in value:
        _whole("shape", side, 1, MAX_SIDE)
    return value[0], value[1]


def _whole(name: str, value: object, least: int, most: int) -> None:
    """Raise FieldError unless the value is an int in its range; true and 4.0 are none."""
    if type(value) is not int or not least <= value <= most:
        raise FieldError(f"{name} is {reprlib.repr(value)}: expected a whole number from {least} to {most}")


def _choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise FieldError(f"{name} is {reprlib.repr(value)}: expected {' or '.join(choices)}")


def _inside_and_beyond(mask_B: Tensor, count: int) -> tuple[int, int]:
    """Return the number of set bits among the first `count`, and after them: a mask has at most some kilobytes."""
    bits = int.from_bytes(bytes(mask_B.tolist()), "little")
    return (bits & ((1 << count) - 1)).bit_count(), (bits >> count).bit_count()
