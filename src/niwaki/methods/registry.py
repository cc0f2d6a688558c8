"""Registry of the compression methods: their names, their kinds, and the steps of a stage.

Every method is one module with a `METHOD` (see `niwaki.methods.method`), imported when it is used. The table below
needs no module: names and kinds are checked before torch is loaded.

A stage has one or more methods, its steps. In `besa+wandapp` the second one starts from the masks and weights of the
first, block by block. A quantizer after them (`sparsegpt+gptq`, target `2:4+4bit`) keeps zeros and rounds the rest, in
the same walk.
"""

from __future__ import annotations  # names and steps are checked before torch is loaded

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from niwaki.config.recipe import make_options
from niwaki.config.targets import Bits, PrunedBits, Target, target_example
from niwaki.errors import InputError, TargetError, unknown
from niwaki.methods.cost import Scope, Work
from niwaki.methods.method import ContextualMethod, Method, MethodKind, ShapeMethod, WalkMethod

if TYPE_CHECKING:
    import torch

    from niwaki.data.statistics import Needs
    from niwaki.data.stream import CalibrationData
    from niwaki.formats.packed import Packed
    from niwaki.model.decoder import Block


@dataclass(frozen=True)
class MethodInfo:
    """Facts of a method that its module is not loaded for.

    `fractional_bits`: it spends any number of bits a weight, on codes that are stored as they are counted.
    `reads_text`: it needs windows of text.
    """

    name: str
    kind: MethodKind = MethodKind.WALK
    fractional_bits: bool = False
    reads_text: bool = True


METHODS: Mapping[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo("arb"),
        MethodInfo("besa"),
        MethodInfo("billm"),
        MethodInfo("gblm"),
        MethodInfo("gptq"),
        MethodInfo("magnitude", reads_text=False),
        MethodInfo("ptq161"),
        MethodInfo("rtn", reads_text=False),
        MethodInfo("sparsegpt"),
        MethodInfo("squeeze10", fractional_bits=True),
        MethodInfo("trellis", fractional_bits=True),
        MethodInfo("wanda"),
        MethodInfo("wandapp"),
        MethodInfo("comp", MethodKind.SHAPE),
        MethodInfo("flap", MethodKind.SHAPE),
        MethodInfo("shortgpt", MethodKind.SHAPE),
        MethodInfo("two_ssp", MethodKind.SHAPE),
        MethodInfo("wanda_sp", MethodKind.SHAPE),
        MethodInfo("shadow", MethodKind.CONTEXTUAL),
    )
}


@dataclass(frozen=True)
class Step:
    """One method of a stage with its options."""

    name: str
    method: Method
    config: Any

    @property
    def needs(self) -> Needs:
        """Return what the walk collects for this step."""
        return self.method.needs(self.config)

    @property
    def kind(self) -> MethodKind:
        """Return the kind of the method."""
        return self.method.kind

    @property
    def quantizes(self) -> bool:
        """Return whether the method meets bits, not zeros."""
        return Bits in self.method.accepts

    @property
    def group(self) -> int:
        """Return the number of columns that share a scale, 0 for the whole row."""
        return self.method.group(self.config) if isinstance(self.method, WalkMethod) else 0

    @property
    def shape_method(self) -> ShapeMethod:
        """Return the method of a step that changes the shape."""
        assert isinstance(self.method, ShapeMethod), f"{self.name} changes no shape"
        return self.method

    @property
    def contextual_method(self) -> ContextualMethod:
        """Return the method of a contextual step."""
        assert isinstance(self.method, ContextualMethod), f"{self.name} is not contextual"
        return self.method

    def part(self, target: Target) -> Target:
        """Return the part of a target that this step meets: of zeros and bits its own."""
        if not isinstance(target, PrunedBits):
            return target
        return target.bits if self.quantizes else target.zeros

    def min_bits(self, rows: int, columns: int) -> float:
        """Return the bits a weight below which a matrix cannot be stored, of a method with fractional bits."""
        assert isinstance(self.method, WalkMethod) and self.method.min_bits, f"{self.name} has no fractional bits"
        return self.method.min_bits(rows, columns, self.config)

    def named_bits(self, rows: int, columns: int) -> float | None:
        """Return the bits a weight that the options alone give a matrix, None if a target decides."""
        return self.method.named_bits(rows, columns, self.config) if isinstance(self.method, WalkMethod) else None

    def cost(self, scope: Scope) -> Work:
        """Count the work of the method on one block."""
        return self.method.cost(scope, self.config)

    def stored_bytes(self, name: str, rows: int, columns: int, target: Target) -> int | None:
        """Return the bytes of one matrix as codes, None for weights. Raises TargetError if it cannot be met."""
        return self.method.stored_bytes(name, rows, columns, self.part(target), self.config)

    def compress(
        self, block: Block, calib: CalibrationData, targets: Mapping[str, Target], generator: torch.Generator
    ) -> dict[str, Packed]:
        """Run the method on one block; `targets` are its parts of them."""
        return self.method.compress(block, calib, targets, self.config, generator)


