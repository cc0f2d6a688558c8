"""The registry: every method is one module, imported when it is used.

A method module offers `PAPER`, `ACCEPTS` (the kinds of target it can meet), `CONTINUES` (whether it can take
up the records of a method before it), a frozen dataclass `Config`, `needs(config)` (what the walk collects)
and `compress(block, calib, targets, config, generator) -> {matrix: Packed}` for one block. What it costs it may say in
`cost` and `stored_bytes` (see `costs`), for `niwaki plan`.

Methods chain: in `besa+wandapp` the second one starts from the masks and weights of the first, block by block. A
quantizer behind them (`sparsegpt+gptq`, target `2:4+4bit`) leaves zeros alone and rounds the rest, in the same walk;
the options that a mask asks of it are its `MASKED`.
"""

from __future__ import annotations  # names and chains are checked before torch is loaded

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Protocol, cast

from niwaki.config.recipe import NM, Bits, Kind, PrunedBits, Recipe, Sparsity, Target, Unit, make_options
from niwaki.errors import InputError, TargetError, unknown
from niwaki.methods.cost import Scope, Work, masks

if TYPE_CHECKING:
    import torch

    from niwaki.data.statistics import Needs, Statistics
    from niwaki.data.stream import CalibrationData
    from niwaki.formats.record import Packed
    from niwaki.model.decoder import Block
    from niwaki.model.prunable import BlockInfo, ShapeSearch, ShapeSpace
    from niwaki.runtime.contextual.predictor import Predictor
    from niwaki.runtime.contextual.selection import Rule, Variant
    from niwaki.runtime.contextual.traces import Traces
    from niwaki.runtime.contextual.units import Layout

METHODS = (
    "arb",
    "besa",
    "billm",
    "gblm",
    "gptq",
    "magnitude",
    "ptq161",
    "rtn",
    "sparsegpt",
    "squeeze10",
    "wanda",
    "wandapp",
)
# These make blocks, heads and neurons fewer: they offer `look` and `search` besides.
STRUCTURED = ("comp", "flap", "shortgpt", "two_ssp", "wanda_sp")
# These leave the weights and learn which of them an input needs: they offer `learn` and `rule` besides.
CONTEXTUAL = ("shadow",)
EVERY = METHODS + STRUCTURED + CONTEXTUAL
# These spend any number of bits a weight that they are given, on codes that are stored as they are counted.
FRACTIONAL = ("squeeze10",)


class Method(Protocol):
    """What a method module offers."""

    PAPER: str
    ACCEPTS: tuple[type, ...]
    CONTINUES: bool
    Config: type
    __doc__: str

    def needs(self, config: Any) -> Needs:
        """What the walk must collect for these options."""

    def compress(
        self,
        block: Block,
        calib: CalibrationData,
        targets: Mapping[str, Target],
        config: Any,
        generator: torch.Generator,
    ) -> dict[str, Packed]:
        """New records for every matrix in `targets`; the block itself is not changed."""


class Fractional(Method, Protocol):
    """What a method in FRACTIONAL offers besides."""

    def min_bits(self, rows: int, columns: int, config: Any) -> float:
        """Bits a weight below which a matrix of this shape cannot be stored."""


class Contextual(Method, Protocol):
    """What a method in CONTEXTUAL offers besides."""

    def trial_rows(self, windows: int, config: Any) -> range:
        """The windows that options are tried on."""

    def settle(
        self,
        traces: Mapping[str, Traces],
        layout: Layout,
        config: Any,
        skip_frac: float,
        decoder_weights: int,
        measure: Callable[[Sequence[Variant]], list[float]],
    ) -> tuple[Any, dict[str, Any]]:
        """The options with what they leave open decided by trial, and the losses of what was tried."""

    def beside_bytes(self, layout: Layout, channels: int, windows: int, config: Any, decoder_weights: int) -> int:
        """Bytes of what is stored beside the weights."""

    def rule(self, config: Any, skip_frac: float) -> Rule:
        """How scores become the units that run."""

    def samples(self, traces: Mapping[str, Traces], layout: Layout, config: Any) -> Traces:
        """What `learn` takes, from the traces of all criteria in `config.criteria`."""

    def learn(
        self, traces: Traces, layout: Layout, config: Any, decoder_weights: int
    ) -> tuple[Predictor, dict[str, Any]]:
        """The predictor for these samples, and what is worth knowing of how it was found."""