def method_names(kind: MethodKind) -> list[str]:
    """Return the names of all methods of one kind."""
    return [info.name for info in METHODS.values() if info.kind == kind]


def method_infos(text: str) -> list[MethodInfo]:
    """Return the methods `text` (names joined by +). Raises InputError with the nearest name for an unknown one."""
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in METHODS:
            raise InputError(unknown("method", name, METHODS))
    return [METHODS[name] for name in names]


def get_method(name: str) -> Method:
    """Return the method `name`. Raises InputError with the nearest name."""
    (info,) = method_infos(name)
    method = importlib.import_module(f"niwaki.methods.{info.name}").METHOD
    assert isinstance(method, Method), f"niwaki.methods.{info.name} declares no METHOD"
    return method


def make_steps(text: str, options: Mapping[str, Any], target: Target | None) -> list[Step]:
    """Return the steps that `text` names (joined by +) with their options, checked against the target.

    Options of a single method are written by their name, those of several as `method.option`. A target of None stands
    for bits that are not known yet.
    """
    names = [info.name for info in method_infos(text)]
    methods = [get_method(name) for name in names]
    if len(set(names)) < len(names):
        raise InputError(f"method {text}: each method may appear only once in a chain")
    _check_steps(text, names, methods, target)
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        owner, _, option = key.rpartition(".")
        if not owner and len(names) == 1:
            owner = names[0]
        if owner not in own:
            raise InputError(f"option {key}: write it as method.option with one of {', '.join(names)}")
        own[owner][option] = value
    if isinstance(target, PrunedBits):
        own[names[-1]] = _masked_options(names[-1], methods[-1], own[names[-1]])
    return [
        Step(name, method, make_options(method.config, own[name], name))
        for name, method in zip(names, methods, strict=True)
    ]


def merged_needs(steps: Sequence[Step]) -> Needs:
    """Return what the walk collects for all steps together."""
    return reduce(or_, (step.needs for step in steps))


def _check_steps(text: str, names: Sequence[str], methods: Sequence[Method], target: Target | None) -> None:
    """Raise TargetError or InputError for a target that the steps do not meet, or steps that do not follow."""
    quantizers = [name for name, method in zip(names, methods, strict=True) if Bits in method.accepts]
    both = isinstance(target, PrunedBits)
    if both and (quantizers != names[-1:] or len(names) < 2):
        raise TargetError(
            f"target {target} prunes, then quantizes: expected a chain that does both, such as sparsegpt+gptq, got "
            f"method {text}"
        )
    if not both and 0 < len(quantizers) < len(names):
        raise TargetError(
            f"method {text} prunes and quantizes: expected a target for each, such as 2:4+4bit, got {target}"
        )
    for name, method in zip(names, methods, strict=True):
        part = target if not isinstance(target, PrunedBits) else target.bits if name in quantizers else target.zeros
        if part is not None and not isinstance(part, method.accepts):
            kinds = " or ".join(map(target_example, method.accepts))
            raise TargetError(f"method {name} meets {kinds}, got target {part}")
    for name, method in zip(names[1:], methods[1:], strict=True):
        if both and name in quantizers and not method.continues:
            able = [other for other in METHODS if _continues_with_bits(get_method(other))]
            raise InputError(f"method {text}: {name} does not leave zeros alone, put {' or '.join(able)} last")
        if not method.continues or (name in quantizers and not both):
            raise InputError(f"method {text}: {name} cannot take up what another method began, put it first")


def _continues_with_bits(method: Method) -> bool:
    return Bits in method.accepts and method.continues


def _masked_options(name: str, method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a quantizer that a mask is given to. Raises TargetError for those that contradict it."""
    assert isinstance(method, WalkMethod), "only methods of the walk continue a chain"
    merged = dict(options)
    for option, required in method.masked_options.items():
        if str(merged.setdefault(option, required)).lower() != str(required).lower():
            raise TargetError(
                f"{name}.{option} {merged[option]}: weights that were pruned stay zero, and the grids that have a code "
                f"for zero in the middle are those of {name}.{option}={str(required).lower()}: leave it out"
            )
    return merged