class Structured(Method, Protocol):
    """What a method in STRUCTURED offers besides."""

    def look_needs(self, config: Any) -> Needs:
        """What is collected of every dense block before the shape is chosen."""

    def look(self, block: Block, statistics: Mapping[str, Statistics], units: Mapping[Kind, Unit], config: Any) -> Any:
        """What `search` wants to know of a dense block, ready for JSON."""

    def search(self, sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Any) -> ShapeSearch:
        """Looks for a shape that removes at least so much: yields shapes to be tried, is sent the loss of each.

        Returns the shape, None if there is none.
        """


@dataclass(frozen=True)
class Step:
    """One method of a chain with its options."""

    name: str
    method: Method
    config: Any

    @property
    def needs(self) -> Needs:
        """What this step wants to be collected."""
        return self.method.needs(self.config)

    @property
    def quantizes(self) -> bool:
        """Whether it meets bits, not zeros."""
        return Bits in self.method.ACCEPTS

    def part(self, target: Target) -> Target:
        """What of a target this step meets: of zeros and bits its own."""
        if not isinstance(target, PrunedBits):
            return target
        return target.bits if self.quantizes else target.zeros

    def min_bits(self, rows: int, columns: int) -> float:
        """Of a method in FRACTIONAL: see there."""
        return cast(Fractional, self.method).min_bits(rows, columns, self.config)

    def cost(self, scope: Scope) -> Work:
        """What the method says it does to one block; a few passes over its weights if it says nothing (see `costs`)."""
        stated = vars(self.method).get("cost")
        found: Work = masks(scope) if stated is None else stated(scope, self.config)
        return found

    def stored_bytes(self, name: str, rows: int, columns: int, target: Target) -> int | None:
        """Bytes of one matrix as codes, None if it is stored as weights. Raises TargetError if it cannot be met."""
        stated = vars(self.method).get("stored_bytes")
        found: int | None = None if stated is None else stated(name, rows, columns, self.part(target), self.config)
        return found

    @property
    def structured(self) -> Structured:
        """The module of a method in STRUCTURED."""
        return cast(Structured, self.method)

    @property
    def contextual(self) -> Contextual:
        """The module of a method in CONTEXTUAL."""
        return cast(Contextual, self.method)

    def compress(
        self, block: Block, calib: CalibrationData, targets: Mapping[str, Target], generator: torch.Generator
    ) -> dict[str, Packed]:
        """Runs the method on one block; `targets` are its parts of them."""
        return self.method.compress(block, calib, targets, self.config, generator)


def check_names(chain: str) -> list[str]:
    """The methods of `chain` (names joined by +). Raises InputError with the nearest name for one that is none."""
    names = [name.strip() for name in chain.split("+")]
    for name in names:
        if name not in EVERY:
            raise InputError(unknown("method", name, EVERY))
    return names


def get_method(name: str) -> Method:
    """The method module `name`. Raises InputError with the nearest name."""
    check_names(name)
    return cast(Method, importlib.import_module(f"niwaki.methods.{name}"))


def make_steps(chain: str, options: Mapping[str, Any], target: Target) -> list[Step]:
    """The steps of `chain` (names joined by +) with their options, checked against the target.

    Options of a single method are written by their name, those of a chain as `method.option`.
    """
    names = check_names(chain)
    methods = [get_method(name) for name in names]
    if len(set(names)) < len(names):
        raise InputError(f"method {chain}: every method may stand in a chain once")
    _check_chain(chain, names, methods, target)
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        owner, _, option = key.rpartition(".")
        if not owner and len(names) == 1:
            owner = names[0]
        if owner not in own:
            raise InputError(f"option {key}: write it as method.option with one of {', '.join(names)}")
        own[owner][option] = value
    if isinstance(target, PrunedBits):
        own[names[-1]] = _with_mask(names[-1], own[names[-1]])
    return [
        Step(name, method, make_options(method.Config, own[name], name))
        for name, method in zip(names, methods, strict=True)
    ]


def _check_chain(chain: str, names: Sequence[str], methods: Sequence[Method], target: Target) -> None:
    """Raises TargetError or InputError for a target that the chain does not meet, and for steps that do not follow."""
    quantizers = [name for name, method in zip(names, methods, strict=True) if Bits in method.ACCEPTS]
    both = isinstance(target, PrunedBits)
    if both and (quantizers != names[-1:] or len(names) < 2):
        raise TargetError(
            f"target {target} prunes, then quantizes: expected a chain that does both, such as sparsegpt+gptq, got "
            f"method {chain}"
        )
    if not both and 0 < len(quantizers) < len(names):
        raise TargetError(
            f"method {chain} prunes and quantizes: expected a target for each, such as 2:4+4bit, got {target}"
        )
    for name, method in zip(names, methods, strict=True):
        met = target if not isinstance(target, PrunedBits) else target.bits if name in quantizers else target.zeros
        if not isinstance(met, method.ACCEPTS):
            kinds = " or ".join(_KINDS[kind] for kind in method.ACCEPTS)
            raise TargetError(f"method {name} meets {kinds}, got target {met}")
    for name, method in zip(names[1:], methods[1:], strict=True):
        if both and name in quantizers and not method.CONTINUES:
            able = [other for other in METHODS if Bits in get_method(other).ACCEPTS and get_method(other).CONTINUES]
            raise InputError(f"method {chain}: {name} does not leave zeros alone, put {' or '.join(able)} last")
        if not method.CONTINUES or (name in quantizers and not both):
            raise InputError(f"method {chain}: {name} cannot take up what another method began, put it first")


def _with_mask(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a quantizer that is given a mask. Raises TargetError for those that do not go with one."""
    found = dict(options)
    for option, wanted in vars(get_method(name))["MASKED"].items():
        if str(found.setdefault(option, wanted)).lower() != str(wanted).lower():
            raise TargetError(
                f"{name}.{option} {found[option]}: weights that were pruned stay zero, and the grids that have a code "
                f"for zero in the middle are those of {name}.{option}={str(wanted).lower()}: leave it out"
            )
    return found


def settle_budget(recipe: Recipe) -> Recipe:
    """The recipe with its allocation chosen, if that was left to us.

    Raises TargetError for budgets that a method of the recipe would not spend as they are meant.
    """
    names = [part.strip() for part in recipe.method.split("+")]
    if recipe.allocation == "auto":
        by_need = set(names) <= set(FRACTIONAL) and not recipe.keep_blocks
        recipe = recipe.model_copy(update={"allocation": "sensitivity" if by_need else "uniform"})
    by_need = recipe.allocation == "sensitivity"
    searched = recipe.allocation == "searched" and names[0] in STRUCTURED
    if recipe.allocation == "searched" and not searched:
        raise TargetError(f"searched widths need a structured method ({', '.join(STRUCTURED)}), got {recipe.method}")
    if alone := [name for name in names if name in STRUCTURED + CONTEXTUAL]:
        if len(names) > 1:
            what = (
                "changes the shape of the model: put it first in the chain, with a target of its own "
                "(comp+gptq, 0.25+4bit)"
                if alone[0] in STRUCTURED
                else "learns what a finished model needs: run it alone, on the result of other methods"
            )
            raise InputError(f"{alone[0]} {what}")
        if recipe.allocation != "uniform" and not searched:
            what = "the shape" if alone[0] in STRUCTURED else "what runs"
            raise TargetError(f"{alone[0]} chooses {what} itself: drop allocation {recipe.allocation}")
    wanted = {"target_bytes": recipe.target_bytes, "keep_blocks": recipe.keep_blocks, "allocation sensitivity": by_need}
    for name in names:
        for field in (field for field, given in wanted.items() if given):
            get_method(name)
            if name not in FRACTIONAL:
                raise TargetError(
                    f"{field} needs a method that spends whatever bits it is given ({', '.join(FRACTIONAL)}), got "
                    f"{name}: use another method, or drop {field}"
                )
    for given, what in (recipe.pack, "--pack none"), (recipe.options.get("granularity"), "granularity element"):
        if recipe.target_bytes is not None and given == what.split()[-1]:
            raise TargetError(f"target_bytes counts stored codes, and {what} stores none: give --target in bits")
    if by_need and recipe.keep_blocks:
        raise TargetError("keep_blocks and allocation sensitivity both say where the bits go: drop one of them")
    return recipe


def merged_needs(steps: Sequence[Step]) -> Needs:
    """What all steps together want to be collected."""
    return reduce(or_, (step.needs for step in steps))


_KINDS = {Sparsity: "a fraction of zeros such as 0.5", NM: "N:M such as 2:4", Bits: "bits such as 4bit"}
